"""Roots: the one door through which a checkpoint is reached, wherever it lies.

There are three kinds: a folder or file of the local disk, a URL of a store, and a repository of the Hub. Formats get a
root and see paths; only this room knows where the bytes come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote

from dsconv.checkpoint.storage import hub
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.paths import Bounds, SourcePath
from dsconv.errors import CheckpointNotFoundError, DsconvError


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
    if isinstance(source, str):
        source = lower_scheme(source)
    if hub.is_repo(source):
        return hub.open_repo(str(source), revision)
    path = as_path(source if revision is None else hub.with_revision(str(source), revision))
    if not path.exists():
        hub.explain_absence(str(path))
        raise CheckpointNotFoundError(f"{path}: no such file or folder")
    return PathRoot(path, follow_links)


def lower_scheme(text: str) -> str:
    """Return a URL with its scheme in lower case (``S3://`` is ``s3://``), and any other text as it is."""
    protocol, separator, rest = text.partition("://")
    return protocol.lower() + separator + rest if separator and protocol.isalnum() else text


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return what a user names as a path: of the local disk or, for a URL (``s3://bucket/run``), of a store.

    A ``RemotePath`` stands in for ``pathlib.Path``; its module is imported for URLs only.

    Raises:
        UnsupportedError: Nothing that is installed reads such a URL.
    """
    if not isinstance(path, str):
        return cast(Path, path) if hasattr(path, "is_file") else Path(path)
    path = lower_scheme(path)
    protocol, separator, rest = path.partition("://")
    if not separator or not protocol.isalnum():
        return Path(path)
    if protocol == "file":
        return Path(unquote(rest))
    from dsconv.checkpoint.storage.remote import RemotePath

    return cast(Path, RemotePath.of(path))
