"""Keeping the disk busy while a copy runs, so that the sync at its end has little left to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

FLUSH_BYTES = 64 << 20


class Flusher:
    """A context in which a thread syncs the files whenever FLUSH_BYTES more have been written; with ``on`` False it does nothing."""

    def __init__(self, descriptors: list[int], written: Callable[[], int], on: bool) -> None:
        self._descriptors = descriptors
        self._written = written
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if on else None

    def _run(self) -> None:
        flushed = 0
        while not self._end.wait(0.02):
            if self._written() - flushed >= FLUSH_BYTES:
                flushed = self._written()
                for descriptor in self._descriptors:
                    os.fdatasync(descriptor)

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
