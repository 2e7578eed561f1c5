"""Roots: the one door through which a checkpoint is reached, wherever it lies.

There are three kinds: a folder or file of the local disk, a URL of a store, and a repository of the Hub. Formats get a
root and see paths; only this room knows where the bytes come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, Protocol, cast

from dsconv.checkpoint.storage import hub
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.paths import Bounds, SourcePath
from dsconv.errors import CheckpointNotFoundError, DsconvError
from dsconv.urls import where, writable


class Root(Protocol):
    """Where a checkpoint lies.

    Attributes:
        path: The folder, or the file, that the user named. It is a ``pathlib.Path``, or stands in for one: ``/``,
            ``name``, ``parent``, ``is_file``, ``is_dir``, ``iterdir``, ``glob`` (without ``**``), ``stat().st_size``,
            ``read_bytes`` and ``read_text`` list and read, and ``open_for_reading(path)`` opens any path derived from
            it.
        info: What a report says of the source, such as the repository and its commit.
        warnings: What the user has to know about how the source was reached.
    """

    path: Any
    info: dict[str, str]
    warnings: list[str]

    def fetch(self, paths: Iterable[Path]) -> None:
        """Have ``paths`` at hand: a format calls it with the files that it will open next.

        Without it they come one after the other, as they are opened; with it, several at once. Only the Hub's root has
        something to do. Raises RemoteError.
        """

    def fetch_beside(self, folders: Iterable[Path]) -> None:
        """Have configuration and tokenizer files in ``folders`` at hand. Raises RemoteError."""

    def nothing_found(self, expected: str) -> DsconvError:
        """Return the error for a root in which no format finds a checkpoint; ``expected`` says what they look for."""


class PathRoot:
    """The root of a path of the local disk or of a store. It implements ``Root``."""

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        self.path = path
        if not is_remote(path):
            self.path = SourcePath(path)
            self.path.root_of, self.path.bounds = self, Bounds(Path(path), follow_links)
        self.info: dict[str, str] = {}
        self.warnings: list[str] = []

    def fetch(self, paths: Iterable[Path]) -> None: ...

    def fetch_beside(self, folders: Iterable[Path]) -> None: ...

    def nothing_found(self, expected: str) -> DsconvError:
        what = "a file of no kind that is read" if self.path.is_file() else "a folder that holds none"
        return CheckpointNotFoundError(f"{self.path}: {what}: {expected}")


def open_root(source: str | os.PathLike[str], revision: str | None = None, *, follow_links: bool = False) -> Root:
    """Return the root that ``source`` names.

    Args:
        source: A path, a URL, or the id of a repository of the Hub.
        revision: A branch, tag or commit of the Hub.
        follow_links: Whether links of the local disk that leave the checkpoint are read.

    Raises:
        CheckpointNotFoundError: There is nothing at that path.
        UnsupportedError: Nothing that is installed reads such a URL, or a revision is given for a path elsewhere.
        RemoteError: The Hub, a store or the network fails.
    """
    if hub.is_repo(source):
        return hub.open_repo(str(source), revision)
    path = as_path(source if revision is None else hub.with_revision(str(where(source)), revision))
    if not path.exists():
        if is_remote(path):
            path.tree.store.explain_absence(str(path))  # type: ignore[attr-defined]  # a RemotePath
        raise CheckpointNotFoundError(f"{path}: no such file or folder")
    return PathRoot(path, follow_links)


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return what a user names as a path: of the local disk or, for a URL (``s3://bucket/run``), of a store.

    A ``RemotePath`` stands in for ``pathlib.Path``; its module is imported for URLs only.

    Raises:
        UnsupportedError: It is written like a URL, and nothing that is installed reads it.
    """
    return cast(Path, path) if _came_from_a_root(path) else _opened(where(path))


def as_output(path: str | os.PathLike[str]) -> Path:
    """Return where an output goes, as ``as_path`` does.

    Raises:
        UnsupportedError: It is written like a URL, and nothing that is installed reads it.
        OutputError: It is a URL that is only read.
    """
    return cast(Path, path) if _came_from_a_root(path) else _opened(writable(path))


def _came_from_a_root(path: object) -> bool:
    return isinstance(path, SourcePath) or (not isinstance(path, (str, PurePath)) and hasattr(path, "is_file"))


def _opened(found: Path | str) -> Path:
    if isinstance(found, Path):
        return found
    from dsconv.checkpoint.storage.remote import RemotePath

    return cast(Path, RemotePath.of(found))
