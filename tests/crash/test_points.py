"""Run some points of ``make crash``, of every job, fault and kind of call: 10 s of its 90 minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

COUNT = 12


def test_whole_or_absent_wherever_a_run_is_killed_or_a_call_fails(trained: object) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash", "--count", str(COUNT), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["points"], result["broken"]) == (8 * COUNT + 6 * (COUNT // 3), 0)
    outcomes: Counter[str] = Counter()
    for of_job in result["counts"].values():
        for of_fault in of_job.values():
            outcomes.update(of_fault)
    assert {"absent", "old", "new", "refused", "done"} <= set(outcomes)  # the points reach every outcome
