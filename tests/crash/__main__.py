"""``python -m tests.crash``: kill a run at every call that changes the disk, let every such call fail, and count."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tests.crash.faults import ERRORS, failing, kill, kill_halfway, short
from tests.crash.jobs import KINDS, Broken, Job
from tests.crash.killing import calls_of, failed, killed
from tests.fixtures import gloo
from tests.trained import Trained

NEW_CASE, OLD_CASE = "llama_tied-z3-bf16-w3", "llama_tied-z3-fp32-w1"
RAM_DISK = Path("/dev/shm")
Point = tuple[str, str, Callable[[], str]]


def points(job: Job, calls: list[str], seed: int) -> Iterator[Point]:
    """Return each point as (the fault, the kind of call, a function that runs it and returns the outcome)."""
    chosen = random.Random(seed)
    for at, kind in enumerate(calls, 1):
        yield "killed before", kind, lambda at=at: killed(job, at, kill)  # type: ignore[misc]
        yield "killed in the middle or after", kind, lambda at=at: killed(job, at, kill_halfway)  # type: ignore[misc]
        again = chosen.randint(1, len(calls))
        yield "killed, and the next run too", kind, lambda at=at, again=again: killed(job, at, kill, again)  # type: ignore[misc]
        for name, number in ERRORS.items():
            yield name, kind, lambda at=at, kind=kind, number=number: failed(job, at, kind, failing(number))  # type: ignore[misc]
        if kind == "pwrite":
            yield "short write", kind, lambda at=at: failed(job, at, "pwrite", short)  # type: ignore[misc]


def all_points(folder: Path, seed: int, only: str) -> Iterator[tuple[Job, list[Point]]]:
    made = gloo.ensure("zero", [NEW_CASE, OLD_CASE])
    source, old = Trained(made[NEW_CASE]).checkpoint, Trained(made[OLD_CASE]).checkpoint
    for kind in (kind for kind in KINDS if only in kind.name):
        for older in (None, old):
            job = Job(kind, source, folder / "home", older)
            yield job, list(points(job, calls_of(job), seed))


def spread(found: list[Point], count: int, chosen: random.Random) -> list[Point]:
    """Choose ``count`` points: first one of each kind of fault and call, and those at the end, where files move."""
    seen: Counter[tuple[str, str]] = Counter()
    order = []
    for point in sorted(found, key=lambda _: chosen.random()):
        seen[point[:2]] += 1
        order.append((seen[point[:2]], point))
    return [point for _, point in sorted(order, key=lambda item: item[0])][:count]


@click.command()
@click.option("--count", type=click.IntRange(1), help="Points of each job, of all kinds; else all there are.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", default="", metavar="TEXT", help="Only kinds of output with this in their names.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
def main(count: int | None, seed: int, only: str, as_json: bool) -> None:
    """Kill merge, to-universal and to-dcp, new and over an older output. Exits with 1 if a promise is broken."""
    began = time.monotonic()
    counts: dict[str, dict[str, Counter[str]]] = {}
    failures = 0
    with tempfile.TemporaryDirectory(prefix="dsconv-crash-", dir=RAM_DISK if RAM_DISK.is_dir() else None) as folder:
        for job, found in all_points(Path(folder), seed, only):
            # A run of several parts takes longer, and has most of its code in common with the others.
            few = count and (max(1, count // 3) if job.kind.in_parts else count)
            chosen = found if few is None else spread(found, few, random.Random(f"{job.name}{seed}"))
            of_job = counts.setdefault(job.name, {})
            for fault, kind, happen in chosen:
                try:
                    outcome = happen()
                except Broken as error:
                    failures += 1
                    outcome = "BROKEN"
                    click.echo(f"{job.name}: {fault} {kind}: {error}", err=True)
                of_job.setdefault(fault, Counter())[outcome] += 1
            click.echo(
                f"{job.name}: {len(chosen)} points, {time.monotonic() - began:.0f} s, {failures} broken", err=True
            )
    total = sum(of.total() for of_job in counts.values() for of in of_job.values())
    result: dict[str, Any] = {
        "points": total,
        "broken": failures,
        "counts": counts,
        "seconds": round(time.monotonic() - began),
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        for name, of_job in counts.items():
            for fault, of in of_job.items():
                click.echo(
                    f"{name} | {fault} | {of.total()} | "
                    + ", ".join(f"{n} {outcome}" for outcome, n in sorted(of.items()))
                )
        click.echo(f"{total} points, {failures} broken, {result['seconds']} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
