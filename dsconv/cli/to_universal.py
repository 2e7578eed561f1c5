"""``dsconv to-universal``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import command


@command("to-universal", epilog="""\b
Example:
  dsconv to-universal checkpoints/ checkpoints/global_step100_universal
  dsconv to-universal checkpoint-500/ universal/ --verify

Then set "checkpoint": {"load_universal": true} in the DeepSpeed config and
load OUT, or the folder that OUT lies in.""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.argument("output", type=click.Path(), required=False, metavar="[OUT]")
@click.option("--tag", "-t", metavar="TAG", help="Checkpoint to read (default: the one that 'latest' names).")
@console.ITEM
@console.FOLLOW_LINKS
@click.option(
    "--exclude-frozen",
    is_flag=True,
    help="Leave weights that were not trained out of zero/.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--verify", "verify_output", is_flag=True, help="Read the output back and compare every byte.")
@click.option("--force", is_flag=True, help="Replace a universal checkpoint that OUT already holds.")
@click.option(
    "--fsync/--no-fsync",
    default=None,
    help="Flush the output to the disk (default: yes).",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Copying threads (default: one a core, at most 8)."
)
@console.PART
@console.JSON
@console.QUIET
@console.DEBUG
def to_universal(checkpoint: str, output: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a training checkpoint to a DeepSpeed universal one.

    CKPT may have any ZeRO stage or none, or be a DCP directory that holds the optimizer (torch's own, accelerate, the
    Trainer, torchtitan). A universal checkpoint holds the fp32 masters and the optimizer's states of each parameter, so
    that a run resumes with another number of ranks or ZeRO stage. It is written to OUT (default: CKPT/<tag>_universal),
    and the file latest_universal beside OUT names it, as DeepSpeed's ds_to_universal does.
    """
    from dsconv.convert import universal_writer as convert

    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.to_universal(checkpoint, output, progress=progress, **options)
    seconds = time.monotonic() - began
    if not console.show_report(report, seconds, as_json, quiet):
        return
    if report.plan:
        columns = [("file", "left"), ("dtype", "left"), ("shape", "left"), ("bytes", "right")]
        console.long_table(columns, list(map(_cells, report.plan)), "--json lists all of them")
    size = (
        f"{console.count(report.tensors, 'parameter')} of {report.parameters:,} elements, each with"
        f" {', '.join(report.states)}"
    )
    done = (
        "nothing was written (--dry-run)"
        if report.dry_run
        else f"{seconds:.2f} s{', verified' if report.verified else ''}"
    )
    console.say(f"{size}: {console.size(report.nbytes)} in {console.count(report.files, 'file')}; {done}")
    if not report.dry_run:
        console.say('resume from it with "checkpoint": {"load_universal": true} in the DeepSpeed config')


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if "copied_from" in row:
        return row["file"], f"a copy of {Path(row['copied_from']).name}", "", f"{row['bytes']:,}"
    return row["file"], row.get("dtype", ""), console.shape(row["shape"]) if "shape" in row else "", f"{row['bytes']:,}"
