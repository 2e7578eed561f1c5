"""Output that is whole or absent.

Everything is written to a hidden folder inside the target, synced, and renamed into place, the file that makes the
folder a model (the index, or the only weights file) last. A run that is killed leaves the hidden folder, which the next
run takes over; the lock on it is the system's, and goes with the process. A run that is killed while it renames leaves
in the hidden folder the names of what it was moving, so that the next one knows those files for debris.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsconv.errors import OutputError

STAGING = ".dsconv-partial"
LOCK = "lock"
MOVING = "moving.json"
FLUSH_BYTES = 64 << 20  # start the disk's work while the copy goes on, not after it


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

    def commit(self, names: list[str], obsolete: Iterable[str]) -> None:
        """Take away ``obsolete`` files and folders of the target, then move ``names`` into it in their order; the last one counts."""
        self.write(MOVING, json.dumps(names).encode())
        try:
            for name in obsolete:
                old = self.target / name
                if old.is_dir() and not old.is_symlink():
                    old.replace(self.path(f"old-{name}"))  # gone in one step; what it holds goes with the hidden folder
                else:
                    old.unlink(missing_ok=True)
            self._sync_folder()
            for name in names[:-1]:
                self.path(name).replace(self.target / name)
            self._sync_folder()
            self.path(names[-1]).replace(self.target / names[-1])
            self._sync_folder()
        except OSError as error:
            raise OutputError(f"{self.target}: moving the finished files into place failed: {error.strerror}") from None

    def _sync_folder(self) -> None:
        if self.sync:
            descriptor = os.open(self.target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def open_staging(target: Path, sync: bool) -> Iterator[Staging]:
    """A locked, empty hidden folder in ``target``, which is made if need be; all of it is gone at the end.

    Raises OutputError when another run holds it, or when the folder cannot be made.
    """
    created = not target.exists()
    staging = Staging(target, sync)
    lock = None
    try:
        try:
            staging.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(staging.path(LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written to: {error.strerror}") from None
        if not _locked(lock, staging.path(LOCK)):
            created = False
            os.close(lock)
            lock = None
            raise OutputError(f"{target}: another dsconv run is writing here; wait for it or choose another folder")
        for leftover in staging.folder.iterdir():
            if leftover.name != LOCK:
                remove(leftover)
        yield staging
    finally:
        if lock is not None:
            shutil.rmtree(staging.folder, ignore_errors=True)
            os.close(lock)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()  # only when nothing was put there


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
    """Names of files in ``target`` that a run was killed while moving there: parts of no model."""
    try:
        names = json.loads((target / STAGING / MOVING).read_bytes())
    except (OSError, ValueError):
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
