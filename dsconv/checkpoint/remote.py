"""Paths and files of stores that fsspec knows: ``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://`` …

``RemotePath`` does what dsconv asks of ``pathlib.Path``. It lists a folder once and answers ``is_file``, ``stat`` and
``glob`` of what lies in it from that, since a request costs as much as a megabyte; a new ``RemotePath.of`` looks again.
universal_pathlib was weighed for this: it asks the store each time, and over HTTP it takes any failure of a server for an
absent file.

Every request goes through ``Store``, is tried a few times, and fails as a RemoteError that names the URL.
"""

from __future__ import annotations

import asyncio
import fnmatch
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import total_ordering
from pathlib import PurePosixPath
from typing import Any, TypeVar

from dsconv.checkpoint.storage import OpenFile
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, RemoteError, UnsupportedError

T = TypeVar("T")
FIRST_WAIT_SECONDS = 0.25  # doubled after each try, and varied, so that many workers do not come back at once
READS_AT_ONCE = 16  # small ones, while a checkpoint is opened; a copy has as many in flight as it has workers
NEAR_BYTES = 64 << 10  # two small reads that lie nearer than this become one
MAX_JOINED_BYTES = 1 << 20
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "remote", "https": "remote", "gs": "gs", "gcs": "gs", "hf": "hub"}
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)


@dataclass(frozen=True)
class Stat:
    """What a store says of a path; the names are those of ``os.stat_result``."""

    is_dir: bool
    st_size: int = 0
    st_mtime_ns: int = 0


class Store:
    """The file system of one protocol, as fsspec gives it. ``lists_all``: what a listing lacks is not there."""

    lists_all = True
    tries = 2  # the libraries of stores try again themselves

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def stat(self, url: str) -> Stat | None:
        """None where there is nothing."""

        def info() -> Stat | None:
            self.fs.invalidate_cache()
            try:
                return _stat(self.fs.info(url))
            except FileNotFoundError:
                return None

        return self.attempt(url, info)

    def list(self, url: str) -> dict[str, Stat]:
        """{name: what it is} of a folder; empty where there is none."""

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
        # Without fsspec's read-ahead: it would read more than is asked for, over and over.
        options = {} if self.fs.async_impl or "memory" in self.fs.protocol else {"cache_type": "none"}
        return self.attempt(url, lambda: bytes(self.fs.cat_file(url, start=start, end=stop, **options)))

    def require_ranges(self, url: str) -> None:
        """Raise RemoteError where the store cannot give parts of a file."""

    def read_all(self, url: str) -> bytes:
        return self.attempt(url, lambda: bytes(self.fs.cat_file(url)))

    def attempt(self, url: str, action: Callable[[], T]) -> T:
        """``action()``, tried again with growing pauses while it fails in ways that pass; then RemoteError."""
        for number in range(1, self.tries + 1):
            try:
                return action()
            except DsconvError:
                raise
            except Exception as error:  # noqa: BLE001 - every library behind fsspec has errors of its own
                if number == self.tries or not _passes(error):
                    raise _remote_error(url, error, number) from None
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1) * random.uniform(0.75, 1.25))
        raise AssertionError


def _stat(info: dict[str, Any]) -> Stat:
    when = info.get("LastModified") or info.get("mtime") or info.get("created") or 0
    seconds = float(when.timestamp() if hasattr(when, "timestamp") else when if isinstance(when, (int, float)) else 0)
    return Stat(info.get("type") == "directory", int(info.get("size") or 0), int(seconds * 1e9))


def _passes(error: BaseException) -> bool:
    """Whether a failure may pass by itself: the network's, and answers such as 429 and 503."""
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
    hint = ": check the credentials and what they may read" if isinstance(error, PermissionError) or "Credential" in what else ""
    return RemoteError(f"{url}: cannot be reached{f' after {tries} tries' if tries > 1 else ''}: {what}{hint}")


def store_of(url: str) -> Store:
    """The store that serves a URL. Raises UnsupportedError where nothing that is installed does."""
    protocol = url.partition("://")[0]
    try:
        import fsspec

        from dsconv.checkpoint.hub import connection

        fs, _ = fsspec.core.url_to_fs(url, **(connection() if protocol == "hf" else {}))
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(protocol)
        how = f"pip install 'dsconv[{extra}]'" if extra else str(error)
        raise UnsupportedError(f"{url}: nothing that is installed reads {protocol}:// ({how})") from None
    if protocol in ("http", "https"):
        from dsconv.checkpoint.remote_http import HttpStore

        return HttpStore(fs)
    return Store(fs)


class Tree:
    """What is known of a store below ``root``: the listings of folders, each read once."""

    def __init__(self, root: str, store: Store) -> None:
        self.root = root
        self.store = store
        self.listings: dict[str, dict[str, Stat]] = {}
        self.stats: dict[str, Stat | None] = {}

    def list(self, url: str) -> dict[str, Stat]:
        if url not in self.listings:
            self.listings[url] = self.store.list(url)
        return self.listings[url]

    def stat(self, url: str) -> Stat | None:
        folder, _, name = url.rpartition("/")
        if url.startswith(self.root + "/") and self.store.lists_all:
            return self.list(folder).get(name)
        if url not in self.stats:
            self.stats[url] = self.store.stat(url)
        return self.stats[url]


@total_ordering
class RemotePath:
    """A URL with the part of ``pathlib.Path`` that reads. ``query`` is a URL's part from ``?`` on, and stays at its end."""

    def __init__(self, url: str, query: str, tree: Tree) -> None:
        self.url = url
        self.query = query
        self.tree = tree

    @staticmethod
    def of(text: str) -> RemotePath:
        """The path of a URL, with nothing known about it yet."""
        protocol, _, rest = text.partition("://")
        query = ""
        if protocol in ("http", "https"):
            rest, mark, tail = rest.partition("?")
            query = mark + tail
        url = f"{protocol}://{rest.rstrip('/')}"
        path = RemotePath(url, query, Tree(url, store_of(url)))
        if rest.endswith("/"):
            path.tree.stats[str(path)] = Stat(is_dir=True)
        return path

    def __str__(self) -> str:
        return self.url + self.query

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    # Names

    @property
    def _inside(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2])

    @property
    def name(self) -> str:
        return self._inside.name

    @property
    def stem(self) -> str:
        return self._inside.stem

    @property
    def suffix(self) -> str:
        return self._inside.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return self._inside.parts

    @property
    def parent(self) -> RemotePath:
        above = self.url.rpartition("/")[0]
        return RemotePath(self.url if above.endswith("/") else above, self.query, self.tree)

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(f"{self.url}/{str(name).strip('/')}", self.query, self.tree)

    def joinpath(self, *names: str) -> RemotePath:
        return self / "/".join(names)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    # What is there

    def stat(self) -> Stat:
        """Raises CheckpointNotFoundError."""
        found = self.tree.stat(str(self))
        if found is None:
            raise CheckpointNotFoundError(f"{self}: no such file")
        return found

    def exists(self) -> bool:
        return self.tree.stat(str(self)) is not None

    def is_file(self) -> bool:
        found = self.tree.stat(str(self))
        return found is not None and not found.is_dir

    def is_dir(self) -> bool:
        found = self.tree.stat(str(self))
        return found is not None and found.is_dir

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in sorted(self.tree.list(self.url)))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Paths below this one that match; ``**`` is not known here."""
        first, _, rest = pattern.partition("/")
        for name in sorted(self.tree.list(self.url)):
            if fnmatch.fnmatchcase(name, first):
                if not rest:
                    yield self / name
                elif (self / name).is_dir():
                    yield from (self / name).glob(rest)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        yield from self.glob(pattern)
        for child in self.iterdir():
            if child.is_dir():
                yield from child.rglob(pattern)

    # What it holds

    def read_bytes(self) -> bytes:
        """All of a small file. Raises CheckpointNotFoundError, RemoteError."""
        self.stat()
        return self.tree.store.read_all(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)


class RemoteFile(OpenFile):
    """A file in a store: nothing is held open, each read is a request."""

    def __init__(self, path: RemotePath, nbytes: int) -> None:
        super().__init__(path, nbytes)  # type: ignore[arg-type]  # it stands in for a Path
        self.store = path.tree.store
        self.url = str(path)

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        self._require(offset_bytes, len(view))
        if len(view):
            data = self.store.read_range(self.url, offset_bytes, offset_bytes + len(view))
            if len(data) != len(view):
                raise MalformedError(f"{self.path}: truncated: expected {len(view)} bytes at offset {offset_bytes}, found {len(data)}")
            view[:] = data

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        joined: list[tuple[int, int]] = []  # (start, stop)
        for start, nbytes in sorted(spans):
            self._require(start, nbytes)
            if joined and start - joined[-1][1] <= NEAR_BYTES and start + nbytes - joined[-1][0] <= MAX_JOINED_BYTES:
                joined[-1] = (joined[-1][0], max(joined[-1][1], start + nbytes))
            else:
                joined.append((start, start + nbytes))
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            data = list(pool.map(lambda span: self.read(span[0], span[1] - span[0]), joined))
        found: dict[tuple[int, int], bytes] = {}
        number = 0
        for start, nbytes in sorted(spans):
            while start + nbytes > joined[number][1] or start < joined[number][0]:
                number += 1
            begin = start - joined[number][0]
            found[start, nbytes] = data[number][begin : begin + nbytes]
        return [found[span] for span in spans]


def open_remote(path: Any) -> RemoteFile:
    """A RemotePath, opened. Raises CheckpointNotFoundError or RemoteError."""
    found = path.stat()
    if found.is_dir:
        raise CheckpointNotFoundError(f"{path}: not a regular file")
    path.tree.store.require_ranges(str(path))
    return RemoteFile(path, found.st_size)
