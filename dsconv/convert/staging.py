"""Output that is whole or absent.

Everything is written to a hidden folder inside the target, synced, and renamed into place, the file that makes the
folder a model (the index, or the only weights file) last. A run that is killed leaves the hidden folder, which the next
run takes over; the lock on it is the system's, and goes with the process.

Moving begins with one rename, which makes ``STARTED``: of the file that counts of an earlier output, if there is one.
Before it the earlier output is whole, and what is new is taken away where the run ends. After it the new output is
whole too, in the hidden folder, and it is the one that stays: the run, or the next one, finishes the renames.
``MOVING`` says which, and by which marks (inode, size, time) the files are known, so that nothing is touched that
somebody else has put there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsconv.checkpoint.storage.local import is_remote
from dsconv.errors import OutputError

STAGING = ".dsconv-partial"
LOCK = "lock"
MOVING = "moving.json"
STARTED = "started"
Marks = dict[str, list[int] | None]


def _mark(path: Path) -> list[int] | None:
    """What tells a file, or a folder, from another of its name; None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return (
        [found.st_ino] if path.is_dir() and not path.is_symlink() else [found.st_ino, found.st_size, found.st_mtime_ns]
    )


def _is_name(name: object) -> bool:
    """Whether it names something that lies in a folder, and not elsewhere."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


@dataclass(frozen=True)
class Move:
    """``names`` go into the target, the one that counts last; ``gone`` go before, the one that counts first. ``there``:
    what had a
    name of ``names`` in the target and is replaced by it.
    """

    gone: Marks
    names: Marks
    there: Marks

    @staticmethod
    def read(folder: Path) -> Move | None:
        """The move that was begun in a hidden folder and not finished; None where there is none, or what says so is
        not of this program.
        """
        try:
            found = json.loads((folder / MOVING).read_bytes())
            move = Move(**found)
            for marks in (move.gone, move.names, move.there):
                for name, mark in marks.items():
                    if not _is_name(name) or not all(type(number) is int for number in mark or ()):
                        return None
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        begun = os.path.lexists(folder / STARTED) and any(os.path.lexists(folder / name) for name in move.names)
        return move if begun else None


class Staging:
    """The hidden folder of one run. Use ``open_staging``."""

    def __init__(self, target: Path, sync: bool) -> None:
        self.target = target
        self.folder = target / STAGING
        self.sync = sync

    def path(self, name: str) -> Path:
        return self.folder / name

    def create(self, name: str, nbytes: int) -> int:
        """A descriptor of a new file of ``nbytes``. Raises OutputError when it cannot be made."""
        try:
            descriptor = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            os.truncate(descriptor, nbytes)
        except OSError as error:
            raise OutputError(f"{self.path(name)}: cannot be created with {nbytes} bytes: {error.strerror}") from None
        return descriptor

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole."""
        try:
            with open(self.path(name), "wb") as file:
                file.write(data)
                if self.sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path(name)}: cannot be written: {error.strerror}") from None

    def replace(self, name: str, data: bytes, target: Path) -> None:
        """A small file at ``target``, which may be there already, in one step."""
        self.write(name, data)
        self.path(name).replace(target)

    def commit(self, names: list[str], obsolete: Iterable[str]) -> None:
        """Take away ``obsolete`` files and folders of the target, then move ``names`` into it in their order.

        Of ``names`` the last one counts, of ``obsolete`` the first one: without it they are no output.
        """
        gone = {name: _mark(self.target / name) for name in obsolete if os.path.lexists(self.target / name)}
        for name in names:
            if name not in gone and (self.target / name).is_dir():
                raise OutputError(
                    f"{self.target / name} is a folder, and the output has a file of that name: move it, or choose"
                    " another"
                )
        there = {name: _mark(self.target / name) for name in names if name not in gone}
        move = Move(gone, {name: _mark(self.path(name)) for name in names}, there)
        try:
            self.replace(f"{MOVING}.new", json.dumps(asdict(move)).encode(), self.path(MOVING))
            self._sync(self.folder)
            if gone:
                (self.target / next(iter(gone))).replace(self.path(STARTED))
            else:
                self.path(STARTED).touch()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.target}: moving the finished files into place failed: {error.strerror}") from None
        try:
            self.finish(move)
        except OSError:  # once more: what failed in passing must not cost the output
            self.finish_or_say(move)

    def finish_or_say(self, move: Move) -> None:
        """``finish``; raises OutputError where it fails, or where somebody has put other files there since: both
        stay as they are.
        """
        for name, mark in move.names.items():
            now = _mark(self.target / name)
            if os.path.lexists(self.path(name)) and now not in (None, mark, move.gone.get(name), move.there.get(name)):
                raise OutputError(
                    f"{self.target}: a run was ended while it put its output in place, from {self.folder}, and since"
                    f" then {name} was put there by another: move one of the two away"
                )
        try:
            self.finish(move)
        except OSError as error:
            raise OutputError(
                f"{self.target}: moving the finished files into place failed: {error.strerror}. They are whole, in "
                f"{self.folder}, and the next run into this folder puts them in place"
            ) from None

    def finish(self, move: Move) -> None:
        """What is left to do of ``move`` once ``STARTED`` is there. Raises OSError, and may then be called again."""
        waiting = [name for name in move.names if os.path.lexists(self.path(name))]
        if len(waiting) == len(move.names):
            for name, mark in move.gone.items():
                old = self.target / name
                if _mark(old) != mark:
                    continue  # gone already
                if len(mark or ()) == 1:  # a folder: gone in one step; what it holds goes with the hidden folder
                    old.replace(self.path(f"old-{name}"))
                else:
                    old.unlink()
        self._sync(self.target)
        for name in waiting[:-1]:
            self.path(name).replace(self.target / name)
        self._sync(self.target)
        for name in waiting[-1:]:
            self.path(name).replace(self.target / name)
        self._sync(self.target)

    def _sync(self, folder: Path) -> None:
        if self.sync:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def open_staging(target: Path, sync: bool) -> Iterator[Staging]:
    """A locked, empty hidden folder in ``target``, which is made if need be; all of it is gone at the end.

    Raises OutputError when another run holds it, or when the folder cannot be made.
    """
    created = not target.exists() or os.listdir(target) == [STAGING]  # by this run, or by one that was killed
    staging = Staging(target, sync)
    lock = None
    try:
        try:
            staging.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(staging.path(LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            with contextlib.suppress(OSError):
                staging.folder.rmdir()  # not if another run is at work in it
            raise OutputError(f"{target}: cannot be written to: {error.strerror}") from None
        if not _locked(lock, staging.path(LOCK)):
            created = False
            os.close(lock)
            lock = None
            raise OutputError(f"{target}: another dsconv run is writing here; wait for it or choose another folder")
        move = Move.read(staging.folder)
        if move is not None:
            staging.finish_or_say(move)
        for leftover in staging.folder.iterdir():
            if leftover.name != LOCK:
                remove(leftover)
        yield staging
    finally:
        if lock is not None:
            move = Move.read(staging.folder)
            if move is not None:  # an interrupt came while files were moved
                with contextlib.suppress(OSError):
                    staging.finish_or_say(move)
            if Move.read(staging.folder) is None:  # else the only whole output is in there
                shutil.rmtree(staging.folder, ignore_errors=True)
            os.close(lock)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()  # only when nothing was put there


def settle(target: Path) -> None:
    """Finish what a killed run had begun to put in place in ``target``, or take away what it left. Another run's is
    let be.
    """
    if not is_remote(target) and (target / STAGING).is_dir():
        with contextlib.suppress(OutputError), open_staging(target, sync=True):
            pass


def refuse_existing(target: Path, names: list[str], what: str, force: bool) -> None:
    """Raise OutputError, without ``force``, where ``names`` of the target are an output."""
    whole = [name for name in names if not is_remote(target) or name not in debris(target)]
    if whole and not force:
        raise OutputError(f"{target} already holds {what} ({whole[0]}); give --force to replace it, or another folder")


def remove(path: Path) -> None:
    """Take a file, or a folder with all that is in it, away, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(descriptor: int, path: Path) -> bool:
    """Whether this run now has the lock, and has it on the file that is there: a run that ended took its own away."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def debris(target: Path) -> set[str]:
    """Names in ``target``, a folder of a store, that are parts of no output: a run was killed while it put another
    in place.
    """
    try:
        names = json.loads((target / STAGING / MOVING).read_bytes())
    except (OSError, ValueError):
        return set()
    if not isinstance(names, list) or not all(map(_is_name, names)):
        return set()  # not of this program: what it names is not to be taken away
    return set(names)


def require_space(target: Path, nbytes: int) -> None:
    """Raise OutputError when the file system of ``target`` has less than ``nbytes`` free."""
    existing = target
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OutputError(
            f"{target}: the output needs {nbytes:,} bytes and the disk has {free:,} free. Choose another folder, or"
            " --dtype bf16"
        )
