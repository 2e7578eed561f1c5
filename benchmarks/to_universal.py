"""Compare making universal checkpoints with dsconv, with DeepSpeed's own tool, and with ``cp`` of the output.

    python -m benchmarks.to_universal --size 0.1

Each round runs every command once, one after the other, on the same ZeRO-3 checkpoint of two ranks. Between two
commands, outside the timing, the output is removed and everything is synced. The reported ratios are medians of the
ratios in each round, so that a slow minute of the machine affects both sides. The official tool runs with its default
numbers of workers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import Run, machine, measure, median
from benchmarks.train_llama import checkpoint

OFFICIAL, COPY, COPY_SYNC = "ds_to_universal", "cp", "cp + sync -f"
DSCONV, DSCONV_SYNC = "dsconv --no-fsync", "dsconv"
COMPARED = (  # measured, compared with, goal
    (DSCONV, OFFICIAL, "goal: at least 8 times as fast"),
    (DSCONV, COPY, "the limit"),
    (DSCONV_SYNC, COPY_SYNC, "the limit"),
)


def commands(source: Path, made: Path, target: Path) -> dict[str, list[str]]:
    """Return the commands to time. ``cp`` copies ``made``, an output of dsconv; every command writes to ``target``."""
    tag = source / (source / "latest").read_text().strip()
    dsconv = [sys.executable, "-m", "dsconv", "to-universal", str(source), str(target), "--quiet"]
    official = ["--input_folder", str(tag), "--output_folder", str(target), "--inject_missing_state"]
    return {
        OFFICIAL: [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *official],
        COPY: ["cp", "-r", str(made), str(target)],
        DSCONV: [*dsconv, "--no-fsync"],
        COPY_SYNC: ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(made), str(target)],
        DSCONV_SYNC: dsconv,
    }


def run_rounds(source: Path, folder: Path, rounds: int) -> tuple[dict[str, list[Run]], int]:
    """Return the runs of each command, and the number of bytes that dsconv writes."""
    work = folder / "universal"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    made, target = work / "made", work / "target"
    todo = commands(source, made, target)
    _checked([str(made) if part == str(target) else part for part in todo[DSCONV]])
    for link in made.glob("mp_rank_*"):  # a second name of a file, which cp would copy again
        link.unlink()
    written = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for number in range(rounds + 1):  # the first round only warms the page cache
        for name, command in todo.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            run = _checked(command)
            if number:
                runs[name].append(run)
    shutil.rmtree(work)
    return runs, written


def _checked(command: list[str]) -> Run:
    run = measure(command, {"DS_ACCELERATOR": "cpu"})
    if run.code:
        raise click.ClickException(f"exit code {run.code} of {' '.join(command)}\n{run.output}")
    return run


def summary(source: Path, size: float, runs: dict[str, list[Run]], written: int) -> dict[str, Any]:
    ratios = {
        f"{one} / {other}": round(
            median([a.seconds / b.seconds for a, b in zip(runs[one], runs[other], strict=True)]), 3
        )
        for one, other, _ in COMPARED
    }
    return {
        "size": size,
        "checkpoint_bytes": sum(file.stat().st_size for file in source.rglob("*.pt")),
        "output_bytes": written,
        "median_seconds": {name: round(median([run.seconds for run in of]), 3) for name, of in runs.items()},
        "seconds": {name: [round(run.seconds, 3) for run in of] for name, of in runs.items()},
        "peak_anonymous_mb": {name: round(median([run.peak_bytes for run in of]) / 1e6) for name, of in runs.items()},
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    click.echo(
        f"\n{result['checkpoint_bytes'] / 1e9:.2f} GB of checkpoint, {result['output_bytes'] / 1e9:.2f} GB of universal"
        " checkpoint"
    )
    for name, seconds in result["median_seconds"].items():
        spread = f"{min(result['seconds'][name]):.2f} to {max(result['seconds'][name]):.2f}"
        click.echo(f"  {name:20} {seconds:6.2f} s  ({spread})  {result['peak_anonymous_mb'][name]:6,} MB")
    for one, other, goal in COMPARED:
        ratio = result["ratios"][f"{one} / {other}"]
        text = f"{1 / ratio:.1f} times as fast as" if other == OFFICIAL else f"{ratio:.2f} of"
        click.echo(f"  {one}: {text} {other} ({goal})")


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
    default=(0.1, 0.4),
    show_default=True,
    help="In 10⁹ parameters, as train_llama.py lists them; may be given again.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of tables.")
def main(folder: Path, sizes: tuple[float, ...], rounds: int, as_json: bool) -> None:
    """Time dsconv, DeepSpeed's own tool and cp on the same checkpoints, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for size in sizes:
        click.echo(f"{size:g} B: training or finding the checkpoint, then {rounds} rounds", err=True)
        source = checkpoint(folder, size)
        results.append(summary(source, size, *run_rounds(source, folder, rounds)))
        if not as_json:
            show(results[-1])
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))


if __name__ == "__main__":
    main()
