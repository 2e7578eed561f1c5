"""``dsconv inspect``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console

if TYPE_CHECKING:
    from dsconv.checkpoint import Checkpoint

SHOWN_ROWS = 40
PIPE_COLUMNS = 200  # where the output is no terminal, names are not folded


@click.command(epilog="""\b
Example:
  dsconv inspect checkpoints/
  dsconv inspect checkpoints/ --json | jq .tensors[0]""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.option("--tag", "-t", metavar="TAG", help="The checkpoint to take, where CKPT holds several.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main).")
@click.option("--all", "show_all", is_flag=True, help=f"List every tensor, not the first {SHOWN_ROWS}.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
def inspect(checkpoint: str, tag: str | None, revision: str | None, show_all: bool, as_json: bool, debug: bool) -> None:
    """Show what a checkpoint holds: format, step, world sizes, tensors, ties, problems.

    Only metadata is read: kilobytes, whatever the size of the model (of hf://org/model too; org/model is downloaded).
    """
    from dsconv.checkpoint import open_checkpoint

    console.quiet_downloads(as_json)
    found = open_checkpoint(checkpoint, tag, revision)
    if as_json:
        console.show_json(describe(found))
    else:
        _show(found, None if show_all else SHOWN_ROWS)


def describe(found: Checkpoint) -> dict[str, Any]:
    """Everything that ``--json`` prints."""
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


def _said(value: Any) -> str:
    """A value of ``info``: counts as ``12 optim, 1 step``, a list by its items."""
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _show(found: Checkpoint, rows: int | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    head = Table(show_header=False, box=None, pad_edge=False)
    world = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in found.world.items())
    kinds: dict[str, int] = {}
    for entry in found.values():
        kinds[entry.role] = kinds.get(entry.role, 0) + 1
    for label, value in (
        ("path", str(found.path)),
        ("format", found.format),
        ("step", "" if found.step is None else str(found.step)),
        ("world", world),
        *((name.replace("_", " "), _said(value)) for name, value in found.info.items()),
        ("files", f"{len(found.sources)} read, {console.size(sum(p.stat().st_size for p in found.sources))}"),
        ("tensors", f"{len(found):,} ({', '.join(f'{n:,} {role}' for role, n in kinds.items())})"),
        ("parameters", f"{found.numel:,}"),
        ("merged size", console.size(found.nbytes)),
    ):
        if value:
            head.add_row(Text(label, style="bold"), Text(value))
    out.print(head)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("tensor", "left"),
        ("dtype", "left"),
        ("shape", "left"),
        ("role", "left"),
        ("pieces", "right"),
        ("size", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    entries = list(found.values())
    for entry in entries[:rows]:
        name = entry.name + "".join(f"\n  = {alias}" for alias in entry.aliases)
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        table.add_row(
            Text(name), str(entry.dtype), shape, entry.role, str(entry.piece_count), console.size(entry.nbytes)
        )
    out.print()
    out.print(table)
    if rows is not None and len(entries) > rows:
        out.print(f"… {len(entries) - rows:,} more; --all lists them")
    for warning in found.warnings:
        out.print(Text(f"\nProblem: {warning}", style="yellow"))
