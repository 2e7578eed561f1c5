"""Output to a store (``s3://bucket/model``), also whole or absent, with a few blocks of memory.

Files are uploaded from their first byte to their last, a few at once, and stay invisible until all of them are complete
and every source record has passed its checksum. Then they are put into place, the commit marker last, as on disk
(``staging.py``). A run that is killed leaves nothing that looks like an output: on S3, parts of an upload that was
never completed, which a lifecycle rule clears away; elsewhere, files in ``.dsconv-partial/``, which the next run
removes. Nothing prevents two runs into one folder, since stores have no locks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.unfinished import MOVING, STAGING, moving_in_store
from dsconv.convert.progress import Progress
from dsconv.convert.staging import MAX_POINTER_BYTES
from dsconv.errors import MismatchError, OutputError

COMMITS_AT_ONCE = 8
SMALL_BYTES = 64 << 10
MAX_HELD_BYTES = 32 << 20


class HeldFile:
    """A small file that waits in memory and is sent by ``commit``: one request instead of the four of an upload."""

    def __init__(self, store: Any, url: str) -> None:
        self._store = store
        self._url = url
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        self._data += data

    def finish(self) -> None: ...

    def commit(self) -> None:
        self._store.write(self._url, bytes(self._data))

    def discard(self) -> None: ...


class StoreFile:
    """A file that is being uploaded to a store, which takes bytes from the first to the last."""

    def __init__(self, begin: Callable[[], Any], url: str, nbytes: int, hashed: bool) -> None:
        self.digest = hashlib.sha256() if hashed else None
        self.position = 0
        self._begin = begin
        self._url = url
        self._nbytes = nbytes
        self._rest: Iterator[tuple[int, bytes]] = iter(())
        self._writer: Any = None

    def begin(self, head: bytes, rest: Iterable[tuple[int, bytes]] = ()) -> None:
        """Begin to send the file, with its first bytes. Raises RemoteError."""
        self._rest = iter(rest)
        self._writer = self._begin()
        self._send(memoryview(head))

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Send ``data``, after what of the rest comes before it. Raises RemoteError."""
        while self.position < offset_bytes:
            self._send_at(*next(self._rest, (self._nbytes, b"")), offset_bytes)
        self._send_at(offset_bytes, data, self._nbytes)

    def start_writeback(self) -> None:
        """Do nothing: a store is sent the bytes as they come."""

    def finish(self) -> None:
        """Send what is left, so that the store has all bytes. Raises RemoteError."""
        for offset, data in self._rest:
            self._send_at(offset, data, self._nbytes)
        self._send_at(self._nbytes, b"", self._nbytes)
        self._writer.finish()

    def commit(self) -> None:
        """Let the file be seen. Raises RemoteError."""
        self._writer.commit()
        self._writer = None

    def close(self) -> None:
        """Do nothing: files that were not committed are discarded when the upload ends."""

    def discard(self) -> None:
        """Remove the file from the store, unless it was committed."""
        if self._writer is not None:
            self._writer.discard()

    def _send_at(self, offset_bytes: int, data: bytes | memoryview, end: int) -> None:
        """Send ``data`` at an offset; zeros fill what is skipped. It may not go beyond ``end``."""
        if not self.position <= offset_bytes or offset_bytes + len(data) > end:
            raise OutputError(
                f"{self._url}: {len(data)} bytes for offset {offset_bytes} came where those for {self.position} to"
                f" {end} were due. This is a fault of dsconv: please report it"
            )
        if offset_bytes > self.position:
            self._send(memoryview(bytes(offset_bytes - self.position)))
        self._send(memoryview(data))

    def _send(self, data: memoryview) -> None:
        if not len(data):
            return
        self._writer.write(data)
        self.position += len(data)
        if self.digest is not None:
            self.digest.update(data)


class Upload:
    """One run's output in the folder ``target`` of a store. Use ``open_upload``."""

    in_order = True

    def __init__(self, target: Any, repeat: str) -> None:
        self.target = target
        self.repeat = repeat
        self.store = target.tree.store
        self._files: dict[str, StoreFile] = {}
        self._small: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        self._held_bytes = 0

    def url(self, name: str) -> str:
        """Return the URL of a file of the output."""
        return f"{self.target}/{name}"

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> StoreFile:
        """Return a file of ``nbytes``, which its ``begin`` starts to send."""
        url, hidden = self.url(name), self.url(f"{STAGING}/{name}")
        if nbytes <= SMALL_BYTES and self._held_bytes + nbytes <= MAX_HELD_BYTES:
            self._held_bytes += nbytes
            begin: Callable[[], Any] = partial(HeldFile, self.store, url)
        else:
            begin = partial(self.store.create, url, nbytes, hidden)
        self._files[name] = StoreFile(begin, url, nbytes, hashed)
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        """Keep a small file until ``commit``."""
        self._small[name] = data

    def link(self, name: str, existing: str) -> None:
        """Have ``commit`` put a copy of a file there: a store has no second names for a file."""
        self._links[name] = existing

    def digests(self, names: Sequence[str], progress: Progress | None) -> dict[str, str]:
        """Return the sha256 of each of the files ``names``, which were computed while they were sent."""
        return {name: digest.hexdigest() for name in names if (digest := self._files[name].digest) is not None}

    def commit(
        self, names: Sequence[str], obsolete: Sequence[str], verify: Callable[[Path], None] | None = None
    ) -> None:
        """Remove ``obsolete``, then put ``names`` into place in their order.

        Args:
            names: what was sent, files and folders, the commit marker last.
            obsolete: an older output, files and folders, its commit marker first.
            verify: called with the folder at the end, since a store shows files only when they are in place. On a
                MismatchError they are removed again.

        Raises:
            RemoteError: the store fails.
        """
        moving = self.url(f"{STAGING}/{MOVING}")
        self.store.write(moving, moving_in_store([*obsolete[1:], *names[:-1]], self.repeat))
        for name in obsolete:
            self._remove(name, (self.target / name).is_dir())
        with ThreadPoolExecutor(COMMITS_AT_ONCE) as pool:
            for name in names:
                for files in self._within(name):
                    list(pool.map(self._commit_file, files))
        self.store.remove(moving)
        try:
            if verify is not None:
                verify(type(self.target).of(str(self.target)))  # as it is now, and not as it was listed before
        except MismatchError:
            for name in reversed(names):
                self._remove(name, name not in (*self._files, *self._small, *self._links))
            raise

    def _within(self, name: str) -> list[list[str]]:
        """Return the files of the output that a name of it stands for: itself, or those of a folder. Each list is put
        into place before the next one; the small files of a folder come last, one by one.
        """
        inside = [file for file in self._files if file.startswith(f"{name}/")]
        small = [[file] for file in self._small if file.startswith(f"{name}/")]
        return [inside, *small] if inside or small else [[name]]

    def _commit_file(self, name: str) -> None:
        if name in self._small:
            self.store.write(self.url(name), self._small[name])
        elif name in self._links:
            self.store.copy(self.url(self._links[name]), self.url(name))
        else:
            self._files[name].commit()

    def _remove(self, name: str, is_folder: bool) -> None:
        if is_folder:
            self.store.remove_folder(self.url(name))
        else:
            self.store.remove(self.url(name))

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file beside the target. Raises OutputError where it is larger, and RemoteError."""
        found = self.store.stat(str(path))
        if found is not None and (found.is_dir or found.st_size > MAX_POINTER_BYTES):
            raise OutputError("it is not a pointer to a checkpoint")
        self.store.write(str(path), data)

    def discard(self) -> None:
        """Discard everything that was sent but not put into place."""
        for file in self._files.values():
            file.discard()


@contextlib.contextmanager
def open_upload(target: Path, repeat: str) -> Iterator[Upload]:
    """Open an upload into a folder of a store. What was sent and not put into place is discarded at the end.

    Args:
        target: the folder.
        repeat: the command that makes the output, for those who find it half in place.

    Raises:
        RemoteError: there is no such bucket, or the store fails.
    """
    upload = Upload(target, repeat)
    upload.store.explain_absence(str(target))
    for leftover in (target / STAGING).iterdir():
        if leftover.is_dir():
            upload.store.remove_folder(str(leftover))
        elif leftover.name != MOVING:  # which says what to make of the files beside it, until this run replaces them
            upload.store.remove(str(leftover))
    try:
        yield upload
    finally:
        upload.discard()
