"""``dsconv validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import command
from dsconv.errors import EXIT_MISMATCH, require_packages
from dsconv.urls import local_path

if TYPE_CHECKING:
    from dsconv.engine.validation_report import Cell, ValidationReport

FAULTS = ["drop-exp-avg", "reset-rng", "skip-batch", "swap-shards", "stale-latest"]


@command(epilog="""\b
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
    help="Ranks of each run, an even number.",
)
@click.option(
    "--report",
    "folder",
    required=True,
    type=click.Path(),
    metavar="DIR",
    help="Folder for report.json, .md, .html, the curves and the runs.",
)
@click.option("--quick", is_flag=True, help="Run four rows only: ZeRO-1, ZeRO-3, AutoTP and native.")
@click.option("--cells", metavar="ROW,…", help="Run these rows only, such as zero3-bf16.")
@click.option(
    "--sabotage", "fault", type=click.Choice(FAULTS), help="Break each resumed run on purpose; validation must fail."
)
@click.option(
    "--steps",
    type=int,
    default=8,
    show_default=True,
    metavar="N",
    help="Steps of a run, a multiple of 4; it is stopped halfway.",
)
@click.option(
    "--seq-len", type=click.IntRange(2), default=32, show_default=True, metavar="L", help="Tokens per sample."
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of weights, data and dropout.",
)
@console.JSON
@console.QUIET
@console.DEBUG
def validate(
    model: str, folder: str, cells: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> int:
    """Prove that runs resume, reshape and convert exactly.

    Small runs of MODEL are trained with real engines, stopped and resumed in new processes, in place and on other
    ranks, converted and loaded back. States, losses and weights are compared. The exit code is 5 if a cell fails.
    """
    require_packages("validation", "train", "torch", "transformers")
    from dsconv.engine.validation import validate as run

    quiet_steps = quiet or as_json
    report = run(
        model,
        local_path(folder, "the report"),
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
    console.say(f"  running {name}", err=True)


def _done(cell: Cell) -> None:
    mark = {True: "passed", False: "FAILED", None: "does not apply"}[cell.passed]
    console.say(f"{cell.name}: {mark} ({cell.level}, {cell.seconds:.1f} s)", err=True)
    if cell.passed is False:
        for key, value in cell.evidence.items():
            console.say(f"    {key}: {value}", err=True)


def _show(report: ValidationReport, folder: str) -> None:
    from dsconv.engine.matrix import COLUMNS
    from dsconv.engine.validation_report import MARKS

    console.warn(report.warnings)
    rows = []
    for name in dict.fromkeys(cell.row for cell in report.cells):
        found = {cell.column: cell.passed for cell in report.cells if cell.row == name}
        rows.append((name, *(MARKS[found[column]] if column in found else "" for column in COLUMNS)))
    console.table([("", "left"), *((column, "left") for column in COLUMNS)], rows)
    count = sum(cell.passed is not None for cell in report.cells)
    failed = sum(cell.passed is False for cell in report.cells)
    verdict = (
        f"all {console.count(count, 'cell')} passed"
        if report.passed
        else f"{failed} of {console.count(count, 'cell')} FAILED"
    )
    console.say(f"{verdict} in {report.seconds:.0f} s; {Path(folder) / 'report.md'}")
