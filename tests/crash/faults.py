"""Count every Python call that changes a file, and let one of them fail, without changing the code under test.

``open`` and functions of ``os`` are replaced in a process that is forked for one fault and ends with it.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

WRITES = ("pwrite", "write")
CALLS = (
    *WRITES,
    "open",
    "truncate",
    "ftruncate",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "link",
    "symlink",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
)
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Faults:
    """Count the calls by number and kind, and run ``fault(kind, call)`` in place of call number ``at`` (from 1).

    If the call is a write, the given ``call`` writes only the first half.
    """

    def __init__(self, at: int, fault: Callable[[str, Callable[..., Any]], Any]) -> None:
        self.at = at
        self.fault = fault
        self.kinds: list[str] = []
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        real = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            made = self.count("open", lambda: real(file, mode, *args, **kwargs))
            return Written(made, self)

        builtins.open = io.open = opened

    def count(self, kind: str, call: Callable[..., Any], data: Any = None) -> Any:
        with self._lock:
            self.kinds.append(kind)
            now = len(self.kinds) == self.at
        if now:
            return self.fault(kind, call if data is None else lambda: call(data[: len(data) // 2 or 1]))
        return call() if data is None else call(data)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & CHANGING:
                return real(*args, **kwargs)
            if name in WRITES:
                return self.count(name, lambda part: real(args[0], part, *args[2:]), args[1])
            return self.count(name, lambda: real(*args, **kwargs))

        return counted


class Written:
    """A file from ``open`` whose writes are counted and not buffered."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def write(self, data: Any) -> int:
        count: int = self._faults.count("write", self._write, data)
        return count

    def _write(self, data: Any) -> int:
        count: int = self._file.write(data)
        self._file.flush()
        return count

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def kill(kind: str, call: Callable[..., Any]) -> None:
    """End the process as a crash of the machine or the out-of-memory killer does, without running any handler."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_halfway(kind: str, call: Callable[..., Any]) -> None:
    """Kill the process in the middle of a write, or right after another call."""
    try:
        call()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[str, Callable[..., Any]], Any]:
    """Return a fault that raises errno ``number``, such as ENOSPC or EIO."""

    def fail(kind: str, call: Callable[..., Any]) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def short(kind: str, call: Callable[..., Any]) -> Any:
    """Write less than was given, as happens with a nearly full disk or a signal. This is legal and no error."""
    return call()


ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
