"""Files that are opened for positioned reads: the one place that knows how bytes are got.

Everything above asks an ``OpenFile`` for bytes at an offset. A local file answers with ``os.preadv`` on a descriptor; a
file in a store (``s3://``, ``https://`` …) with range requests, in ``remote.py``, which is imported only when a path of
that kind is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from dsconv.errors import CheckpointNotFoundError, MalformedError

# Read at each end of a zip: what torch.save writes around one tensor takes some 600 bytes before it and 900 after.
EDGE_BYTES = 2048
MAX_SMALL_BYTES = 200 << 20  # the largest file that is read whole; the largest tokenizer known has 35 MB
Signature = tuple[Any, ...]  # see ``stat_signature``


class OpenFile:
    """A file of ``nbytes`` bytes; a context manager that closes it.

    A read returns all the bytes that it was asked for or raises. A file may be read from one thread at a time.
    """

    offset_bytes = 0  # where in the file on disk it begins

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset_bytes`` on. Raises MalformedError if the file ends early or cannot be read."""
        raise NotImplementedError

    def read(self, offset_bytes: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes, a number that the caller has bounded. Raises as ``read_into`` does."""
        self._require(offset_bytes, nbytes)
        data = bytearray(nbytes)
        self.read_into(offset_bytes, memoryview(data))
        return bytes(data)

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read each (offset, nbytes) as ``read`` does; a store is asked for all of them at once."""
        return [self.read(offset, nbytes) for offset, nbytes in spans]

    def read_runs(self, offsets: Sequence[int], run_bytes: int, view: memoryview, places: Sequence[int]) -> None:
        """Fill ``run_bytes`` of ``view`` at each of ``places`` from each of ``offsets``. Raises as ``read_into`` does.

        A store is asked for all of them at once; one request covers those that lie near each other.
        """
        for place, data in zip(places, self.read_many([(offset, run_bytes) for offset in offsets]), strict=True):
            view[place : place + run_bytes] = data

    def close(self) -> None: ...

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require(self, offset_bytes: int, nbytes: int) -> None:
        if offset_bytes + nbytes > self.nbytes:
            found = max(0, self.nbytes - offset_bytes)
            raise MalformedError(
                f"{self.path}: truncated: expected {nbytes} bytes at offset {offset_bytes}, found {found}"
            )


class LocalFile(OpenFile):
    """A regular file of the local disk, read through a descriptor. The constructor raises as ``open_for_reading`` does.

    Attributes:
        signature: What ``stat_signature`` gives for the file that the descriptor is of, at the time of opening.
    """

    def __init__(self, path: Path, real: str | None = None) -> None:
        """Open ``path``, or the file ``real`` that the links on its way lead to; errors name ``path``."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if real is not None else 0)
        where = path if real is None else Path(real)
        try:
            _require_regular(path, os.lstat(where) if real is not None else where.stat())  # opening a device may act
            self._descriptor = os.open(where, flags)
        except CheckpointNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFoundError(f"{path}: no such file") from None
        except ValueError:  # a null byte in the name
            raise CheckpointNotFoundError(f"{path}: no such file") from None
        except OSError as error:
            raise MalformedError(f"{path}: cannot be read: {error.strerror}") from None
        found = os.fstat(self._descriptor)
        try:
            _require_regular(path, found)  # it may have been replaced since
        except CheckpointNotFoundError:
            os.close(self._descriptor)
            raise
        super().__init__(path, found.st_size)
        self.signature = _signature(found)

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise MalformedError(
                    f"{self.path}: cannot be read: {len(view)} bytes at offset {offset_bytes} failed: {error.strerror}"
                ) from None
            if count == 0:
                raise MalformedError(
                    f"{self.path}: truncated: expected {len(view)} bytes at offset {offset_bytes}, found {done}"
                )
            done += count

    def read_runs(self, offsets: Sequence[int], run_bytes: int, view: memoryview, places: Sequence[int]) -> None:
        read, descriptor = os.preadv, self._descriptor
        for offset, place in zip(offsets, places, strict=True):  # runs of a kilobyte are read by the hundred thousand
            part = view[place : place + run_bytes]
            try:
                whole = read(descriptor, [part], offset) == run_bytes
            except OSError:
                whole = False
            if not whole:
                self.read_into(offset, part)

    def close(self) -> None:
        os.close(self._descriptor)


class Span(OpenFile):
    """``nbytes`` bytes of an open file from ``offset_bytes``, such as one of the zips that a ``.distcp`` is made of.

    Offsets are counted from the span's start, and no read leaves it. A zip keeps its directory at its end and the first
    header at its start: both ends are read once, so that opening one zip of thousands costs two reads. Errors name
    ``path``, or the file's path where none is given. The caller closes the file.
    """

    def __init__(self, file: OpenFile, offset_bytes: int, nbytes: int, path: Path | None = None) -> None:
        super().__init__(path or file.path, nbytes)
        self.offset_bytes = offset_bytes
        self._file = file
        head_bytes = nbytes if nbytes <= 2 * EDGE_BYTES else EDGE_BYTES
        self._tail_at = max(head_bytes, nbytes - EDGE_BYTES)
        self._head, self._tail = file.read_many(
            [(offset_bytes, head_bytes), (offset_bytes + self._tail_at, nbytes - self._tail_at)]
        )

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        self._require(offset_bytes, len(view))
        self._file.read_into(self.offset_bytes + offset_bytes, view)

    def read(self, offset_bytes: int, nbytes: int) -> bytes:
        self._require(offset_bytes, nbytes)
        if offset_bytes + nbytes <= len(self._head):
            return self._head[offset_bytes : offset_bytes + nbytes]
        if offset_bytes >= self._tail_at:
            return self._tail[offset_bytes - self._tail_at : offset_bytes - self._tail_at + nbytes]
        return self._file.read(self.offset_bytes + offset_bytes, nbytes)


def open_for_reading(path: Path) -> OpenFile:
    """Open a file for positioned reads.

    A path of a store, or of a repository of the Hub, opens itself: its class has a method ``open_for_reading``.

    Args:
        path: A path of the local disk, or one that a root handed out.

    Raises:
        CheckpointNotFoundError: The file does not exist, or it is not a regular one.
        MalformedError: The system cannot open it; the message has the system's reason.
        RemoteError: A store or the Hub cannot be reached.
    """
    opens_itself = getattr(path, "open_for_reading", None)
    opened: OpenFile = opens_itself() if opens_itself is not None else LocalFile(path)
    return opened


def read_small(path: Path, limit_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """Return the content of a small file, such as a configuration.

    The limit is compared with the size of the file that was opened, and no more than that is read.

    Raises:
        MalformedError: The file is larger, or cannot be read.
        CheckpointNotFoundError: The file does not exist, or it is not a regular one.
        UnsafeError: A link on the way leaves the checkpoint.
        RemoteError: A store or the Hub cannot be reached.
    """
    reads_itself = getattr(path, "read_small", None)
    if reads_itself is not None:
        data: bytes = reads_itself(limit_bytes)
        return data
    with open_for_reading(path) as file:
        require_small(path, file.nbytes, limit_bytes)
        return file.read(0, file.nbytes)


def require_small(path: object, nbytes: int, limit_bytes: int) -> None:
    """Raise MalformedError for a file that is larger than any of its kind."""
    if nbytes > limit_bytes:
        raise MalformedError(f"{path}: has {nbytes} bytes; a file of its kind has at most {limit_bytes}")


def stat_signature(path: Path) -> Signature | None:
    """Return what a changed file is known by, as it is now; None for a file that is gone.

    It is size, time of the last change in ns, and inode of a local file, and size and ETag of a file in a store (size
    and time, where the store gives no ETag).

    Raises:
        RemoteError: The store cannot be reached.
    """
    asks_itself = getattr(path, "signature", None)
    if asks_itself is not None:
        found: Signature | None = asks_itself()
        return found
    try:
        return _signature(os.stat(path))  # noqa: PTH116 - on disk, also where the Hub would answer for the path
    except OSError:
        return None


def first_signature(path: Path) -> Signature | None:
    """Return the signature that a file had when a format opened it, so that a change since then is noticed."""
    remembered = getattr(path, "first_signature", None)
    return (remembered() if remembered is not None else None) or stat_signature(path)


def _signature(found: os.stat_result) -> Signature:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _require_regular(path: Path, found: os.stat_result) -> None:
    """Raise CheckpointNotFoundError for a folder, a pipe, a socket or a device; reading some of them never ends."""
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointNotFoundError(f"{path}: not a regular file")


def kind_of(found: os.stat_result) -> str:
    """Return what a name is, for messages."""
    mode = found.st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a fifo" if stat.S_ISFIFO(mode) else "a device or socket"


def why_unread(path: Path, limit_bytes: int) -> str:
    """Return why a file is not read that lies beside weights: "it is a fifo"; "" where it is sound or absent.

    Args:
        path: The file.
        limit_bytes: The largest size of a file of its kind.
    """
    if path.is_file():
        nbytes = path.stat().st_size
        return "" if nbytes <= limit_bytes else f"it has {nbytes:,} bytes, and no file of its kind over {limit_bytes:,}"
    if is_remote(path):
        return ""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return ""
    if stat.S_ISLNK(found.st_mode):
        try:
            found = os.stat(path)  # noqa: PTH116 - on disk, also where the Hub would answer for the path
        except OSError:
            return "it is a link that leads nowhere"
    return f"it is {kind_of(found)}"


def is_remote(path: object) -> bool:
    """Return whether ``path`` lies in a store: every path of the local disk is a ``PurePath``."""
    return not isinstance(path, PurePath)
