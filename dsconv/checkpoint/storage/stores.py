"""Stores that fsspec knows: list them, read bytes of a file, send files to them.

Every request goes through ``Store.attempt`` or ``Store.once``: it is tried again where that may help, and its failure
is a RemoteError that names the URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dsconv.checkpoint.storage.local import require_small
from dsconv.errors import DsconvError, RemoteError

T = TypeVar("T")
FIRST_WAIT_SECONDS = 0.25  # doubled after each try, and varied, so that workers do not all come back at once
PATIENCE_SECONDS = 300  # since the first try; a later failure is the last
BUCKETS = {"s3", "s3a", "gs", "gcs"}
DEFERS = {"s3", "s3a"}  # stores that show an upload once it is completed, and whose library lets the caller do that
PART_BYTES = 16 << 20  # a part of an upload; those in flight are held in memory
MAX_PARTS = 9_000  # S3 takes 10,000
ETAGS = ("ETag", "etag", "generation", "blob_id")  # what S3, Azure, Google and the Hub call it
PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
)


@dataclass(frozen=True)
class Stat:
    """What a store says about a path; the names are those of ``os.stat_result``."""

    is_dir: bool
    st_size: int = 0
    st_mtime_ns: int = 0
    etag: str = ""  # of the content, where the store gives one

    @property
    def signature(self) -> tuple[int, str]:
        """What tells a file from a later one of its name. A listing may round times, so the ETag goes first."""
        return self.st_size, self.etag or str(self.st_mtime_ns)


class Store:
    """The file system of one protocol, as fsspec gives it. ``lists_all``: its listings are whole."""

    lists_all = True
    encoded = False  # whether names are percent-encoded in its URLs
    tries = 2  # the libraries of stores try again themselves

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def stat(self, url: str) -> Stat | None:
        """Return what lies at a URL, or None if there is nothing."""

        def info() -> Stat | None:
            self.fs.invalidate_cache()
            try:
                return _stat(self.fs.info(url))
            except FileNotFoundError:
                return None

        return self.attempt(url, info)

    def stat_again(self, url: str) -> Stat | None:
        """Return what lies at a URL now, whatever was known about it."""
        return self.stat(url)

    def list(self, url: str) -> dict[str, Stat]:
        """Return {name: what it is} of a folder; empty if there is no such folder."""

        def names() -> dict[str, Stat]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(url, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            listed = {str(item["name"]).rstrip("/").rpartition("/")[2]: _stat(item) for item in found}
            listed.pop("", None)  # S3's marker of an empty folder has the folder's own name
            return listed

        return self.attempt(url, names)

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        # Without fsspec's read-ahead, which would read more than is asked for, over and over.
        options = {} if self.fs.async_impl or "memory" in self.fs.protocol else {"cache_type": "none"}
        return self.attempt(url, lambda: bytes(self.fs.cat_file(url, start=start, end=stop, **options)))

    def require_ranges(self, url: str) -> None:
        """Raise RemoteError if the store cannot give parts of a file."""

    def read_all(self, url: str, limit_bytes: int) -> bytes:
        """Return the content of a small file. Raises MalformedError for one of more than ``limit_bytes``."""
        found = self.stat(url)
        require_small(url, found.st_size if found else 0, limit_bytes)
        return self.read_range(url, 0, found.st_size) if found and found.st_size else b""

    def explain_absence(self, url: str) -> None:
        """Raise RemoteError where nothing lies at ``url`` because its bucket is not there."""
        protocol, _, rest = url.partition("://")
        bucket = rest.partition("/")[0]
        if protocol not in BUCKETS:
            return
        try:
            self.fs.info(bucket)
        except FileNotFoundError:
            raise RemoteError(
                f"{url}: there is no bucket {bucket!r}: check its name, and whether the credentials and the endpoint"
                " are those of its account"
            ) from None
        except Exception:  # noqa: BLE001 - it may be there, and not be ours to look at
            return

    def failure(self, url: str, error: Exception, tries: int) -> RemoteError:
        """Return the error that tells of a failure that will not pass."""
        return _remote_error(url, error, tries)

    def attempt(self, url: str, action: Callable[[], T]) -> T:
        """Return ``action()``, tried again with growing pauses while its failure may pass. Raises RemoteError."""
        began = time.monotonic()
        for number in range(1, self.tries + 1):
            try:
                return action()
            except DsconvError:
                raise
            except Exception as error:  # noqa: BLE001 - every library behind fsspec has errors of its own
                late = time.monotonic() - began > PATIENCE_SECONDS
                if number == self.tries or late or not _passes(error):
                    raise self.failure(url, error, number) from None
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1) * random.uniform(0.75, 1.25))
        raise AssertionError

    # Writing. A store has no positioned writes and often no rename: a file goes up from its first byte to its last.

    def create(self, url: str, nbytes: int, hidden: str) -> Writer:
        """Begin a file of ``nbytes`` bytes that nobody sees before its ``commit``.

        Args:
            url: where it will be.
            nbytes: its size.
            hidden: where it is until then, in a store that shows a file at once.

        Raises:
            RemoteError: the store fails.
        """
        deferred = not DEFERS.isdisjoint((self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol)
        part_bytes = max(PART_BYTES, -(-nbytes // MAX_PARTS))
        place = url if deferred else hidden
        options = {"block_size": part_bytes, "autocommit": False} if deferred else {"block_size": part_bytes}
        if not deferred:
            self.once(place, lambda: self.fs.makedirs(place.rpartition("/")[0], exist_ok=True))
        return Writer(self, url, place, self.once(url, lambda: self.fs.open(place, "wb", **options)))

    def write(self, url: str, data: bytes) -> None:
        """Write a small file, whole."""
        self.attempt(url, lambda: self.fs.pipe_file(url, data))

    def remove(self, url: str) -> None:
        """Remove a file, if it exists."""

        def rm() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(url)

        self.attempt(url, rm)

    def remove_folder(self, url: str) -> None:
        """Remove a folder with all that is in it, if it exists."""

        def rm() -> None:
            self.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(url, recursive=True)

        self.attempt(url, rm)

    def copy(self, url: str, other: str) -> None:
        """Copy a file within the store."""
        self.attempt(other, lambda: self.fs.cp_file(url, other))

    def once(self, url: str, action: Callable[[], T]) -> T:
        """Return ``action()``, called once: it cannot be repeated, or the library repeats it. Raises RemoteError."""
        try:
            return action()
        except DsconvError:
            raise
        except Exception as error:  # noqa: BLE001 - as in ``attempt``
            raise self.failure(url, error, 1) from None


class Writer:
    """A file on its way to a store. S3 shows an upload once it is completed; elsewhere it is moved into place."""

    def __init__(self, store: Store, url: str, place: str, file: Any) -> None:
        self.store = store
        self.url = url
        self.place = place
        self.file = file

    def write(self, data: bytes | memoryview) -> None:
        self.store.once(self.url, lambda: self.file.write(data))

    def finish(self) -> None:
        """Send the rest. The store then has all bytes."""
        self.store.once(self.url, self.file.close)

    def commit(self) -> None:
        if self.place == self.url:
            self.store.once(self.url, self.file.commit)
        else:
            self.store.once(self.url, self._move)

    def _move(self) -> None:
        self.store.fs.makedirs(self.url.rpartition("/")[0], exist_ok=True)
        self.store.fs.mv(self.place, self.url)

    def discard(self) -> None:
        """Remove what was sent, as far as the store can be reached."""
        with contextlib.suppress(Exception):
            if self.place == self.url:
                self.file.closed = True  # or fsspec would send its rest when the object goes
                self.file.discard()
            else:
                self.file.close()
                self.store.fs.rm_file(self.place)


def _stat(info: dict[str, Any]) -> Stat:
    when = info.get("LastModified") or info.get("mtime") or info.get("created") or 0
    seconds = float(when.timestamp() if hasattr(when, "timestamp") else when if isinstance(when, (int, float)) else 0)
    etag = next((str(info[key]) for key in ETAGS if info.get(key)), "")
    return Stat(info.get("type") == "directory", int(info.get("size") or 0), int(seconds * 1e9), etag)


def _passes(error: BaseException) -> bool:
    """Return whether a failure may pass by itself: one of the network, or an answer such as 429 or 503."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, PERMANENT) or "Credential" in type(error).__name__:
        return False
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError)) or library in (
        "aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "httpx", "httpx2", "requests", "urllib3",
    )  # fmt: skip


def _remote_error(url: str, error: BaseException, tries: int) -> RemoteError:
    said = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    hint = (
        ": check the credentials and what they may read"
        if isinstance(error, PermissionError) or "Credential" in what
        else ""
    )
    return RemoteError(f"{url}: cannot be reached{f' after {tries} tries' if tries > 1 else ''}: {what}{hint}")
