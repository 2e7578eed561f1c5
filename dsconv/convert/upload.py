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
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsconv.convert.progress import Progress
from dsconv.convert.staging import MOVING, STAGING
from dsconv.errors import MismatchError, OutputError

READ_ONLY = ("http", "https", "hf")


class StoreFile:
    """A file that is being uploaded to a store, which takes bytes from the first to the last."""

    def __init__(self, store: Any, url: str, nbytes: int, hashed: bool) -> None:
        self.digest = hashlib.sha256() if hashed else None
        self.position = 0
        self._store = store
        self._url = url
        self._nbytes = nbytes
        self._writer: Any = None

    def begin(self, head: bytes) -> None:
        """Begin to send the file, with its first bytes. Raises RemoteError."""
        self._writer = self._store.create(self._url, self._nbytes)
        self._send(memoryview(head))

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Send ``data``, which must follow what was sent before. Raises RemoteError."""
        if offset_bytes != self.position:
            raise OutputError(
                f"{self._url}: bytes for offset {offset_bytes} came where those for {self.position} were due. This is"
                " a fault of dsconv: please report it"
            )
        self._send(data)

    def start_writeback(self) -> None:
        """Do nothing: a store is sent the bytes as they come."""

    def finish(self, rest: Iterable[tuple[int, bytes]]) -> None:
        """Send what is left, so that the store has all bytes. Raises RemoteError."""
        for offset, data in rest:
            self.write(memoryview(data), offset)
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

    def _send(self, data: memoryview) -> None:
        self._writer.write(data)
        self.position += len(data)
        if self.digest is not None:
            self.digest.update(data)


class Upload:
    """One run's output in the folder ``target`` of a store. Use ``open_upload``."""

    in_order = True

    def __init__(self, target: Any) -> None:
        self.target = target
        self.store = target.tree.store
        self._files: dict[str, StoreFile] = {}
        self._small: dict[str, bytes] = {}

    def url(self, name: str) -> str:
        """Return the URL of a file of the output."""
        return f"{self.target}/{name}"

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> StoreFile:
        """Return a file of ``nbytes``, which its ``begin`` starts to send."""
        self._files[name] = StoreFile(self.store, self.url(name), nbytes, hashed)
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        """Keep a small file until ``commit``."""
        self._small[name] = data

    def link(self, name: str, existing: str) -> None:
        """Refuse: a store has no second names for a file."""
        raise OutputError(f"{self.target}: an output with links cannot be written to a store: write it to a folder")

    def digests(self, names: Sequence[str], progress: Progress | None) -> dict[str, str]:
        """Return the sha256 of each of the files ``names``, which were computed while they were sent."""
        return {name: digest.hexdigest() for name in names if (digest := self._files[name].digest) is not None}

    def commit(
        self, names: Sequence[str], obsolete: Sequence[str], verify: Callable[[Path], None] | None = None
    ) -> None:
        """Remove ``obsolete``, then put ``names`` into place in their order.

        Args:
            names: what was sent, the commit marker last.
            obsolete: an older output, its commit marker first.
            verify: called with the folder at the end, since a store shows files only when they are in place. On a
                MismatchError they are removed again.

        Raises:
            RemoteError: the store fails.
        """
        moving = self.url(f"{STAGING}/{MOVING}")
        self.store.write(moving, json.dumps([*obsolete[1:], *names[:-1]]).encode())
        for name in obsolete:
            self.store.remove(self.url(name))
        for name in names:
            if name in self._small:
                self.store.write(self.url(name), self._small[name])
            else:
                self._files[name].commit()
        self.store.remove(moving)
        try:
            if verify is not None:
                verify(type(self.target).of(str(self.target)))  # as it is now, and not as it was listed before
        except MismatchError:
            for name in reversed(names):
                self.store.remove(self.url(name))
            raise

    def replace(self, path: Path, data: bytes) -> None:
        """Refuse: nothing outside of the folder is written."""
        raise OutputError(f"{path}: cannot be written beside an output in a store")

    def discard(self) -> None:
        """Discard everything that was sent but not put into place."""
        for file in self._files.values():
            file.discard()


@contextlib.contextmanager
def open_upload(target: Path) -> Iterator[Upload]:
    """Open an upload into a folder of a store. What was sent and not put into place is discarded at the end.

    Raises:
        OutputError: the store cannot be written to.
    """
    protocol = str(target).partition("://")[0]
    if protocol in READ_ONLY:
        raise OutputError(
            f"{target}: {protocol}:// is read only here; write to a folder or an object store, and upload that"
        )
    upload = Upload(target)
    for leftover in (target / STAGING).iterdir():
        if leftover.name != MOVING:  # which says what to make of the files beside it, until this run replaces them
            upload.store.remove(str(leftover))
    try:
        yield upload
    finally:
        upload.discard()
