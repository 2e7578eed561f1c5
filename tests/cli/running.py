"""Run the command line as a user does, in its own process, and collect its streams and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import schemas


@dataclass
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str
    as_json: bool = False

    @property
    def json(self) -> Any:
        """What was printed; with --json, without the name of the schema that it was found to follow."""
        found = json.loads(self.out)
        if self.as_json:
            schemas.check(found)
            del found["schema"]
        return found


def dsconv(*arguments: str | Path, cwd: Path | None = None, python: tuple[str, ...] = (), **environment: str) -> Ran:
    """Run ``dsconv`` with ``arguments``; ``python`` holds options of the interpreter."""
    command = [sys.executable, *python, "-m", "dsconv", *map(str, arguments)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return Ran(result.returncode, result.stdout, result.stderr, "--json" in arguments)


def slow_writes(seconds: float) -> list[str]:
    """Return a dsconv command in which each write takes that much longer, so that a test can act in between."""
    program = f"""
import os, sys, time
real = os.pwrite
def pwrite(*args):
    time.sleep({seconds})
    return real(*args)
os.pwrite = pwrite
from dsconv.cli import main
main(sys.argv[1:])
"""
    return [sys.executable, "-c", program]


def held_writes(release: Path) -> list[str]:
    """Return a dsconv command whose writes wait until the file ``release`` exists."""
    program = f"""
import os, sys, time
real = os.pwrite
def pwrite(*args):
    deadline = time.monotonic() + 120
    while not os.path.exists({str(release)!r}) and time.monotonic() < deadline:
        time.sleep(0.01)
    return real(*args)
os.pwrite = pwrite
from dsconv.cli import main
main(sys.argv[1:])
"""
    return [sys.executable, "-c", program]
