"""Paths and files of stores that fsspec knows: ``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://`` …

``RemotePath`` does what dsconv asks of ``pathlib.Path``. It lists a folder once and answers ``is_file``, ``stat`` and
``glob`` from that listing, since a request costs as much as a megabyte; a new ``RemotePath.of`` looks again.
universal_pathlib was considered: it asks the store each time, and over HTTP it takes any failure of a server for an
absent file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import total_ordering
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

from dsconv.checkpoint.storage.http import HttpStore
from dsconv.checkpoint.storage.hub import connection, explain, explain_absence, repo_of
from dsconv.checkpoint.storage.local import OpenFile, read_small
from dsconv.checkpoint.storage.stores import Stat, Store
from dsconv.errors import CheckpointNotFoundError, MalformedError, MissingPackageError, RemoteError, UnsupportedError

READS_AT_ONCE = 16  # small reads, while a checkpoint is opened; a copy has one in flight for each worker
NEAR_BYTES = 64 << 10  # two small reads with a smaller gap than this become one
MAX_JOINED_BYTES = 4 << 20
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "remote", "https": "remote", "gs": "gs", "gcs": "gs", "hf": "hub"}


class Tree:
    """What is known about a store below ``root``: the listings of folders, each read once."""

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
    """A URL with those methods of ``pathlib.Path`` that read.

    Names are plain text. In the URLs of web servers they are percent-encoded, so that a name from a file (``..%2Fx``)
    cannot mean another place. ``query`` is the part of a URL from ``?`` on; it stays at the end of derived URLs.
    """

    def __init__(self, url: str, query: str, tree: Tree) -> None:
        self.url = url
        self.query = query
        self.tree = tree

    @staticmethod
    def of(text: str) -> RemotePath:
        """Return the path of a URL, about which nothing is known yet."""
        protocol, _, rest = text.partition("://")
        query = ""
        if protocol in ("http", "https"):
            rest, mark, tail = rest.partition("?")
            query = mark + tail
        url = f"{protocol}://{rest.rstrip('/')}"
        store = store_of(url)
        if store.encoded and "%" not in url:
            url = quote(url, safe=":/@[]~!$&'()*+,;=")
        path = RemotePath(url, query, Tree(url, store))
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

    @property
    def _inside(self) -> PurePosixPath:
        inside = self.url.partition("://")[2]
        return PurePosixPath(unquote(inside) if self.tree.store.encoded else inside)

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
        below = str(name).strip("/")
        return RemotePath(f"{self.url}/{quote(below) if self.tree.store.encoded else below}", self.query, self.tree)

    def joinpath(self, *names: str) -> RemotePath:
        return self / "/".join(names)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def stat(self) -> Stat:
        """Return what the store says about the path. Raises CheckpointNotFoundError."""
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
        """Yield the paths below this one that match; ``**`` is not supported."""
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

    def first_signature(self) -> tuple[int, str] | None:
        """Return what the store said about the file when it was first asked; see ``local.first_signature``."""
        found = self.tree.stat(str(self))
        return None if found is None else found.signature

    def signature(self) -> tuple[int, str] | None:
        """Return what the store says about the file now; see ``local.stat_signature``."""
        found = self.tree.store.stat_again(str(self))
        return None if found is None else found.signature

    def read_small(self, limit_bytes: int) -> bytes:
        """Return the content of a small file; see ``local.read_small``."""
        self.stat()
        return self.tree.store.read_all(str(self), limit_bytes)

    def read_bytes(self) -> bytes:
        return read_small(self)  # type: ignore[arg-type]  # it stands in for a Path

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open_for_reading(self) -> RemoteFile:
        """Open the file for range requests. Raises CheckpointNotFoundError, RemoteError."""
        found = self.stat()
        if found.is_dir:
            raise CheckpointNotFoundError(f"{self}: not a regular file")
        self.tree.store.require_ranges(str(self))
        return RemoteFile(self, found.st_size)


class RemoteFile(OpenFile):
    """A file in a store. Nothing is held open: each read is a request."""

    def __init__(self, path: RemotePath, nbytes: int) -> None:
        super().__init__(path, nbytes)  # type: ignore[arg-type]  # it stands in for a Path
        self.store = path.tree.store
        self.url = str(path)

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        self._require(offset_bytes, len(view))
        if len(view):
            data = self.store.read_range(self.url, offset_bytes, offset_bytes + len(view))
            if len(data) != len(view):
                raise MalformedError(
                    f"{self.path}: truncated: expected {len(view)} bytes at offset {offset_bytes}, found {len(data)}"
                )
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


class HubStore(Store):
    """Repositories of the Hub, read in place. Failures are told in the words that ``org/model`` is told in."""

    def explain_absence(self, url: str) -> None:
        explain_absence(url)

    def failure(self, url: str, error: Exception, tries: int) -> RemoteError:
        repo, revision = repo_of(url)
        return explain(repo, revision, error) if repo else super().failure(url, error, tries)


def store_of(url: str) -> Store:
    """Return the store that serves a URL.

    Raises:
        UnsupportedError: No installed library reads such URLs; MissingPackageError where an extra brings one.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec

        fs, _ = fsspec.core.url_to_fs(url, **(connection() if protocol == "hf" else {}))
    except (ImportError, ValueError) as error:
        said = f"{url}: nothing that is installed reads {protocol}://"
        extra = EXTRAS.get(protocol) if isinstance(error, ImportError) else None
        if extra:
            raise MissingPackageError(f"{said}: pip install 'dsconv-toolkit[{extra}]'") from None
        raise UnsupportedError(f"{said} ({error})") from None
    if protocol in ("http", "https"):
        return HttpStore(fs)
    return HubStore(fs) if protocol == "hf" else Store(fs)
