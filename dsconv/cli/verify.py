"""``dsconv verify``."""

from __future__ import annotations

import time
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import command
from dsconv.errors import EXIT_MISMATCH

SHOWN = 20


@command(epilog="""\b
Example:
  dsconv verify checkpoints/ merged/
  dsconv verify checkpoints/ merged-bf16/ --allow-cast
  dsconv verify checkpoints/ dcp/ --optimizer""")  # fmt: skip
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--allow-cast", is_flag=True, help="Floats may have another dtype in B, if they are A's cast once to nearest even."
)
@click.option("--subset", is_flag=True, help="Ignore tensors that only A has (after --exclude-frozen).")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the model on the Hub (default: main).")
@click.option("--optimizer", is_flag=True, help="Compare the optimizers' states, step counts and hyperparameters too.")
@console.ITEMS
@console.ITEM_B
@console.FOLLOW_LINKS
@console.JSON
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; see the exit code.")
@console.DEBUG
@click.pass_context
def verify(context: click.Context, /, a: str, b: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Compare two checkpoints of any formats, byte by byte.

    If they differ, the names and the first differing elements are printed, and the exit code is 5. A tied tensor counts
    as present under each of its names.
    """
    from dsconv.convert import verify as convert

    console.quiet_downloads(quiet or as_json)
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.verify(a, b, progress=progress, **options)
    seconds = time.monotonic() - began
    if as_json:
        console.show_json({**report.to_dict(), "seconds": round(seconds, 3)})
    elif not quiet:
        if report.equal:
            states = f" and {console.count(report.states, 'optimizer state')}" if report.states else ""
            cast = f", {report.cast} of them cast" if report.cast else ""
            console.say(
                f"equal: {console.count(report.compared, 'tensor')}{states}{cast}, {console.size(report.nbytes)},"
                f" {seconds:.2f} s"
            )
        if report.filters is not None:
            given = [f"--{name.replace('_', '-')} {text}" for name, texts in report.filters.items() for text in texts]
            console.say(f"as the manifest of B says: {', '.join(given)}")
        for difference in report.differences[:SHOWN]:
            console.say(str(difference))
        if len(report.differences) > SHOWN:
            console.say(f"… and {len(report.differences) - SHOWN} more")
    if not report.equal:
        if not as_json:
            cast_only = not options["allow_cast"] and all(
                difference.what.startswith("dtype") for difference in report.differences
            )
            hint = " in dtype only: give --allow-cast if B was cast on purpose" if cast_only else ""
            console.say(
                f"Error: {console.count(len(report.differences), 'difference')} between {a} and {b}{hint}", err=True
            )
        context.exit(EXIT_MISMATCH)
