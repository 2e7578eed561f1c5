"""Write the report of a validation: report.json, a page, and a picture of the curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.engine.files import write_file
from dsconv.engine.matrix import COLUMNS
from dsconv.text import count as counted

CURVES = "curves.png"
MARKS = {True: "✓", False: "✗", None: "–"}


def write_report(folder: Path, report: ValidationReport) -> None:
    """Write REPORT/report.json, report.md and, with matplotlib, curves.png."""
    plotted = _plot(folder / CURVES, report)
    write_file(folder / "report.json", json.dumps(report.to_dict(), indent=1).encode() + b"\n")
    write_file(folder / "report.md", _page(report, plotted).encode())


def _page(report: ValidationReport, plotted: bool) -> str:
    what = f"Sabotage: {report.sabotage}" if report.sabotage else "Validation"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    ran = (
        f"{counted(report.nproc, 'rank')}, {counted(report.steps, 'step')}, stopped and resumed at step"
        f" {report.stopped_at}, {report.seconds:.0f} s"
    )
    lines = [f"# {what}: {'passed' if report.passed else 'FAILED'}", "", f"`{report.model}` on {ran}. {versions}.", ""]
    lines += ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    by_row: dict[str, dict[str, Cell]] = {}
    for cell in report.cells:
        by_row.setdefault(cell.row, {})[cell.column] = cell
    for name, cells in by_row.items():
        first = next(iter(cells.values()))
        marks = [MARKS[cells[column].passed] if column in cells else "" for column in COLUMNS]
        lines.append(f"| {name} ({first.layout}) | " + " | ".join(marks) + " |")
    if plotted:
        lines += ["", f"![Losses of the runs]({CURVES})"]
    lines += ["", "## What was compared", ""]
    for cell in report.cells:
        lines += [f"### {MARKS[cell.passed]} {cell.name}", "", f"Level: {cell.level}. {cell.seconds:.1f} s.", ""]
        lines += [f"- {key}: {_text(value)}" for key, value in cell.evidence.items()]
        lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if value else "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plot(path: Path, report: ValidationReport) -> bool:
    """Draw the curves, one panel for each row; return False if there is nothing to draw or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        report.warnings.append("curves.png needs matplotlib: pip install 'dsconv-toolkit[plot]'")
        return False
    count = len(report.curves)
    if not count:
        return False
    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    styles = [
        ("black", "-", 2.4, None),
        ("tab:orange", "--", 1.6, "o"),
        ("tab:blue", ":", 1.6, "s"),
        ("tab:green", "-.", 1.4, "^"),
    ]
    for panel, (row, curves) in zip(panels, report.curves.items(), strict=False):
        for (name, losses), (colour, line, width, marker) in zip(curves.items(), styles, strict=False):
            steps = range(1, len(losses) + 1)
            panel.plot(
                steps, losses, color=colour, linestyle=line, linewidth=width, marker=marker, markersize=4, label=name
            )
        panel.axvline(report.stopped_at + 0.5, color="grey", linewidth=0.8)
        panel.set_title(row, fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower left")
    for panel in panels[count:]:
        panel.set_visible(False)
    figure.suptitle(
        "Losses. The vertical line marks where runs were stopped. The uninterrupted run and the one resumed in place"
        " have dropout, the others have none.",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


@dataclass
class Cell:
    """The result of one row and column. ``passed`` is None if the column does not apply; ``evidence`` says why."""

    name: str
    row: str
    column: str
    layout: str
    dtype: str
    passed: bool | None
    level: str
    evidence: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class ValidationReport:
    """What was run, and the results.

    ``sabotage`` is the fault that was injected, if any; the field keeps the name that report.json has always had.
    ``curves`` maps row to run to losses, for the picture; ``references`` has the losses that
    each of these runs is compared with.
    """

    model: str
    nproc: int
    steps: int
    stopped_at: int
    sabotage: str | None
    passed: bool
    cells: list[Cell]
    curves: dict[str, dict[str, list[float]]]
    versions: dict[str, str]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    references: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
