"""Draw the loss and gradient norm of a run over its steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dsconv.engine.files import write_file
from dsconv.errors import OutputError
from dsconv.text import count


def plot_run(run: Path, lines: list[dict[str, Any]], warnings: list[str]) -> str | None:
    """Draw RUN/loss.png and return its path; without matplotlib add a warning and return None."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        warnings.append("loss.png needs matplotlib: pip install 'dsconv-toolkit[plot]'")
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line["loss"] for line in lines], color="tab:blue", label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color="tab:blue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    norms = [line["grad_norm"] for line in lines if line.get("grad_norm") is not None]
    if len(norms) == len(lines):
        other = axes.twinx()
        other.plot(steps, norms, color="tab:orange", linewidth=0.8, alpha=0.8)
        other.set_ylabel("gradient norm", color="tab:orange")
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.set_title(f"{run.name}: {count(len(lines), 'step')}, loss {lines[-1]['loss']:.4f}")
    path = run / "loss.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    try:
        write_file(path, picture.getvalue())
    except OutputError as error:  # the run itself is whole
        warnings.append(str(error))
        return None
    return str(path)
