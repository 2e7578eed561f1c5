"""Compare merging a ZeRO checkpoint with dsconv, with DeepSpeed's script, and with ``cp``, at several sizes.

    python -m benchmarks.zero_to_fp32 --plot docs/zero_to_fp32.svg

Each round runs every command once, one after the other, on the same ZeRO-3 checkpoint of two ranks. Between two
commands, outside the timing, the output is removed, everything is synced, and the disk gets a moment of rest. Each
round begins with a different command, since a disk that has just taken several gigabytes takes the next ones more
slowly. The reported ratios are medians of the ratios in each round, so that a slow minute of the machine affects both
sides.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import Run, machine, measure, median
from benchmarks.train_llama import checkpoint

OFFICIAL, COPY, COPY_SYNC = "official script", "cp", "cp + sync -f"
DSCONV, DSCONV_SYNC, DSCONV_BF16 = "dsconv --no-fsync", "dsconv", "dsconv --no-fsync --dtype bf16"
SETTLE_SECONDS = 0.5
GOALS = (  # measured, compared with, goal
    (DSCONV, OFFICIAL, "at least 5 times as fast"),
    (DSCONV, COPY, "at most 1.6"),
    (DSCONV_SYNC, COPY_SYNC, "at most 1.2"),
    (DSCONV_BF16, DSCONV, "at most 1.1"),
)


def commands(source: Path, merged: Path, target: Path) -> dict[str, list[str]]:
    """Return the commands to time. ``cp`` copies ``merged``, an output of dsconv; each command writes ``target``."""
    dsconv = [str(Path(sys.executable).with_name("dsconv")), "zero-to-fp32", str(source), str(target), "--quiet"]
    copy = ["cp", "-r", str(merged), str(target)]
    return {
        OFFICIAL: [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(source), str(target)],
        COPY: copy,
        DSCONV: [*dsconv, "--no-fsync"],
        COPY_SYNC: ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(merged), str(target)],
        DSCONV_SYNC: dsconv,
        DSCONV_BF16: [*dsconv, "--no-fsync", "--dtype", "bf16"],
    }


def run_rounds(source: Path, folder: Path, rounds: int) -> dict[str, list[Run]]:
    merged, target = folder / "merged", folder / "target"
    shutil.rmtree(merged, ignore_errors=True)
    todo = commands(source, merged, target)
    _checked([*todo[DSCONV][:3], str(merged), "--quiet", "--force"])
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for number in range(rounds + 1):  # the first round only warms the page cache
        names = list(todo)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            time.sleep(SETTLE_SECONDS)
            run = _checked(todo[name])
            if number:
                runs[name].append(run)
    shutil.rmtree(target)
    shutil.rmtree(merged)
    return runs


def _checked(command: list[str]) -> Run:
    run = measure(command, {"DS_ACCELERATOR": "cpu"})
    if run.code:
        raise click.ClickException(f"exit code {run.code} of {' '.join(command)}\n{run.output}")
    return run


def summary(source: Path, size: float, runs: dict[str, list[Run]]) -> dict[str, Any]:
    inspected = [
        measure([str(Path(sys.executable).with_name("dsconv")), "inspect", str(source), "--json"]) for _ in range(5)
    ]
    found = json.loads(inspected[0].output)
    ratios = {
        f"{one} / {other}": round(
            median([a.seconds / b.seconds for a, b in zip(runs[one], runs[other], strict=True)]), 3
        )
        for one, other, _ in GOALS
    }
    return {
        "size": size,
        "parameters": found["parameters"],
        "checkpoint_bytes": sum(file.stat().st_size for file in source.rglob("*.pt")),
        "output_bytes": found["bytes"],
        "open_seconds": round(median([run.seconds for run in inspected]), 3),
        "median_seconds": {name: round(median([run.seconds for run in of]), 3) for name, of in runs.items()},
        "seconds": {name: [round(run.seconds, 3) for run in of] for name, of in runs.items()},
        "peak_anonymous_mb": {name: round(median([run.peak_bytes for run in of]) / 1e6) for name, of in runs.items()},
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    click.echo(
        f"\n{result['parameters'] / 1e6:,.0f} M parameters: {result['checkpoint_bytes'] / 1e9:.2f} GB of checkpoint, "
        f"{result['output_bytes'] / 1e9:.2f} GB of fp32 weights; dsconv inspect takes {result['open_seconds']:.2f} s"
    )
    for name, seconds in result["median_seconds"].items():
        spread = f"{min(result['seconds'][name]):.2f} to {max(result['seconds'][name]):.2f}"
        click.echo(f"  {name:32} {seconds:6.2f} s  ({spread})  {result['peak_anonymous_mb'][name]:6,} MB")
    for one, other, goal in GOALS:
        ratio = result["ratios"][f"{one} / {other}"]
        text = f"{1 / ratio:.1f} times as fast as" if other == OFFICIAL else f"{ratio:.2f} of"
        click.echo(f"  {one}: {text} {other} (goal: {goal})")


def draw(results: list[dict[str, Any]], where: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(
        {"svg.hashsalt": "dsconv", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    colors = {OFFICIAL: "#b5482f", DSCONV: "#1f6f8b", COPY: "#8a8a8a"}
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    x = [result["parameters"] / 1e6 for result in results]
    for axes, key, unit, names in (
        (time_axes, "median_seconds", "seconds", (OFFICIAL, DSCONV, COPY)),
        (memory_axes, "peak_anonymous_mb", "MB of anonymous memory at the peak", (OFFICIAL, DSCONV)),
    ):
        for name in names:
            y = [result[key][name] for result in results]
            axes.plot(
                x, y, marker="o", markersize=4, color=colors[name], linestyle="--" if name == COPY else "-", label=name
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:,.0f}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel("millions of parameters")
        axes.set_ylabel(unit)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.legend(frameon=False, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.3, high * 2.5)  # room for the legend
    figure.suptitle(f"ZeRO-3, 2 ranks, to fp32 safetensors, nothing synced. {where}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    click.echo(f"\ndrew {path}")


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("bench"),
    show_default=True,
    help="Checkpoints are kept here.",
)
@click.option(
    "--size",
    "sizes",
    type=click.FloatRange(0.1, 2),
    multiple=True,
    default=(0.1, 0.4, 1.0),
    show_default=True,
    help="In 10⁹ parameters, as train_llama.py lists them; may be given again.",
)
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw time and memory against size.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of tables.")
def main(folder: Path, sizes: tuple[float, ...], rounds: int, plot: Path | None, as_json: bool) -> None:
    """Time dsconv, DeepSpeed's own script and cp on the same checkpoints, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for size in sizes:
        click.echo(f"{size:g} B: training or finding the checkpoint, then {rounds} rounds", err=True)
        source = checkpoint(folder, size)
        results.append(summary(source, size, run_rounds(source, folder, rounds)))
        if not as_json:
            show(results[-1])
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))
    if plot:
        draw(results, machine(), plot)


if __name__ == "__main__":
    main()
