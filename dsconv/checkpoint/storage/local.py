"""Files that are opened for positioned reads: the one place that knows how bytes are got.

Everything above asks an ``OpenFile`` for bytes at an offset. Of a local file those come by ``os.preadv`` on a
descriptor; of one in a store (``s3://``, ``https://`` …) by range requests, in ``remote.py``, which is imported when a
path of that kind is opened and never for a local one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import cast
from urllib.parse import unquote

from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError

EDGE_BYTES = (
    2048  # at each end of a zip: what torch.save writes around one tensor takes some 600 bytes before and 900 after
)


class OpenFile:
    """A file of ``nbytes`` bytes. A context manager; reads are exact, and from several threads one file each."""

    offset_bytes = 0  # where in the file on disk it begins

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset_bytes`` on; raises MalformedError when the file ends before or cannot be read."""
        raise NotImplementedError

    def read(self, offset_bytes: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes, of a size that the caller has bounded; raises as ``read_into`` does."""
        self._require(offset_bytes, nbytes)
        data = bytearray(nbytes)
        self.read_into(offset_bytes, memoryview(data))
        return bytes(data)

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """``read`` of each (offset, nbytes); a store is asked for all of them at once."""
        return [self.read(offset, nbytes) for offset, nbytes in spans]

    def read_runs(self, offsets: Sequence[int], run_bytes: int, view: memoryview, places: Sequence[int]) -> None:
        """Fill ``run_bytes`` of ``view`` at each of ``places`` from each of ``offsets``; raises as ``read_into`` does.

        A store is asked for all of them at once, and for what lies between those that are near to each other.
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
    """A descriptor. Raises CheckpointNotFoundError or MalformedError, with the system's reason, when it cannot be
    opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise CheckpointNotFoundError(
                    f"{path}: no such file" if not path.exists() else f"{path}: not a regular file"
                )
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except DsconvError:
            raise
        except OSError as error:
            raise MalformedError(f"{path}: cannot be read: {error.strerror}") from None
        super().__init__(path, os.fstat(self._descriptor).st_size)

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

    Offsets are counted from the span's start, and no read leaves it. A zip keeps what describes it at its two ends:
    each is read once, so that opening one of thousands costs two reads. ``path`` is what errors name, where it is not
    the file's. The file stays the caller's to close.
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
    """Raises CheckpointNotFoundError or MalformedError, and RemoteError for a file in a store."""
    if not is_remote(path):
        return LocalFile(path)
    from dsconv.checkpoint.storage.remote import open_remote

    return open_remote(path)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, time of the last change in ns, and inode of a local file; None where it is gone. Of a store, always
    None.
    """
    if is_remote(path):
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def is_remote(path: object) -> bool:
    """Whether ``path``, one of ``as_path``, lies in a store."""
    return not isinstance(path, PurePath)


def as_path(path: str | os.PathLike[str]) -> Path:
    """What a user names, as a path: of the local disk, or, for a URL (``s3://bucket/run``), of a store.

    A ``RemotePath`` does what this package asks of ``pathlib.Path`` and stands in for one. Raises UnsupportedError
    where nothing that is installed reads such a URL.
    """
    if not isinstance(path, str):
        return cast(Path, path) if hasattr(path, "is_file") else Path(path)
    protocol, separator, rest = path.partition("://")
    if not separator or not protocol.isalnum():
        return Path(path)
    if protocol == "file":
        return Path(unquote(rest))
    from dsconv.checkpoint.storage.remote import RemotePath

    return cast(Path, RemotePath.of(path))
