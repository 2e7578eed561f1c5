"""``python -m tests.crash.together``: parts of one output at once, some of which are killed and started again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import dsconv
from dsconv.convert import shares
from dsconv.errors import DsconvError
from tests.crash.__main__ import NEW_CASE, OLD_CASE, RAM_DISK
from tests.crash.faults import Faults, kill, kill_halfway
from tests.crash.jobs import KINDS, NEW, SHARD, Broken, Job
from tests.fixtures import gloo
from tests.trained import Trained

OPTIONS: dict[str, Any] = {"max_shard_size": SHARD}
CONVERTERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "merge in parts": (dsconv.merge, OPTIONS),
    "to-universal in parts": (dsconv.to_universal, {}),
    "to-dcp in parts": (dsconv.to_dcp, OPTIONS),
}
DONE, PLACED, BY_THIS, REFUSED, FAILED = 0, 1, 2, 3, 70


def start(job: Job, number: int, of: int, kill_at: int, halfway: bool) -> int:
    """Write a part in a process of its own, which is killed at a call if ``kill_at`` is one. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    with contextlib.suppress(BaseException):
        Faults(kill_at, kill_halfway if halfway else kill).install()
        convert, options = CONVERTERS[job.kind.name]
        try:
            part = convert(
                job.source, job.target, part=f"{number}/{of}", workers=1, force=job.old is not None, **options
            ).part
            code = BY_THIS if part.by_this else PLACED if part.placed else DONE
        except DsconvError as error:
            sys.stderr.write(f"{error}\n")
            code = REFUSED
    os._exit(code)


def together(job: Job, of: int, seed: int) -> int:
    """Write all parts at once, again and again until none is killed, and return how many were.

    Raises Broken unless the output is absent or the older one as long as a part is missing, and an undisturbed run's at
    the end, which exactly one process put there.
    """
    chosen = random.Random(f"{job.name}{seed}")
    job.prepare()
    waiting, killed, placed = list(range(1, of + 1)), 0, 0
    deadline = time.monotonic() + 120
    while waiting:
        ends = {}
        for number in waiting:
            # Some kinds of output take 20 calls, others 200.
            at = chosen.randint(1, chosen.choice((15, 50, 160))) if killed < 2 * of and chosen.random() < 0.6 else 0
            ends[start(job, number, of, at, chosen.random() < 0.5)] = number
        waiting = []
        for pid, number in ends.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == -signal.SIGKILL:
                killed += 1
                waiting.append(number)
            elif code in (REFUSED, FAILED):
                raise Broken(f"part {number}/{of} ended with {code}")
            placed += code == BY_THIS
        state = job.state()
        if state == NEW and not waiting:
            break
        if time.monotonic() > deadline:
            raise Broken("it does not end")
    if job.state() != NEW or placed > 1:
        raise Broken(f"{job.state()}, put there by {placed}")
    hidden = [str(path) for path in job.home.rglob("*") if "dsconv-" in path.name]
    if hidden:
        raise Broken(f"left behind: {hidden}")
    return killed


@click.command()
@click.option("--kills", default=100, show_default=True, help="Stop once that many processes were killed.")
@click.option("--parts", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, parts: int, seed: int) -> None:
    """Kill parts that run at once, new and over an older output. Exits with 1 if a promise is broken."""
    shares.CUT_BYTES = 64
    made = gloo.ensure("zero", [NEW_CASE, OLD_CASE])
    source, old = Trained(made[NEW_CASE]).checkpoint, Trained(made[OLD_CASE]).checkpoint
    counts: Counter[str] = Counter()
    broken = 0
    with tempfile.TemporaryDirectory(prefix="dsconv-together-", dir=RAM_DISK if RAM_DISK.is_dir() else None) as folder:
        jobs = [
            Job(kind, source, Path(folder) / "home", older) for kind in KINDS if kind.in_parts for older in (None, old)
        ]
        while counts.total() < kills:
            for job in jobs:
                try:
                    counts[job.name] += together(job, parts, seed)
                except Broken as error:
                    broken += 1
                    click.echo(f"{job.name}, seed {seed}: {error}", err=True)
            seed += 1
    for name, count in counts.items():
        click.echo(f"{name}: {count} kills")
    click.echo(f"{counts.total()} kills, {broken} broken")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
