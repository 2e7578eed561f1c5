"""Draw an estimate: what each setting holds, in stacked bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.errors import UnsupportedError, require_packages
from dsconv.zero_utils.estimate import Report

PARTS = {
    "parameters": "#4477aa",
    "optimizer": "#228833",
    "gradients": "#ccbb44",
    "buffers": "#bbbbbb",
    "activations": "#ee6677",
}
STEP = "#aa3377"
GB = 1e9


def draw(report: Report, path: Path) -> None:
    """Draw one bar for each setting, of a GPU at its fullest moment.

    Raises:
        MissingPackageError: matplotlib is not installed.
        UnsupportedError: matplotlib does not know the suffix of ``path``.
    """
    require_packages("--plot", "plot", "matplotlib")
    from matplotlib.figure import Figure

    rows = report.rows[::-1]
    figure = Figure(figsize=(9, 1.8 + 0.27 * len(rows)), layout="constrained")
    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise UnsupportedError(
            f"{path}: matplotlib does not write such pictures: give a name that ends in .png, .svg or .pdf"
        )
    axes = figure.subplots()
    for place, row in enumerate(rows):
        stepping = row.held.step > row.held.gradients + row.held.buffers + row.held.activations
        left = 0.0
        for part in ("parameters", "optimizer") if stepping else PARTS:
            width = getattr(row.held, part) / GB
            axes.barh(place, width, left=left, color=PARTS[part], height=0.75)
            left += width
        if stepping:
            axes.barh(place, row.held.step / GB, left=left, color=STEP, height=0.75)
        end = max(row.held.peak, row.ideal) / GB
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7, "bbox": box}
        axes.annotate(f"{row.held.peak / GB:.1f}", (end, place), (5, 0), **style)
        axes.plot(row.ideal / GB, place, marker="d", markersize=4, color="black", linestyle="none")
    axes.set_yticks(range(len(rows)), [str(row.setting) for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    if report.fit is not None:
        axes.get_yticklabels()[len(rows) - 1 - report.rows.index(report.fit)].set_fontweight("bold")
    if report.limit is not None:
        axes.axvline(report.limit / GB, color="black", linestyle="--", linewidth=1)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("GB of a GPU at its fullest moment")
    job = report.job
    batch = f"{job.micro_batch} × {job.seq_len} tokens per rank" if report.model.decoder else "without activations"
    axes.set_title(
        f"{report.model.name}: {report.model.numel / 1e9:.2f} B parameters, {job.world} GPUs, {job.dtype}, {batch}",
        fontsize=10,
    )
    _legend(figure, report.limit)
    figure.savefig(path, dpi=130)


def _legend(figure: Any, limit: int | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=part) for part, colour in PARTS.items()]
    handles.append(Patch(color=STEP, label="gradients at the step"))
    handles.append(
        Line2D([], [], marker="d", markersize=4, color="black", linestyle="none", label="ZeRO paper's ideal")
    )
    if limit is not None:
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"--fit {limit / GB:g} GB"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
