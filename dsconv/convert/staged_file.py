"""A file of an output that is being written: positioned writes, write-back, and one sync at the end."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

from dsconv.errors import OutputError

SYNC_FILE_RANGE_WRITE = 2  # from linux/fs.h: start the write-back, do not wait
# The page cache is filled in folios as large as a write allows, and where memory is fragmented the system first
# compacts it for the largest: 8 MB writes took 0.2 to 1.1 s for 1.4 GB here (Linux 6.18, ext4), 256 KB ones 0.22 to 0.3
# s.
WRITE_BYTES = 256 << 10


class StagedFile:
    """A file in the hidden folder. Without ``keep_open`` its descriptor is opened for each write."""

    def __init__(self, path: Path, open_file: Callable[[int], int], nbytes: int, keep_open: bool, sync: bool) -> None:
        self._path = path  # for messages
        self._open = open_file  # by flags
        self._nbytes = nbytes
        self._keep_open = keep_open
        self._sync = sync
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._rest: Iterable[tuple[int, bytes]] = ()

    def begin(self, head: bytes, rest: Iterable[tuple[int, bytes]] = ()) -> None:
        """Make the file, of its full size, with the bytes that it begins with. Raises OutputError."""
        self._rest = rest
        try:
            descriptor = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._descriptor = descriptor
            os.truncate(descriptor, self._nbytes)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be created with {self._nbytes} bytes: {error.strerror}") from None
        if head:
            write_at(descriptor, memoryview(head), 0)
        if not self._keep_open:
            self.close()

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Write all of ``data`` at ``offset_bytes`` of the file. Raises OutputError."""
        if self._descriptor is not None:
            write_at(self._descriptor, data, offset_bytes)
        else:
            with self._opened() as descriptor:
                write_at(descriptor, data, offset_bytes)

    def start_writeback(self) -> None:
        """Let the system start writing to disk what was written so far, without waiting for it."""
        with self._lock:
            if self._descriptor is not None:
                _sync_file_range()(self._descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)

    def finish(self) -> None:
        """Write what is no tensor's, sync the file, and close it. Raises OutputError or OSError."""
        with contextlib.nullcontext(self._descriptor) if self._descriptor is not None else self._opened() as descriptor:
            for offset, data in self._rest:
                write_at(descriptor, memoryview(data), offset)
            if self._sync:
                os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = self._open(os.O_RDWR)
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot be opened for writing: {error.strerror}; no output was kept"
            ) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@functools.cache
def _sync_file_range() -> Callable[..., object]:
    """Return Linux's ``sync_file_range``; elsewhere, a function that does nothing."""
    import ctypes

    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return lambda *args: None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast(Callable[..., object], function)


def write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    """Write all of ``data``.

    Raises:
        OutputError: the disk is full, or fails.
    """
    while len(data):
        try:
            count = os.pwrite(descriptor, data[:WRITE_BYTES], offset_bytes)
        except OSError as error:
            raise OutputError(f"writing the output failed: {error.strerror}; nothing was kept") from None
        data, offset_bytes = data[count:], offset_bytes + count
