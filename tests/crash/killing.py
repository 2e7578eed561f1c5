"""Run one job in its own process, in which one call goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from dsconv.errors import DsconvError
from tests.crash.faults import Faults
from tests.crash.jobs import Broken, Job

DONE, REFUSED, FAILED = 0, 3, 70


def run_with(job: Job, at: int, fault: Callable[[str, Callable[..., Any]], Any]) -> tuple[int, str]:
    """Fork, and let ``fault`` happen at call number ``at`` of the run. Returns (exit code or minus the signal, the
    report).

    The report is the list of calls of an undisturbed run as JSON, or the message of its DsconvError.
    """
    end, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, said = FAILED, ""
        say = os.write
        with contextlib.suppress(BaseException):
            faults = Faults(at, fault)
            faults.install()
            try:
                job.run()
                code, said = DONE, json.dumps(faults.kinds)
            except DsconvError as error:
                code, said = REFUSED, str(error)
            except BaseException:  # noqa: BLE001 - reported to the parent
                said = traceback.format_exc()
            for start in range(0, len(said), 4096):
                say(begin, said[start : start + 4096].encode())
        os._exit(code)
    os.close(begin)
    with os.fdopen(end, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def calls_of(job: Job) -> list[str]:
    """Return the kinds of all calls that an undisturbed run makes, in order."""
    job.prepare()
    code, said = run_with(job, 0, lambda kind, call: call())
    if code != DONE:
        raise Broken(f"an undisturbed run ended with {code}: {said}")
    kinds: list[str] = json.loads(said)
    return kinds


def killed(job: Job, at: int, how: Callable[[str, Callable[..., Any]], Any], again: int | None = None) -> str:
    """Kill the run at a call, and the next run at ``again`` if given; then run to the end.

    Returns the state in between. Raises Broken if a promise is broken.
    """
    job.prepare()
    for number in (at, again):
        if number is None:
            continue
        code, said = run_with(job, number, how)
        if code != -signal.SIGKILL and not (number == again and code in (DONE, REFUSED)):  # it may end before that call
            raise Broken(f"it was not killed: {code}, {said[:200]}")
        state = job.state()
    job.recover(state)
    return state


def failed(job: Job, at: int, kind: str, how: Callable[[str, Callable[..., Any]], Any]) -> str:
    """Let one call fail: the run either reports it and removes its files, or does without it and its output is whole.

    Returns ``refused`` or ``done``. Raises Broken if a promise is broken. The next run removes what this one could not.
    """
    job.prepare()
    code, said = run_with(job, at, how)
    if code not in (DONE, REFUSED):
        raise Broken(f"ended with {code}: {said[-500:]}")
    state = job.state()
    if code == DONE and state != "new":
        raise Broken(f"said to be done, and the target is {state}")
    hidden = [str(path) for path in job.home.rglob("*") if "dsconv-" in path.name]
    if hidden and kind not in ("unlink", "rmdir") and not job.kind.in_parts:
        raise Broken(f"a run that failed left {hidden}: {said[:200]}")
    job.recover(state)
    return "done" if code == DONE else "refused"
