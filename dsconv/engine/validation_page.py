"""The page of a validation: the results, and the loss curves with their differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.engine.matrix import COLUMNS
from dsconv.engine.validation_report import MARKS, ValidationReport
from dsconv.page import Page, shown

COLOURS = ("#1b1f24", "#d1570b", "#0a69da", "#1a7f37", "#8250df")


def write_validation_page(path: Path, report: ValidationReport) -> None:
    """Write REPORT/report.html.

    Raises:
        OutputError: The page cannot be written there.
        MissingPackageError: plotly is not installed.
    """
    what = f"Sabotage {shown(report.sabotage)}" if report.sabotage else "Validation"
    page = Page(f"{what}: {'passed' if report.passed else 'FAILED'}", "the validation's page")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    page.table(
        [("", "left"), ("", "left")],
        [
            ("model", report.model),
            ("ranks", str(report.nproc)),
            ("steps", f"{report.steps}, stopped and resumed at step {report.stopped_at}"),
            ("versions", versions),
            ("seconds", f"{report.seconds:.0f}"),
        ],
    )
    rows = []
    for name in dict.fromkeys(cell.row for cell in report.cells):
        found = {cell.column: cell.passed for cell in report.cells if cell.row == name}
        rows.append((name, *(MARKS[found[column]] if column in found else "" for column in COLUMNS)))
    page.table([("", "left"), *((column, "left") for column in COLUMNS)], rows)
    page.problems(
        f"{cell.name}: " + ", ".join(f"{key}: {value}" for key, value in cell.evidence.items())
        for cell in report.cells
        if cell.passed is False
    )
    for row, curves in report.curves.items():
        page.heading(
            f"Losses: {shown(row)}",
            "Below: the difference between each run and the uninterrupted one that it is compared with. The line marks"
            " where runs were stopped.",
        )
        page.figure(_losses(curves, report.references.get(row, {}), report.stopped_at), 480)
    page.write(path)


def _losses(curves: dict[str, list[float]], references: dict[str, list[float]], stopped_at: int) -> Any:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    for number, (name, losses) in enumerate(curves.items()):
        style = {
            "name": shown(name),
            "legendgroup": name,
            "mode": "lines+markers",
            "line": {"color": COLOURS[number % len(COLOURS)], "dash": ("solid", "dash", "dot", "dashdot")[number % 4]},
            "x": list(range(1, len(losses) + 1)),
        }
        figure.add_trace(go.Scatter(y=losses, **style), row=1, col=1)
        if name in references:
            difference = [a - b for a, b in zip(losses, references[name], strict=False)]
            figure.add_trace(go.Scatter(y=difference, showlegend=False, **style), row=2, col=1)
    figure.add_vline(x=stopped_at + 0.5, line_width=1, line_color="#8c959f")
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_yaxes(
        title_text="difference", row=2, col=1, zeroline=True, zerolinecolor="#8c959f", exponentformat="e"
    )
    figure.update_xaxes(title_text="step", row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure
