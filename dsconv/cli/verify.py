"""``dsconv verify``."""

from __future__ import annotations

import time

import click

from dsconv.cli import console
from dsconv.errors import EXIT_MISMATCH

SHOWN = 20


@click.command(epilog="""\b
Example:
  dsconv verify checkpoints/ merged/
  dsconv verify checkpoints/ merged-bf16/ --allow-cast""")  # fmt: skip
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--allow-cast", is_flag=True, help="A float of another dtype in B must be A's, cast once to nearest even."
)
@click.option("--subset", is_flag=True, help="Tensors that only A has are not a difference (after --exclude-frozen).")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the one that is on the Hub (default: main).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; the exit code tells.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
@click.pass_context
def verify(
    context: click.Context,
    a: str,
    b: str,
    allow_cast: bool,
    subset: bool,
    revision: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Compare two checkpoints, of any formats, tensor by tensor and byte by byte.

    Exit code 5 and the names, with the first element that differs, when they are not equal. Tied names count as present
    under each of their names.
    """
    from dsconv.convert import verify as convert

    console.quiet_downloads(quiet or as_json)
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.verify(a, b, allow_cast=allow_cast, subset=subset, revision=revision, progress=progress)
    seconds = time.monotonic() - began
    if as_json:
        console.show_json({**report.to_dict(), "seconds": round(seconds, 3)})
    elif not quiet:
        if report.equal:
            cast = f", {report.cast} of them cast" if report.cast else ""
            click.echo(
                f"equal: {console.count(report.compared, 'tensor')}{cast}, {console.size(report.nbytes)},"
                f" {seconds:.2f} s"
            )
        for difference in report.differences[:SHOWN]:
            click.echo(str(difference))
        if len(report.differences) > SHOWN:
            click.echo(f"… and {len(report.differences) - SHOWN} more")
    if not report.equal:
        if not as_json:
            cast_only = not allow_cast and all(difference.what.startswith("dtype") for difference in report.differences)
            hint = ", in dtype alone: --allow-cast compares what was cast on purpose" if cast_only else ""
            click.echo(
                f"Error: {console.count(len(report.differences), 'difference')} between {a} and {b}{hint}", err=True
            )
        context.exit(EXIT_MISMATCH)
