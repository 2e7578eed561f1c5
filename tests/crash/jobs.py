"""The runs that are killed: each kind of output, new and over an older one, and what must hold afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dsconv
from dsconv.checkpoint.storage.unfinished import STAGING
from dsconv.convert import shares
from dsconv.convert.verify import verify
from dsconv.errors import DsconvError, OutputError

SHARD = "5KB"
NEW, OLD, ABSENT = "new", "old", "absent"


@dataclass(frozen=True)
class Kind:
    """A kind of output. ``run(source, target, force)`` makes it; one of the files in ``counts`` makes it count as an
    output. One that is made ``in_parts`` keeps what was written of it until all of its parts are done.
    """

    name: str
    run: Callable[[Path, Path, bool], object]
    counts: tuple[str, ...]
    in_parts: bool = False


def _merge(source: Path, target: Path, force: bool) -> object:
    return dsconv.merge(source, target, max_shard_size=SHARD, workers=1, force=force)


def _merge_one(source: Path, target: Path, force: bool) -> object:
    return dsconv.merge(source, target, workers=1, force=force)


def _to_universal(source: Path, target: Path, force: bool) -> object:
    return dsconv.to_universal(source, target, workers=1, force=force)


def _to_dcp(source: Path, target: Path, force: bool) -> object:
    return dsconv.to_dcp(source, target, max_shard_size=SHARD, workers=1, force=force)


def _in_parts(convert: Callable[..., Any], **options: Any) -> Callable[[Path, Path, bool], object]:
    def run(source: Path, target: Path, force: bool) -> None:
        shares.CUT_BYTES = 64  # so that files of some kilobytes are cut too
        for part in ("2/3", "1/3", "3/3"):
            report = convert(source, target, workers=1, force=force, part=part, **options).part
            if report.placed and not report.by_this and not force:
                raise OutputError(f"{target} already holds all parts")  # as a run of one process says
            if report.placed:
                return  # a killed run had written all parts

    return run


MODEL = ("model.safetensors", "model.safetensors.index.json")
KINDS = (
    Kind("merge", _merge, MODEL),
    Kind("merge into one file", _merge_one, MODEL),
    Kind("to-universal", _to_universal, ("latest_universal",)),
    Kind("to-dcp", _to_dcp, (".metadata",)),
    Kind("merge in parts", _in_parts(dsconv.merge, max_shard_size=SHARD), MODEL, True),
    Kind("to-universal in parts", _in_parts(dsconv.to_universal), ("latest_universal",), True),
    Kind("to-dcp in parts", _in_parts(dsconv.to_dcp, max_shard_size=SHARD), (".metadata",), True),
)


class Broken(AssertionError):
    """Raised when a promise is broken; the message says which."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below ``folder`` by path, except for the hidden ones that a killed run left."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and STAGING not in path.relative_to(folder).parts
    }


class Job:
    """One kind of output made from ``source`` in ``home``, over an older output of ``old`` if given."""

    def __init__(self, kind: Kind, source: Path, home: Path, old: Path | None) -> None:
        self.kind = kind
        self.source = source
        self.home = home
        self.old = old
        self.name = kind.name + (" over an older one" if old else "")
        self.prepare()
        self.before = contents(self.target) if old else {}
        self.run()
        self.after = contents(self.target)
        self.beside = sorted(os.listdir(home))

    @property
    def target(self) -> Path:
        return self.home / "out"

    def prepare(self) -> None:
        """Restore the state before the run."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        if self.old is not None:
            self.kind.run(self.old, self.target, False)

    def run(self) -> None:
        self.kind.run(self.source, self.target, self.old is not None)

    def state(self) -> str:
        """Return whether the target is the new output, the old one, or none. Raises Broken if it is anything else."""
        found = contents(self.target) if self.target.is_dir() else {}
        if found == self.after:
            state = NEW
        elif self.old is not None and found == self.before:
            state = OLD
        elif not any(name in found for name in self.kind.counts):
            state = ABSENT
        else:
            raise Broken(f"neither the old nor the new output, and not absent: {sorted(found)}")
        try:
            opened = dsconv.open_checkpoint(self.target)
        except DsconvError:
            if state != ABSENT:
                raise
        else:
            sources = [self.source] if state == NEW else [self.old] if state == OLD else [self.source, self.old]
            if not any(
                verify(dsconv.open_checkpoint(source), opened).equal for source in sources if source is not None
            ):
                raise Broken(f"{state}, and it opens with other tensors than the source's")
        return state

    def recover(self, state: str) -> None:
        """Run again as a user does, first without ``--force``. Raises Broken unless the output equals an undisturbed
        run's.
        """
        try:
            self.kind.run(self.source, self.target, False)
        except OutputError as error:
            if "already holds" not in str(error):
                raise Broken(f"{state}, and the next run says: {error}") from None
            # The output is absent: the run has finished what the killed one began.
            if contents(self.target) != (self.before if state == OLD else self.after):
                raise Broken(f"{state}, and a run that was refused changed it") from None
            if not self.kind.in_parts:
                self._nothing_left()
            self.kind.run(self.source, self.target, True)
        else:
            if state != ABSENT:
                raise Broken(f"{state}, and the next run replaced it without being told to")
            if self.old is not None:
                raise Broken("the older output was gone, and the next run did not finish the new one but made it again")
        if contents(self.target) != self.after:
            raise Broken(f"{state}, and the next run's output differs from an undisturbed one's")
        if sorted(os.listdir(self.home)) != self.beside:
            raise Broken(f"{state}, and the next run left {sorted(os.listdir(self.home))}")
        self._nothing_left()

    def _nothing_left(self) -> None:
        hidden = [str(path) for path in self.home.rglob("*") if "dsconv-" in path.name]
        if hidden:
            raise Broken(f"left behind: {hidden}")
