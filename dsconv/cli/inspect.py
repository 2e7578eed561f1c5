"""``dsconv inspect``."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import command

if TYPE_CHECKING:
    from dsconv.checkpoint import Checkpoint
    from dsconv.checkpoint.map.tensors import TensorEntry
    from dsconv.convert.values import ValuesReport
    from dsconv.errors import SeveralModelsError

Row = tuple[list[str], str, str, str, str, str]


@command(epilog="""\b
Example:
  dsconv inspect checkpoints/
  dsconv inspect checkpoints/ --filter '*.q_proj.*' --all
  dsconv inspect checkpoints/ --json | jq .tensors[0]""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.option("--tag", "-t", metavar="TAG", help="Checkpoint to read, if CKPT holds several.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main).")
@console.ITEM
@click.option("--all", "show_all", is_flag=True, help="List every tensor instead of layer by layer.")
@click.option("--values", is_flag=True, help="Read all values: NaN, Inf, zeros, norms and repeated shards.")
@console.HTML
@click.option("--filter", "globs", multiple=True, metavar="GLOB", help="Show the tensors whose name matches.")
@console.FOLLOW_LINKS
@console.JSON
@console.DEBUG
def inspect(
    checkpoint: str,
    show_all: bool,
    values: bool,
    page: Path | None,
    globs: tuple[str, ...],
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Show what a checkpoint holds.

    The output names the format, the trainer, step, world sizes, models, tensors, ties and problems. Only metadata is
    read, a few kilobytes whatever the size of the model; --values reads the weights and the optimizer's states, once.
    org/model is downloaded to the Hub's cache; hf://org/model is read in place.
    """
    from dsconv.checkpoint import open_checkpoint
    from dsconv.errors import SeveralModelsError

    if page is not None:
        console.check_page(page, "inspect --html")
    console.quiet_downloads(as_json)
    try:
        found = open_checkpoint(checkpoint, **options)
    except SeveralModelsError as several:
        _show_models(several, as_json)
        return
    entries = [entry for entry in found.values() if not globs or any(_matches(entry, glob) for glob in globs)]
    summary = None
    if values:
        from dsconv.convert.values import values_of

        with console.progress(as_json) as progress:
            summary = values_of(found, names={entry.name for entry in entries}, progress=progress)
    if page is not None:
        from dsconv.convert.pages import write_inspect_page

        write_inspect_page(page, found, entries, _facts(found), summary)
    if as_json:
        console.show_json(describe(found, entries) | ({"values": summary.to_dict()} if summary else {}))
        return
    _show(found, entries, show_all)
    if summary is not None:
        _show_values(summary, show_all)


def describe(found: Checkpoint, entries: list[TensorEntry] | None = None) -> dict[str, Any]:
    """Return everything that ``--json`` prints; ``entries`` are the tensors to list, by default all."""
    from dsconv.checkpoint.summary import content_of, optimizer_of, trainer_of
    from dsconv.names.choosing import names_of

    optimizer = optimizer_of(found)
    return {
        "path": str(found.path),
        "format": found.format,
        "trainer": trainer_of(found),
        "content": content_of(found),
        "names": names_of(found),
        "step": found.step,
        "world": found.world,
        "info": found.info,
        "parameters": found.numel,
        "bytes": found.nbytes,
        "optimizer": asdict(optimizer) if optimizer is not None else None,
        "ties": found.ties,
        "warnings": list(found.warnings),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in found.sources],
        "tensors": [
            {"name": e.name, "dtype": str(e.dtype), "shape": list(e.shape), "role": e.role, "bytes": e.nbytes,
             "pieces": e.piece_count, "aliases": list(e.aliases)}
            for e in (found.values() if entries is None else entries)
        ],
    }  # fmt: skip


def _matches(entry: TensorEntry, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in (entry.name, *entry.aliases))


def _show_models(several: SeveralModelsError, as_json: bool) -> None:
    if as_json:
        console.show_json({"path": str(several.where), "models": several.models})
        return
    console.say(f"{several.where} holds {console.count(len(several.models), 'model')}:")
    console.table(
        [("model", "left"), ("tensors", "right")], [(key, f"{n:,}" if n else "") for key, n in several.models.items()]
    )
    console.say("", "Choose one with --item, here and in the other commands.")


def _text(value: Any) -> str:
    """Return a value of ``info`` as text: counts as ``12 optim, 1 step``, a list by its items."""
    if isinstance(value, dict):
        return console.counts(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _facts(found: Checkpoint) -> list[tuple[str, str]]:
    from dsconv.checkpoint.summary import content_of, optimizer_of, trainer_of
    from dsconv.names.choosing import names_of

    world = ", ".join(
        console.count(number, "rank") if name == "ranks" else f"{number} {name.replace('_', ' ')}"
        for name, number in found.world.items()
    )
    kinds: dict[str, int] = {}
    for entry in found.values():
        kinds[entry.role] = kinds.get(entry.role, 0) + 1
    facts = (
        ("path", str(found.path)),
        ("format", found.format),
        ("written by", trainer_of(found)),
        ("content", content_of(found)),
        ("names", names_of(found)),
        ("step", "" if found.step is None else str(found.step)),
        ("world", world),
        *((name.replace("_", " "), _text(value)) for name, value in found.info.items()),
        ("files", f"{len(found.sources)} read, {console.size(sum(p.stat().st_size for p in found.sources))}"),
        ("tensors", f"{len(found):,} ({', '.join(f'{n:,} {role}' for role, n in kinds.items())})"),
        ("parameters", f"{found.numel:,}"),
        ("merged size", console.size(found.nbytes)),
        ("optimizer", str(optimizer_of(found) or "")),
    )
    return [(label, value) for label, value in facts if value]


def _show(found: Checkpoint, entries: list[TensorEntry], show_all: bool) -> None:
    console.table([("", "left"), ("", "left")], _facts(found))
    console.say("")
    rows = [_row([entry.name], [entry]) for entry in entries] if show_all else _grouped_rows(entries)
    left = [(title, "left") for title in ("tensor", "dtype", "shape", "role")]
    columns = [*left, ("pieces", "right"), ("size", "right")]
    if show_all:
        console.table(columns, rows)
    else:
        console.long_table(columns, rows, "--all lists every tensor")
    if not entries:
        console.say("no tensor has such a name" if found else "no tensors")
    for warning in found.warnings:
        console.say("")
        console.say(warning, label="Problem:", fg="yellow")


def _show_values(report: ValuesReport, show_all: bool) -> None:
    """Show the tensors with NaN or infinite values first, then all others in their order."""
    tensors = sorted(report.tensors, key=lambda values: not values.nonfinite)
    rows = [
        (v.name, f"{v.nan:,}", f"{v.infinite:,}", f"{v.zeros / max(1, v.numel):.1%}", f"{v.norm:.4g}",
         f"{v.largest:.4g}")
        for v in tensors
    ]  # fmt: skip
    titles = [(title, "right") for title in ("NaN", "Inf", "zeros", "norm", "largest")]
    columns = [("tensor", "left"), *titles]
    console.say("")
    if show_all:
        console.table(columns, rows)
    else:
        console.long_table(columns, rows, "--all lists every tensor")
    console.say("", f"{console.size(report.nbytes)} of values read")
    if report.no_optimizer:
        console.say(f"no optimizer states: {report.no_optimizer}")
    for name, why in report.not_read.items():
        console.say(f"not read: {name}: {why}")
    for problem in report.problems:
        console.say(problem, label="Problem:", fg="yellow")


def _grouped_rows(entries: list[TensorEntry]) -> list[Row]:
    from dsconv.checkpoint.summary import grouped

    rows: list[Row] = []
    for (before, indices), together in groupby(grouped(entries), key=lambda group: group.layers):
        groups = list(together)
        if not indices:
            rows += [_row([before], group.entries) for group in groups]
            continue
        name = f"{before}.{indices}".removeprefix(".")
        layers = min(len(group.entries) for group in groups)
        if len(groups) == 1:
            rows.append(_row([f"{name}.{groups[0].after}".removesuffix(".")], groups[0].entries))
            continue
        each = sum(len(group.entries) // layers for group in groups)
        total = console.size(sum(group.nbytes for group in groups))
        rows.append(([f"{name}: {console.count(each, 'tensor')} each"], "", "", "", "", total))
        rows += [_row([f"  .{group.after}"], group.entries) for group in groups]
    return rows


def _row(name: list[str], entries: list[TensorEntry]) -> Row:
    """Return the row of tensors of one kind; pieces and bytes are those of all of them."""
    first = entries[0]
    return (
        [*name, *(f"  = {alias}" for entry in entries for alias in entry.aliases)],
        str(first.dtype),
        console.shape(first.shape),
        "" if first.role == "parameter" else first.role,
        str(sum(entry.piece_count for entry in entries)),
        console.size(sum(entry.nbytes for entry in entries)),
    )
