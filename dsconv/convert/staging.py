"""Output that is whole or absent.

Everything is written to a hidden folder inside the target, synced, and renamed into place, the file that makes the
folder a model (the index, or the only weights file) last. A run that is killed leaves the hidden folder, which the next
run takes over; the lock on it is the system's, and goes with the process.

What lies in the target between the moment when the file that counts of an earlier output is taken away and the moment
when that of the new one is in place is debris: parts of no output, which the next run takes away. ``MOVING`` holds the
names, the one that counts last. They are debris from when ``STARTED`` is there, which is the earlier output's file itself,
renamed, until the last name has left the hidden folder: both moments are one rename, so no kill can fall inside of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsconv.checkpoint.storage import is_remote
from dsconv.errors import OutputError

STAGING = ".dsconv-partial"
LOCK = "lock"
MOVING = "moving.json"
STARTED = "started"


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
        gone = [name for name in obsolete if os.path.lexists(self.target / name)]
        try:
            self.replace(f"{MOVING}.new", json.dumps([*gone, *names]).encode(), self.path(MOVING))
            self._sync(self.folder)
            if gone:
                (self.target / gone.pop(0)).replace(self.path(STARTED))
            else:
                self.path(STARTED).touch()
            for name in gone:
                old = self.target / name
                if old.is_dir() and not old.is_symlink():
                    old.replace(self.path(f"old-{name}"))  # gone in one step; what it holds goes with the hidden folder
                else:
                    old.unlink(missing_ok=True)
            self._sync(self.target)
            for name in names[:-1]:
                self.path(name).replace(self.target / name)
            self._sync(self.target)
            self.path(names[-1]).replace(self.target / names[-1])
            self._sync(self.target)
        except OSError as error:
            raise OutputError(f"{self.target}: moving the finished files into place failed: {error.strerror}") from None

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
        _take_debris_away(target)
        for leftover in staging.folder.iterdir():
            if leftover.name != LOCK:
                remove(leftover)
        yield staging
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                _take_debris_away(target)  # of this run, if it failed while it moved files
            shutil.rmtree(staging.folder, ignore_errors=True)
            os.close(lock)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()  # only when nothing was put there


def refuse_existing(target: Path, names: list[str], what: str, force: bool) -> None:
    """Raise OutputError, without ``force``, where ``names`` of the target are a whole output and not what a killed run left."""
    known = debris(target)
    whole = [name for name in names if name not in known]
    if whole and not force:
        if not is_remote(target) and (target / STAGING).is_dir():
            with contextlib.suppress(OutputError), open_staging(target, sync=False):
                pass  # what a killed run left goes
        raise OutputError(f"{target} already holds {what} ({whole[0]}); give --force to replace it, or another folder")


def _take_debris_away(target: Path) -> None:
    for name in debris(target):
        remove(target / name)


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
    """Names in ``target`` that are parts of no output: a run was killed while it put another in place."""
    staging = target / STAGING
    try:
        names = json.loads((staging / MOVING).read_bytes())
    except (OSError, ValueError):
        return set()
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n == Path(n).name and n not in ("", "..") for n in names):
        return set()  # not of this program: what it names is not to be taken away
    if not is_remote(target) and not (os.path.lexists(staging / STARTED) and os.path.lexists(staging / names[-1])):
        return set()
    return set(names)


def require_space(target: Path, nbytes: int) -> None:
    """Raise OutputError when the file system of ``target`` has less than ``nbytes`` free."""
    existing = target
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OutputError(
            f"{target}: the output needs {nbytes:,} bytes and the disk has {free:,} free. Choose another folder, or --dtype bf16"
        )
