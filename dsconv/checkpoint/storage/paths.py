"""Paths of a checkpoint on the local disk."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from typing import Any, TypeVar

Own = TypeVar("Own", bound="SourcePath")


class SourcePath(PosixPath):
    """A ``pathlib.Path`` that remembers its root; so does every path that is derived from it.

    It is a path like any other to all code that takes one. Python 3.12 would need ``with_segments`` alone; until 3.11
    each method that makes a path has to pass the root on.
    """

    root_of: Any = None  # the Root that handed the path out

    def _derived(self: Own, path: Path) -> Own:
        found = path if isinstance(path, type(self)) else type(self)(path)
        found.root_of = self.root_of
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
