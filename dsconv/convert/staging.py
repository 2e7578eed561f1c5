"""Output on the disk that is whole or absent.

Everything is written to a hidden folder inside the target, synced, and renamed into place, the commit marker (the file
that makes the folder an output) last. A run that is killed leaves the hidden folder, which the next run takes over. The
lock on it belongs to the system, and goes with the process.

Moving begins with one rename, which makes ``STARTED``: of the commit marker of an older output, if there is one. Before
it the older output is whole, and what is new is taken away when the run ends. After it the new output is whole too, in
the hidden folder, and is the one that stays: the run, or the next one, finishes the renames. ``MOVING`` says which, and
by which signatures (inode, size, time) the files are known, so that nothing is touched that somebody else put there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconv.checkpoint.storage.local import is_remote
from dsconv.convert.progress import Progress
from dsconv.convert.staged_file import StagedFile
from dsconv.errors import OutputError

STAGING = ".dsconv-partial"
LOCK = "lock"
MOVING = "moving.json"
STARTED = "started"
Signatures = dict[str, list[int] | None]


def signature(path: Path) -> list[int] | None:
    """Return what tells a file (inode, size, time) or a folder (inode) from another of its name; None for nothing."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return [found.st_ino] if stat.S_ISDIR(found.st_mode) else [found.st_ino, found.st_size, found.st_mtime_ns]


def _is_name(name: object) -> bool:
    """Return whether it names something that lies in a folder, and not elsewhere."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


@dataclass(frozen=True)
class Move:
    """The renames that put an output into place, by the signatures of the files.

    Attributes:
        obsolete: what goes before, the commit marker of the older output first.
        new: what goes into the target, the commit marker last.
        replaced: what had a name of ``new`` in the target, and is replaced by it.
    """

    obsolete: Signatures
    new: Signatures
    replaced: Signatures

    def to_dict(self) -> dict[str, Signatures]:
        """Return what ``MOVING`` holds: a later release reads it too, so the keys stay."""
        return {"gone": self.obsolete, "names": self.new, "there": self.replaced}

    @staticmethod
    def read(folder: Path) -> Move | None:
        """Return the move that was begun in a hidden folder and not finished.

        None where there is none, and where what says so was not written by this program.
        """
        try:
            found = json.loads((folder / MOVING).read_bytes())
            move = Move(found["gone"], found["names"], found["there"])
            for signatures in (move.obsolete, move.new, move.replaced):
                for name, written in signatures.items():
                    if not _is_name(name) or not all(type(number) is int for number in written or ()):
                        return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        begun = os.path.lexists(folder / STARTED) and any(os.path.lexists(folder / name) for name in move.new)
        return move if begun else None


class Staging:
    """The hidden folder of one run, in which an output of the disk is gathered. Use ``open_staging``."""

    in_order = False

    def __init__(self, target: Path, sync: bool) -> None:
        self.target = target
        self.folder = target / STAGING
        self.sync = sync
        self._folders = {self.folder}

    def path(self, name: str) -> Path:
        return self.folder / name

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> StagedFile:
        """Return a file of ``nbytes``, which its ``begin`` makes. With ``keep_open`` its descriptor stays open."""
        path = self.path(name)
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        return StagedFile(path, nbytes, keep_open, self.sync)

    def digests(self, names: Sequence[str], progress: Progress | None) -> dict[str, str]:
        """Return the sha256 of each of the finished files ``names``."""
        total = sum(self.path(name).stat().st_size for name in names)
        done = 0
        found = {}
        for name in names:
            digest = hashlib.sha256()
            with open(self.path(name), "rb", buffering=0) as file:
                while chunk := file.read(8 << 20):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress("sha256", done, total)
            found[name] = digest.hexdigest()
        return found

    def link(self, name: str, existing: str) -> None:
        """Give a finished file a second name, by a hard link, or by a copy where the file system has none."""
        try:
            os.link(self.path(existing), self.path(name))
        except OSError:
            self.write(name, b"")
            with open(self.path(existing), "rb") as source, open(self.path(name), "wb") as target:
                while data := source.read(8 << 20):
                    target.write(data)
                if self.sync:
                    target.flush()
                    os.fsync(target.fileno())

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole. Raises OutputError."""
        try:
            with open(self.path(name), "wb") as file:
                file.write(data)
                if self.sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path(name)}: cannot be written: {error.strerror}") from None

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file anywhere on this file system, in one step. Raises OSError or OutputError."""
        self.write(f"{path.name}.new", data)
        self.path(f"{path.name}.new").replace(path)

    def commit(
        self, names: Sequence[str], obsolete: Iterable[str], verify: Callable[[Path], None] | None = None
    ) -> None:
        """Take away ``obsolete`` files and folders of the target, then move ``names`` into it in their order.

        Args:
            names: what was written, the commit marker last.
            obsolete: an older output, its commit marker first.
            verify: called before with the folder in which everything lies; what it raises ends the commit.

        Raises:
            OutputError: a folder has one of the names, or the files cannot be moved.
        """
        if verify is not None:
            verify(self.folder)
        if self.sync:
            for folder in sorted({parent for made in self._folders for parent in (made, *made.parents)}):
                if folder.is_relative_to(self.folder) and folder != self.folder:
                    self._sync(folder)
        old = {name: signature(self.target / name) for name in obsolete if os.path.lexists(self.target / name)}
        for name in names:
            if name not in old and (self.target / name).is_dir():
                raise OutputError(
                    f"{self.target / name} is a folder, and the output has a file of that name: move it, or choose"
                    " another"
                )
        replaced = {name: signature(self.target / name) for name in names if name not in old}
        move = Move(old, {name: signature(self.path(name)) for name in names}, replaced)
        try:
            self.replace(self.path(MOVING), json.dumps(move.to_dict()).encode())
            self._sync(self.folder)
            if old:
                (self.target / next(iter(old))).replace(self.path(STARTED))
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
        """Finish ``move``.

        Raises:
            OutputError: it failed, or somebody has put other files there since. Both stay as they are.
        """
        for name, written in move.new.items():
            now = signature(self.target / name)
            known = (None, written, move.obsolete.get(name), move.replaced.get(name))
            if os.path.lexists(self.path(name)) and now not in known:
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
        """Do what is left of ``move`` once ``STARTED`` is there. Raises OSError, and may then be called again."""
        waiting = [name for name in move.new if os.path.lexists(self.path(name))]
        if len(waiting) == len(move.new):
            for name, written in move.obsolete.items():
                old = self.target / name
                if signature(old) != written:
                    continue  # gone already
                if len(written or ()) == 1:  # a folder: gone in one step; what it holds goes with the hidden folder
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
    """Open a locked, empty hidden folder in ``target``, which is made if need be. All of it is gone at the end.

    Raises:
        OutputError: another run holds it, or the folder cannot be made.
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


def recover_interrupted(target: Path) -> None:
    """Finish what a killed run had begun to put into place in ``target``, or take away what it left.

    A run that is at work there is let be.
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
    """Take away a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(descriptor: int, path: Path) -> bool:
    """Return whether this run now has the lock, on the file that is there: a run that ended took its own away."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def debris(target: Path) -> set[str]:
    """Return the names in ``target``, a folder of a store, that are parts of no output.

    A run that was killed while it put another output into place left them.
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
