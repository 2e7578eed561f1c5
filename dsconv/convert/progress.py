"""Counting bytes while they are copied or checked."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]


class ProgressCounter:
    """Counts bytes from any thread and tells ``report`` of them, as (phase, bytes done, bytes in all)."""

    def __init__(self, phase: str, total_bytes: int, report: Progress | None) -> None:
        self.done_bytes = 0
        self._phase = phase
        self._total_bytes = total_bytes
        self._report = report
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more."""
        with self._lock:
            self.done_bytes += nbytes
            done = self.done_bytes
        if self._report is not None:
            self._report(self._phase, done, self._total_bytes)
