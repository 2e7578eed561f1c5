"""``dsconv to-universal``."""

from __future__ import annotations

import time
from typing import Any

import click

from dsconv.cli import console


@click.command("to-universal", epilog="""\b
Example:
  dsconv to-universal checkpoints/ checkpoints/global_step100_universal
  dsconv to-universal checkpoint-500/ universal/ --verify

Then set "checkpoint": {"load_universal": true} in the DeepSpeed config and
load OUT, or the folder that OUT lies in.""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.argument("output", type=click.Path(), required=False, metavar="[OUT]")
@click.option("--tag", "-t", metavar="TAG", help="The checkpoint to take (default: what the file 'latest' names).")
@click.option(
    "--exclude-frozen",
    is_flag=True,
    help="No files in zero/ for weights that were not trained, which no loader looks for.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--verify", "verify_output", is_flag=True, help="Read the output back and compare every byte.")
@click.option("--force", is_flag=True, help="Replace a universal checkpoint that OUT already holds.")
@click.option(
    "--fsync/--no-fsync",
    default=True,
    show_default=True,
    help="Have the output on the disk before it counts as written.",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Copying threads (default: one a core, at most 8)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
def to_universal(checkpoint: str, output: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a DeepSpeed checkpoint, of any ZeRO stage or none, into a universal one.

    A universal checkpoint holds the fp32 masters, the optimizer's states and its step a parameter, so that a run goes
    on with another number of ranks or at another ZeRO stage. OUT (default: CKPT/<tag>_universal) becomes its folder,
    and a file latest_universal beside OUT names it, as DeepSpeed's ds_to_universal leaves it.
    """
    from dsconv.convert import universal_writer as convert

    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.to_universal(checkpoint, output, progress=progress, **options)
    seconds = time.monotonic() - began
    if not console.show_report(report, seconds, as_json, quiet):
        return
    for row in report.plan:
        kind = (
            f"from {row['copied_from']}"
            if "copied_from" in row
            else f"{row.get('dtype', '')}  {row.get('shape', '')}".strip()
        )
        click.echo(f"  {row['bytes']:>14,}  {row['file']}  {kind}".rstrip())
    size = (
        f"{console.count(report.tensors, 'parameter')} of {report.parameters:,} elements, each with"
        f" {', '.join(report.states)}"
    )
    done = (
        "nothing was written (--dry-run)"
        if report.dry_run
        else f"{seconds:.2f} s{', verified' if report.verified else ''}"
    )
    click.echo(f"{size}: {console.size(report.nbytes)} in {console.count(report.files, 'file')}; {done}")
