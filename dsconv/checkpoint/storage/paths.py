"""Paths of a checkpoint on the local disk, and which files may be read through them.

A downloaded checkpoint is the work of strangers. A link in it that leads elsewhere would carry a private key into the
output, ready to be pushed, or somebody's private weights. So a link that leaves the folder which the user named is
refused, for weights, indexes and configurations alike, unless the user asks for it (``follow_links``).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from dsconv.checkpoint.storage.local import LocalFile, OpenFile, Signature, read_small
from dsconv.errors import MalformedError, UnsafeError

Own = TypeVar("Own", bound="SourcePath")


class Bounds:
    """The rule for links, and what is known about the files that were opened.

    Allowed are links that stay in the folder which the user named, that folder and that file themselves (whatever links
    lead there), and in a snapshot of the Hub's cache the links to the blobs beside it. A file in a folder further up,
    such as the config.json of a run, must not be a link that leaves that folder.
    """

    def __init__(self, named: Path, follow_links: bool) -> None:
        self._follow_links = follow_links
        self._named = os.path.realpath(named)
        top = (named.parent if named.is_file() else named).absolute()
        self._tops = tuple(dict.fromkeys((top, Path(os.path.realpath(top)))))
        self._blobs = next(
            (folder.parent.parent / "blobs" for folder in _with_parents(self._tops[-1]) if _is_snapshot(folder)), None
        )
        self._folders: dict[Path, tuple[Path, Path]] = {}
        self.signatures: dict[Path, Signature] = {}

    def open(self, path: Path) -> LocalFile:
        """Open a file for reading.

        Raises:
            UnsafeError: A link leaves the checkpoint.
            MalformedError: Another file has taken the place of one that was opened before.
        """
        file = LocalFile(path, self._real(path))
        first = self.signatures.setdefault(path, file.signature)
        if first[-1] != file.signature[-1]:
            file.close()
            raise MalformedError(f"{path}: it was written to while it was read: run again when nothing writes to it")
        return file

    def _real(self, path: Path) -> str | None:
        """Return the file that ``path`` leads to, or None if every link may be followed."""
        if self._follow_links:
            return None
        folder, base = self._folder(path.parent)
        real = folder / path.name
        if real.is_symlink():
            real = Path(os.path.realpath(real))
        inside = real.is_relative_to(base) or real.parent == self._blobs or str(real) == self._named
        if not inside:
            raise UnsafeError(
                f"{path}: a link that leaves the checkpoint, to {real}; what it leads to could be private. If you trust"
                " it, give --follow-links (in Python, open_checkpoint(…, follow_links=True))"
            )
        return str(real)

    def _folder(self, folder: Path) -> tuple[Path, Path]:
        """Return where a folder really is, and the real folder that links in it must not leave."""
        if folder not in self._folders:
            absolute = folder.absolute()
            base = max((_shared(absolute, top) for top in self._tops), key=lambda shared: len(shared.parts))
            self._folders[folder] = Path(os.path.realpath(absolute)), Path(os.path.realpath(base))
        return self._folders[folder]


def _shared(a: Path, b: Path) -> Path:
    """Return the innermost folder that both paths, as they are written, lie in."""
    return next(folder for folder in _with_parents(a) if folder == b or folder in b.parents)


def _with_parents(folder: Path) -> tuple[Path, ...]:
    return (folder, *folder.parents)


def _is_snapshot(folder: Path) -> bool:
    """Return whether a folder is a commit's in the Hub's cache: ``models--org--name/snapshots/COMMIT``."""
    return folder.parent.name == "snapshots" and "--" in folder.parent.parent.name


class SourcePath(PosixPath):
    """A ``pathlib.Path`` that remembers its root; so does every path that is derived from it.

    It is a path like any other to all code that takes one, and what is read through it is held to ``bounds``. Python
    3.12 would need ``with_segments`` alone; until 3.11 each method that makes a path has to pass the root on.
    """

    root_of: Any = None  # the Root that handed the path out
    bounds: Bounds | None = None

    def open_for_reading(self) -> OpenFile:
        """Open the file as ``local.open_for_reading`` does, which also says what it raises."""
        return LocalFile(self) if self.bounds is None else self.bounds.open(self)

    def first_signature(self) -> Signature | None:
        """Return the signature that the file had when it was first opened; None if it was not."""
        return None if self.bounds is None else self.bounds.signatures.get(self)

    def read_bytes(self) -> bytes:
        return read_small(self)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def _derived(self: Own, path: Path) -> Own:
        found = path if isinstance(path, type(self)) else type(self)(path)
        found.root_of, found.bounds = self.root_of, self.bounds
        return found

    def __truediv__(self: Own, name: str | os.PathLike[str]) -> Own:
        return self._derived(super().__truediv__(name))

    def joinpath(self: Own, *names: str | os.PathLike[str]) -> Own:
        return self._derived(super().joinpath(*names))

    def with_name(self: Own, name: str) -> Own:
        return self._derived(super().with_name(name))

    @property
    def parent(self: Own) -> Own:
        return self._derived(super().parent)

    def absolute(self: Own) -> Own:
        return self._derived(super().absolute())

    def resolve(self: Own, strict: bool = False) -> Own:
        return self._derived(super().resolve(strict))

    def iterdir(self: Own) -> Generator[Own, None, None]:
        for path in super().iterdir():
            yield self._derived(path)

    def glob(self: Own, pattern: str) -> Iterator[Own]:  # type: ignore[override]  # the options of later Pythons
        return (self._derived(path) for path in super().glob(pattern))

    def rglob(self: Own, pattern: str) -> Iterator[Own]:  # type: ignore[override]  # the options of later Pythons
        return (self._derived(path) for path in super().rglob(pattern))
