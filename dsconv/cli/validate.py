"""``dsconv validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.errors import EXIT_MISMATCH

if TYPE_CHECKING:
    from dsconv.engine.validation_report import Cell, ValidationReport

FAULTS = ["drop-exp-avg", "reset-rng", "skip-batch", "swap-shards", "stale-latest"]


@click.command(epilog="""\b
Example:
  dsconv validate model/ --nproc 2 --quick --report report/
  dsconv validate model/ --nproc 4 --cells zero3-bf16 --report report/""")  # fmt: skip
@click.argument("model")
@click.option(
    "--nproc",
    type=click.IntRange(2),
    default=2,
    show_default=True,
    metavar="W",
    help="Ranks of each run; an even number.",
)
@click.option(
    "--report",
    "folder",
    required=True,
    type=click.Path(),
    metavar="DIR",
    help="For report.json, report.md, the curves and runs.",
)
@click.option("--quick", is_flag=True, help="A few rows: ZeRO-1, ZeRO-3, AutoTP and native.")
@click.option("--cells", metavar="ROW,…", help="These rows only, such as zero3-bf16.")
@click.option("--sabotage", type=click.Choice(FAULTS), help="Break each resumed run on purpose: validation must fail.")
@click.option(
    "--steps",
    type=int,
    default=8,
    show_default=True,
    metavar="N",
    help="Steps of a run, a multiple of 4; it stops halfway.",
)
@click.option("--seq-len", type=click.IntRange(2), default=32, show_default=True, metavar="L", help="Tokens a sample.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, data and dropout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
def validate(
    model: str, folder: str, cells: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> int:
    """Prove that runs of MODEL resume, reshape and convert without losing anything.

    Trains small runs with real engines, stops and resumes them in new processes, in place and on other ranks, converts
    them and loads them back, and compares states, losses and weights. Exits 5 when a cell fails.
    """
    from dsconv.engine.validation import validate as run

    quiet_steps = quiet or as_json
    report = run(
        model,
        Path(folder),
        cells=tuple(name.strip() for name in cells.split(",") if name.strip()) if cells else (),
        began=(lambda name: None) if quiet_steps else _began,
        done=(lambda cell: None) if quiet_steps else _done,
        **options,
    )
    if as_json:
        console.show_json(report.to_dict())
    elif not quiet:
        _show(report, folder)
    return 0 if report.passed else EXIT_MISMATCH


def _began(name: str) -> None:
    click.echo(f"  running {name}", err=True)


def _done(cell: Cell) -> None:
    mark = {True: "passed", False: "FAILED", None: "does not apply"}[cell.passed]
    click.echo(f"{cell.name}: {mark} ({cell.level}, {cell.seconds:.1f} s)", err=True)
    if cell.passed is False:
        for key, value in cell.evidence.items():
            click.echo(f"    {key}: {value}", err=True)


def _show(report: ValidationReport, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from dsconv.engine.matrix import COLUMNS
    from dsconv.engine.validation_report import MARKS

    console.warn(report.warnings)
    table = Table("", *COLUMNS)
    for name in dict.fromkeys(cell.row for cell in report.cells):
        found = {cell.column: cell.passed for cell in report.cells if cell.row == name}
        table.add_row(name, *(MARKS[found[column]] if column in found else "" for column in COLUMNS))
    Console().print(table)
    count = sum(cell.passed is not None for cell in report.cells)
    failed = sum(cell.passed is False for cell in report.cells)
    verdict = f"all {count} cells passed" if report.passed else f"{failed} of {count} cells FAILED"
    click.echo(f"{verdict} in {report.seconds:.0f} s; {Path(folder) / 'report.md'}")
