"""Measure one run of a command, and take medians: the code that the benchmarks share.

The whole process tree of a command is measured from outside: its wall time, and the peak of its anonymous memory
(sampled ``RssAnon`` of all its processes), which is what it needs beyond the page cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.005


@dataclass
class Run:
    """One run of a command. ``peak_bytes`` is the peak of the process tree's anonymous memory."""

    seconds: float
    peak_bytes: int
    code: int
    output: str


def measure(command: Sequence[str], env: dict[str, str] | None = None) -> Run:
    """Run ``command`` to its end and sample the anonymous memory of its process tree."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(env or {})},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(anonymous_bytes(pid) for pid in _tree(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    assert process.stdout is not None
    return Run(seconds, peak, process.returncode, process.stdout.read())


def _tree(pid: int) -> list[int]:
    pids = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                pids += _tree(int(child))
    except OSError:
        pass
    return pids


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory that a process uses now, or 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """Describe the machine in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory, Linux {os.uname().release.split('-')[0]}"
