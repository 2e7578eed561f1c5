"""A file of an output that is being written: positioned writes, write-back, and one sync at the end."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dsconv.errors import OutputError

SYNC_FILE_RANGE_WRITE = 2  # from linux/fs.h: start the write-back, do not wait
# The page cache is filled in folios as large as a write allows, and where memory is fragmented the system first
# compacts it for the largest: 8 MB writes took 0.2 to 1.1 s for 1.4 GB here (Linux 6.18, ext4), 256 KB ones 0.22 to 0.3
# s.
WRITE_BYTES = 256 << 10


@dataclass(frozen=True)
class FileOptions:
    """How a file is written.

    Attributes:
        keep_open: keep one descriptor; else it is opened for each write.
        sync: have the file on disk when it is finished.
        shared: whether other processes write other ranges of it, so that it may be there already.
    """

    keep_open: bool = True
    sync: bool = True
    shared: bool = False


class StagedFile:
    """A file in the hidden folder.

    Args:
        path: where it is, for messages.
        open_file: opens it, with the flags that it is given.
        nbytes: its size.
        options: how it is written.
    """

    def __init__(self, path: Path, open_file: Callable[[int], int], nbytes: int, options: FileOptions) -> None:
        self._path = path
        self._open = open_file  # by flags
        self._nbytes = nbytes
        self._options = options
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._rest: Iterable[tuple[int, bytes]] = ()

    def begin(self, head: bytes, rest: Iterable[tuple[int, bytes]] = ()) -> None:
        """Make the file, of its full size, with the bytes that it begins with. Raises OutputError."""
        self._rest = rest
        shared = self._options.shared
        try:
            descriptor = self._open(os.O_RDWR | os.O_CREAT | (0 if shared else os.O_EXCL))
            self._descriptor = descriptor
            if shared:
                self._require_own(os.fstat(descriptor))
            if not shared or os.fstat(descriptor).st_size != self._nbytes:
                os.truncate(descriptor, self._nbytes)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be created with {self._nbytes} bytes: {error.strerror}") from None
        if head:
            write_at(descriptor, memoryview(head), 0)
        if not self._options.keep_open:
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
            if self._options.sync:
                os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _require_own(self, found: os.stat_result) -> None:
        """Raise OutputError for a file that was there and cannot be dsconv's: another name of it is somebody's."""
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OutputError(f"{self._path} was not put there by dsconv: move it away")

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
