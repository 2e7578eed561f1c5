"""``dsconv inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import command

if TYPE_CHECKING:
    from dsconv.checkpoint import Checkpoint

SHOWN_ROWS = 40


@command(epilog="""\b
Example:
  dsconv inspect checkpoints/
  dsconv inspect checkpoints/ --json | jq .tensors[0]""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.option("--tag", "-t", metavar="TAG", help="Checkpoint to read, if CKPT holds several.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main).")
@click.option("--all", "show_all", is_flag=True, help=f"List every tensor instead of the first {SHOWN_ROWS}.")
@console.FOLLOW_LINKS
@console.JSON
@console.DEBUG
def inspect(checkpoint: str, show_all: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Show what a checkpoint holds.

    That is its format, step, world sizes, tensors, ties and problems. Only metadata is read, a few kilobytes whatever
    the size of the model. org/model is downloaded to the Hub's cache; hf://org/model is read in place.
    """
    from dsconv.checkpoint import open_checkpoint

    console.quiet_downloads(as_json)
    found = open_checkpoint(checkpoint, **options)
    if as_json:
        console.show_json(describe(found))
    else:
        _show(found, None if show_all else SHOWN_ROWS)


def describe(found: Checkpoint) -> dict[str, Any]:
    """Return everything that ``--json`` prints."""
    return {
        "path": str(found.path),
        "format": found.format,
        "step": found.step,
        "world": found.world,
        "info": found.info,
        "parameters": found.numel,
        "bytes": found.nbytes,
        "ties": found.ties,
        "warnings": list(found.warnings),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in found.sources],
        "tensors": [
            {"name": e.name, "dtype": str(e.dtype), "shape": list(e.shape), "role": e.role, "bytes": e.nbytes,
             "pieces": e.piece_count, "aliases": list(e.aliases)}
            for e in found.values()
        ],
    }  # fmt: skip


def _text(value: Any) -> str:
    """Return a value of ``info`` as text: counts as ``12 optim, 1 step``, a list by its items."""
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _show(found: Checkpoint, limit: int | None) -> None:
    world = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in found.world.items())
    kinds: dict[str, int] = {}
    for entry in found.values():
        kinds[entry.role] = kinds.get(entry.role, 0) + 1
    facts = (
        ("path", str(found.path)),
        ("format", found.format),
        ("step", "" if found.step is None else str(found.step)),
        ("world", world),
        *((name.replace("_", " "), _text(value)) for name, value in found.info.items()),
        ("files", f"{len(found.sources)} read, {console.size(sum(p.stat().st_size for p in found.sources))}"),
        ("tensors", f"{len(found):,} ({', '.join(f'{n:,} {role}' for role, n in kinds.items())})"),
        ("parameters", f"{found.numel:,}"),
        ("merged size", console.size(found.nbytes)),
    )
    console.table([("", "left"), ("", "left")], [(label, value) for label, value in facts if value])
    console.say("")
    entries = list(found.values())
    rows = [
        (
            [entry.name, *(f"  = {alias}" for alias in entry.aliases)],
            str(entry.dtype),
            " × ".join(map(str, entry.shape)) or "scalar",
            entry.role,
            str(entry.piece_count),
            console.size(entry.nbytes),
        )
        for entry in entries[:limit]
    ]
    left = ("tensor", "dtype", "shape", "role")
    console.table([*((title, "left") for title in left), ("pieces", "right"), ("size", "right")], rows)
    if limit is not None and len(entries) > limit:
        console.say(f"… {len(entries) - limit:,} more; --all lists them")
    for warning in found.warnings:
        console.say("")
        console.say(warning, label="Problem:", fg="yellow")
