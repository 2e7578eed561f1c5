"""Compare merging DCP checkpoints with dsconv, with torch's and accelerate's tools, and with ``cp``.

    python -m benchmarks.dcp_merge

Three checkpoints of the same bf16 Llama, saved by two ranks: cut by rows (FSDP2), by columns (row-parallel TP), and by
rows in the safetensors of DCP's HuggingFaceStorageWriter. Each round runs every command once, one after the other.
Between two commands, outside the timing, the output is removed and everything is synced. The reported ratios are
medians of the ratios in each round.
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
from benchmarks.shard_llama import KINDS, LAYERS, checkpoint

TORCH, ACCELERATE, CONSOLIDATE, COPY, DSCONV = (
    "dcp_to_torch_save",
    "accelerate merge-weights",
    "torch's consolidation",
    "cp",
    "dsconv --no-fsync",
)
GOALS = {TORCH: 5.0, ACCELERATE: 5.0, COPY: 1 / 1.6}  # how many times faster dsconv should be
MAX_ANONYMOUS_BYTES = 300e6
CONSOLIDATE_CODE = """
import sys
from pathlib import Path
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
names = {}
for path in Path(sys.argv[1]).glob("*.safetensors"):
    with safe_open(path, framework="pt") as file:
        names.update(dict.fromkeys(file.keys(), 1))
Path(sys.argv[2]).mkdir()
consolidate_safetensors_files(sys.argv[1], sys.argv[2], names, num_threads=len(__import__("os").sched_getaffinity(0)))
"""


def commands(source: Path, kind: str, merged: Path, target: Path) -> dict[str, list[str]]:
    """Return the commands to time. ``cp`` copies ``merged``, an output of dsconv; each command writes ``target``."""
    tools = Path(sys.executable)
    dsconv = [str(tools.with_name("dsconv")), "merge", str(source), str(target), "--quiet", "--no-fsync"]
    rivals = {
        TORCH: [
            sys.executable,
            "-m",
            "torch.distributed.checkpoint.format_utils",
            "dcp_to_torch",
            str(source),
            str(target),
        ],
        ACCELERATE: [str(tools.with_name("accelerate")), "merge-weights", str(source), str(target)],
    }
    if kind == "hf":
        rivals = {CONSOLIDATE: [sys.executable, "-c", CONSOLIDATE_CODE, str(source), str(target)]}
    return {**rivals, COPY: ["cp", "-r", str(merged), str(target)], DSCONV: dsconv}


def run_rounds(source: Path, kind: str, folder: Path, rounds: int) -> dict[str, list[Run]]:
    merged, target = folder / "merged", folder / "target"
    _remove(merged)
    todo = commands(source, kind, merged, target)
    _checked([*todo[DSCONV][:3], str(merged), "--quiet"])
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for number in range(rounds + 1):  # the first round only warms the page cache
        for name, command in todo.items():
            _remove(target)
            os.sync()
            run = _checked(command)
            if number:
                runs[name].append(run)
    _remove(target)
    _remove(merged)
    return runs


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checked(command: list[str]) -> Run:
    run = measure(command)
    if run.code:
        raise click.ClickException(f"exit code {run.code} of {' '.join(command)}\n{run.output}")
    return run


def summary(source: Path, kind: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    inspected = [
        measure([str(Path(sys.executable).with_name("dsconv")), "inspect", str(source), "--json"]) for _ in range(5)
    ]
    found = json.loads(inspected[0].output)
    return {
        "kind": kind,
        "parameters": found["parameters"],
        "output_bytes": found["bytes"],
        "open_seconds": round(median([run.seconds for run in inspected]), 3),
        "median_seconds": {name: round(median([run.seconds for run in of]), 3) for name, of in runs.items()},
        "seconds": {name: [round(run.seconds, 3) for run in of] for name, of in runs.items()},
        "peak_anonymous_mb": {name: round(median([run.peak_bytes for run in of]) / 1e6) for name, of in runs.items()},
        "times_as_fast_as": {
            name: round(median([a.seconds / b.seconds for a, b in zip(of, runs[DSCONV], strict=True)]), 3)
            for name, of in runs.items()
            if name != DSCONV
        },
    }


def show(result: dict[str, Any]) -> None:
    click.echo(
        f"\n{result['kind']}: {result['parameters'] / 1e6:,.0f} M parameters, {result['output_bytes'] / 1e9:.2f} GB of"
        f" bf16 weights; dsconv inspect takes {result['open_seconds']:.2f} s"
    )
    for name, seconds in result["median_seconds"].items():
        spread = f"{min(result['seconds'][name]):.2f} to {max(result['seconds'][name]):.2f}"
        click.echo(f"  {name:26} {seconds:6.2f} s  ({spread})  {result['peak_anonymous_mb'][name]:6,} MB")
    for name, times in result["times_as_fast_as"].items():
        goal = f" (goal: {GOALS[name]:.3g})" if name in GOALS else ""
        click.echo(f"  {DSCONV}: {times:.2f} times as fast as {name}{goal}")
    mb = result["peak_anonymous_mb"][DSCONV]
    click.echo(f"  {DSCONV}: {mb} MB of anonymous memory (goal: at most {MAX_ANONYMOUS_BYTES / 1e6:.0f})")


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
    type=click.Choice([str(size) for size in LAYERS]),
    default="0.8",
    show_default=True,
    help="In 10⁹ parameters.",
)
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of tables.")
def main(folder: Path, size: str, kinds: tuple[str, ...], rounds: int, as_json: bool) -> None:
    """Time dsconv, the tools of torch and accelerate, and cp on the same checkpoints, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for kind in kinds:
        click.echo(f"{kind}: saving or finding the checkpoint, then {rounds} rounds", err=True)
        source = checkpoint(folder, float(size), kind)
        results.append(summary(source, kind, run_rounds(source, kind, folder, rounds)))
        if not as_json:
            show(results[-1])
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))


if __name__ == "__main__":
    main()
