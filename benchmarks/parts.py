"""Measure what it costs to write an output in parts: on one machine, and to plan one of many parts of a large one.

    python -m benchmarks.parts --size 0.4
    python -m benchmarks.parts --scale

The first compares processes that write all parts at once with one process of as many copying threads in all. The second
writes one of 64 parts of a checkpoint of 1,024 ranks and 100,000 tensors (``benchmarks.scale``), each command in a
process of its own: the seconds until the first byte is copied, the seconds in all, and the peak of its memory (VmHWM).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import machine, median
from benchmarks.scale import make
from benchmarks.train_llama import checkpoint

PROGRAM = """
import json, sys, time
began = time.perf_counter()
import dsconv
first = []
def progress(phase, done, total):
    if not first:
        first.append(time.perf_counter() - began)
convert = getattr(dsconv, sys.argv[1])
report = convert(sys.argv[2], sys.argv[3], part=sys.argv[4], fsync=False, progress=progress)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"plan_seconds": first[0], "seconds": time.perf_counter() - began, "peak_bytes": peak,
                  "cpu_seconds": time.process_time(), "part_bytes": report.part.nbytes}))
"""
CONVERTERS = ("merge", "to_dcp")  # the model states of the sparse checkpoint are empty: no universal one comes of it


def at_once(source: Path, target: Path, parts: int, workers: int) -> float:
    """Return the seconds that ``parts`` processes take which write ``target`` together; one process has no part."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "dsconv", "merge", str(source), str(target), "--no-fsync", "--quiet"]
    each = [*command, "--workers", str(max(1, workers // parts))]
    began = time.perf_counter()
    running = [
        subprocess.Popen(each if parts == 1 else [*each, "--part", f"{number}/{parts}"])
        for number in range(1, parts + 1)
    ]
    codes = [process.wait() for process in running]
    seconds = time.perf_counter() - began
    if any(codes):
        raise click.ClickException(f"{source}: {codes}")
    return seconds


def cost(source: Path, target: Path, counts: tuple[int, ...], workers: int, rounds: int) -> dict[int, float]:
    """Return the median, over rounds, of the seconds that each number of parts takes against one process."""
    ratios: dict[int, list[float]] = {count: [] for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(rounds + 1):  # the first one warms the page cache
        taken = {count: at_once(source, target, count, workers) for count in counts}
        for count in counts if number else ():
            seconds[count].append(taken[count])
            ratios[count].append(taken[count] / taken[1])
    for count in counts:
        took, ratio = median(seconds[count]), median(ratios[count])
        click.echo(f"{count} parts: {took:.2f} s, {ratio:.3f} of one process", err=True)
    return {count: median(ratios[count]) for count in counts}


def one_of_many(source: Path, target: Path, parts: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return, by converter, the medians of writing one part."""
    found = {}
    for converter in CONVERTERS:
        runs = []
        for _ in range(rounds):
            shutil.rmtree(target, ignore_errors=True)
            command = [sys.executable, "-c", PROGRAM, converter, str(source), str(target), f"{parts // 2}/{parts}"]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise click.ClickException(ran.stderr[-2000:])
            runs.append(json.loads(ran.stdout))
        found[converter] = {key: median([run[key] for run in runs]) for key in runs[0]}
        one = found[converter]
        click.echo(
            f"{converter}: {one['plan_seconds']:.1f} s to plan, {one['seconds']:.1f} s in all"
            f" ({one['cpu_seconds']:.1f} s of the processor) for {one['part_bytes'] / 1e6:,.0f} MB,"
            f" {one['peak_bytes'] / 1e6:,.0f} MB of memory",
            err=True,
        )
    return found


@click.command()
@click.option("--size", type=float, default=0.4, show_default=True, help="Billions of weights.")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Copying threads in all.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench"), show_default=True)
@click.option("--scale", is_flag=True, help="One of 64 parts of 1,024 ranks and 100,000 tensors instead.")
@click.option("--ranks", default=1024, show_default=True)
@click.option("--tensors", default=100_000, show_default=True)
def main(size: float, workers: int, rounds: int, folder: Path, scale: bool, ranks: int, tensors: int) -> None:
    """Measure the cost of parts."""
    target = folder / "parts-out"
    if scale:
        source = make(folder / "scale", ranks, tensors, 25_000 * tensors, 3)
        result: Any = one_of_many(source, target, 64, rounds)
    else:
        result = cost(checkpoint(folder, size), target, (1, 2, 4), workers, rounds)
    shutil.rmtree(target, ignore_errors=True)
    click.echo(json.dumps({"machine": machine(), "result": result}, indent=2))


if __name__ == "__main__":
    main()
