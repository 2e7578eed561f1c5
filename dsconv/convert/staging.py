"""Output on disk that is whole or absent.

Everything is written to a hidden folder inside the target, synced, and renamed into place, the commit marker (the file
that makes the folder an output) last. A run that is killed leaves the hidden folder, which the next run takes over. The
lock on it belongs to the system, and goes with the process.

Moving begins with one rename, which makes ``STARTED``: that of the older output's commit marker, if there is one.
Before this rename the older output is whole, and the new files are removed when the run ends. After it the new output
is whole too, in the hidden folder, and is the one that stays: the run, or the next one, finishes the renames.
``MOVING`` lists them, with the signatures (inode, size, time) of the files, so that files of others are never touched.

Everything goes through ``folders.py``: no link is followed, and only dsconv's own files are removed from the hidden
folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.unfinished import (
    MAX_MOVING_BYTES,
    MOVING,
    PARTS,
    STAGING,
    STARTED,
    debris,
    is_name,
    is_part_mark,
)
from dsconv.convert.folders import Folder, refuse_special
from dsconv.convert.marked_folders import MarkedFolder, open_marked
from dsconv.convert.progress import Progress, ProgressCounter
from dsconv.convert.staged_file import FileOptions, StagedFile, write_at
from dsconv.errors import OutputError

MAX_POINTER_BYTES = 1024  # of a file such as latest_universal, which holds the name of a folder
Signatures = dict[str, list[int] | None]


@dataclass(frozen=True)
class Move:
    """The renames that put an output into place, with the signatures of the files.

    Attributes:
        obsolete: the files that are removed first, beginning with the older output's commit marker.
        new: the files that move into the target, the commit marker last.
        replaced: the files in the target that ``new`` replaces, under the same names.
    """

    obsolete: Signatures
    new: Signatures
    replaced: Signatures

    def to_dict(self) -> dict[str, Signatures]:
        """Return the content of ``MOVING``. Later releases read it too, so the keys must stay."""
        return {"gone": self.obsolete, "names": self.new, "there": self.replaced}

    @staticmethod
    def read(folder: Folder) -> Move | None:
        """Return the move that was begun in a hidden folder and not finished, or None if there is none."""
        try:
            found = json.loads(folder.read(MOVING, MAX_MOVING_BYTES))
            move = Move(found["gone"], found["names"], found["there"])
            for signatures in (move.obsolete, move.new, move.replaced):
                for name, written in signatures.items():
                    if not is_name(name) or not all(type(number) is int for number in written or ()):
                        return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        begun = folder.stat(STARTED) is not None and any(folder.stat(name) is not None for name in move.new)
        return move if begun else None


class Staging:
    """The hidden folder of one run, in which an output on disk is gathered. Use ``open_staging``."""

    in_order = False

    def __init__(self, target: Folder, hidden: MarkedFolder, sync: bool, shared: bool = False) -> None:
        self.target = target.path
        self.folder = hidden.path
        self.sync = sync
        self._shared = shared  # with processes that write other parts of the same files
        self._target = target
        self._hidden = hidden

    def path(self, name: str) -> Path:
        """Return the path of a file in the hidden folder, for reading."""
        return self.folder / name

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> StagedFile:
        """Return a file of ``nbytes``, which its ``begin`` makes. With ``keep_open`` its descriptor stays open."""
        self._hidden.mark([name.split("/")[0]])
        if "/" in name:
            self._hidden.make_parents(name)
        options = FileOptions(keep_open, self.sync, self._shared)
        return StagedFile(self.path(name), partial(self._hidden.open_file, name), nbytes, options)

    def _begin(self, name: str) -> None:
        """Mark a name; where other processes were here before, remove what one that was killed has left under it."""
        self._hidden.mark([name])
        if self._shared:
            self._hidden.remove_marked(name)

    def digests(self, names: Sequence[str], progress: Progress | None) -> dict[str, str]:
        """Return the sha256 of each of the finished files ``names``."""
        import hashlib  # only --sha256 needs it

        counter = ProgressCounter("sha256", sum(self.path(name).lstat().st_size for name in names), progress)
        found = {}
        for name in names:
            digest = hashlib.sha256()
            with os.fdopen(self._hidden.open_file(name, os.O_RDONLY), "rb", buffering=0) as file:
                while chunk := file.read(8 << 20):
                    digest.update(chunk)
                    counter.add(len(chunk))
            found[name] = digest.hexdigest()
        return found

    def link(self, name: str, existing: str) -> None:
        """Give a finished file a second name, by a hard link, or by a copy where the file system has none."""
        self._begin(name)
        descriptor = self._hidden.descriptor
        try:
            os.link(existing, name, src_dir_fd=descriptor, dst_dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            with (
                os.fdopen(self._hidden.open_file(existing, os.O_RDONLY), "rb") as source,
                self.new_file(name) as target,
            ):
                while data := source.read(8 << 20):
                    target.write(data)
                if self.sync:
                    target.flush()
                    os.fsync(target.fileno())

    def new_file(self, name: str) -> BinaryIO:
        """Make a file and return it, open for writing. Raises OutputError or OSError."""
        self._begin(name)
        return os.fdopen(self._hidden.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole. Raises OutputError."""
        try:
            self._begin(name)
            descriptor = self._hidden.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_at(descriptor, memoryview(data), 0)
                if self.sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.path(name)}: cannot be written: {error.strerror}") from None

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file beside the target, in one step. Raises OSError or OutputError."""
        with Folder.open(path.parent) as folder:
            refuse_special(folder, [path.name])
            if folder.stat(path.name) is not None:
                _require_pointer(folder, path.name)
            self.write(f"{path.name}.new", data)
            self._hidden.rename(f"{path.name}.new", folder, path.name)

    def commit(
        self, names: Sequence[str], obsolete: Sequence[str], verify: Callable[[Path], None] | None = None
    ) -> None:
        """Remove ``obsolete`` files and folders of the target, then move ``names`` into it in their order.

        Args:
            names: what was written, the commit marker last.
            obsolete: an older output, its commit marker first.
            verify: called before with the folder in which everything lies; what it raises ends the commit.

        Raises:
            OutputError: a folder, a link or something else that is no file has one of the names, or the files cannot
                be moved.
        """
        if verify is not None:
            verify(self.folder)
        target, hidden = self._target, self._hidden
        new = {name: hidden.signature(name) for name in names}
        unknown = [name for name, found in new.items() if found is None]
        if unknown:
            raise OutputError(f"{self.path(unknown[0])} is gone: another program clears that folder; run again")
        refuse_special(target, [*obsolete, *names], {name for name, found in new.items() if len(found or ()) == 1})
        old = {name: target.signature(name) for name in obsolete if target.stat(name) is not None}
        replaced = {name: target.signature(name) for name in names if name not in old}
        move = Move(old, new, replaced)
        try:
            if self.sync:
                hidden.sync_below()
            hidden.mark([MOVING, STARTED, *(f"old-{name}" for name in old)])
            if self.sync:
                hidden.sync_marks()
            self.write(f"{MOVING}.new", json.dumps(move.to_dict()).encode())
            hidden.rename(f"{MOVING}.new", hidden, MOVING)
            self._sync(hidden)
            if old:
                target.rename(next(iter(old)), hidden, STARTED)
            else:
                os.close(hidden.open_file(STARTED, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.target}: moving the finished files into place failed: {error.strerror}") from None
        try:
            self.finish(move)
        except OSError:  # try again: a transient failure must not cost the output
            self.finish_or_say(move)

    def finish_or_say(self, move: Move) -> None:
        """Finish ``move``.

        Raises:
            OutputError: it failed, or somebody has put other files there since. Both stay as they are.
        """
        for name, written in move.new.items():
            now = self._target.signature(name)
            known = (None, written, move.obsolete.get(name), move.replaced.get(name))
            if self._hidden.stat(name) is not None and now not in known:
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
        """Do what is left of ``move`` once ``STARTED`` exists. Raises OSError, and may then be called again."""
        target, hidden = self._target, self._hidden
        waiting = [name for name in move.new if hidden.stat(name) is not None]
        if len(waiting) == len(move.new):
            for name, written in move.obsolete.items():
                if target.signature(name) != written:
                    continue  # gone already
                if len(written or ()) == 1:  # a folder: gone in one step; what it holds goes with the hidden folder
                    target.rename(name, hidden, f"old-{name}")
                else:
                    target.unlink(name)
        self._sync(target)
        for name in waiting[:-1]:
            hidden.rename(name, target, name)
        self._sync(target)
        for name in waiting[-1:]:
            hidden.rename(name, target, name)
        self._sync(target)

    def _sync(self, folder: Folder) -> None:
        if self.sync:
            folder.sync()


def _require_pointer(folder: Folder, name: str) -> None:
    """Raise OutputError for a file that holds more than a name, which dsconv did not write."""
    try:
        text = folder.read(name, MAX_POINTER_BYTES).strip()
    except OSError as error:
        raise OutputError(f"it is not a pointer to a checkpoint: {error}") from None
    if b"\n" in text:
        raise OutputError("it holds more than the name of a checkpoint")


@contextlib.contextmanager
def open_staging(target: Path, sync: bool) -> Iterator[Staging]:
    """Open a locked, empty hidden folder in ``target``, which is made if need be. The hidden folder is removed at the
    end.

    Raises:
        OutputError: another run holds it, the folder cannot be made or is a link, or the hidden folder is not
            dsconv's own.
    """
    created = is_missing_or_debris(target)
    try:
        with _locked(target, sync) as staging:
            yield staging
    finally:
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()  # this works only if nothing was put there


def is_missing_or_debris(target: Path) -> bool:
    """Return whether this run makes ``target``, or a killed one did."""
    try:
        return not target.exists() or os.listdir(target) == [STAGING]
    except OSError:
        return False


@contextlib.contextmanager
def _locked(target: Path, sync: bool) -> Iterator[Staging]:
    with Folder.open(target, make=True) as folder:
        try:
            hidden = open_marked(folder, STAGING)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{target}: cannot be written to: {error.strerror}") from None
        if hidden is None:
            raise OutputError(f"{target}: another dsconv run is writing here; wait for it or choose another folder")
        staging = Staging(folder, hidden, sync)
        with hidden:
            move = Move.read(hidden)
            if move is not None:
                staging.finish_or_say(move)
            refuse_parts(hidden)
            try:
                hidden.clear()
            except OutputError:
                raise
            except OSError as error:
                raise OutputError(f"{hidden.path}: cannot be cleared: {error.strerror}") from None
            try:
                yield staging
            finally:
                conclude(staging, hidden)


def conclude(staging: Staging, hidden: MarkedFolder) -> None:
    """Finish a move that was begun, and remove the hidden folder, unless it holds the only whole output."""
    move = Move.read(hidden)
    if move is not None:  # an interrupt came while files were moved
        with contextlib.suppress(OSError):
            staging.finish_or_say(move)
    if Move.read(hidden) is None:
        with contextlib.suppress(OSError):  # the next run tries again
            hidden.end()


def refuse_parts(hidden: Folder) -> None:
    """Raise OutputError where parts of an output lie in a hidden folder, and none of it was moved yet."""
    if hidden.stat(STARTED) is None and hidden.stat(PARTS) is not None:
        done = [name for name in hidden.names() if is_part_mark(name)]
        raise OutputError(
            f"{hidden.path} holds an output that is written in parts, of which {len(done)} are done: run the others, by"
            f" the command that wrote these, or remove {hidden.path}"
        )


def recover_interrupted(target: Path) -> None:
    """Finish what a killed run had begun to put into place in ``target``, or remove what it left.

    A run in progress there is left alone, and so is a hidden folder that is not dsconv's own.
    """
    if not is_remote(target) and not target.is_symlink() and os.path.lexists(target / STAGING):
        with contextlib.suppress(OutputError), open_staging(target, sync=True):
            pass


def finish_interrupted(target: Path) -> None:
    """Finish what a killed run had begun to put into place in ``target``, before ``target`` is read.

    Nothing else is touched: the files of a run that had not begun to move them stay until another run writes here.
    """
    if is_remote(target) or target.is_symlink() or not os.path.lexists(target / STAGING):
        return
    with contextlib.suppress(OSError), Folder.open(target) as folder:
        hidden = open_marked(folder, STAGING)
        if hidden is not None:
            with hidden:
                move = Move.read(hidden)
                if move is not None:
                    Staging(folder, hidden, sync=True).finish_or_say(move)
                    hidden.end()


def refuse_existing(target: Path, names: list[str], what: str, force: bool) -> None:
    """Raise OutputError, without ``force``, where ``names`` of the target are an output."""
    whole = [name for name in names if not is_remote(target) or name not in debris(target)]
    if whole and not force:
        raise OutputError(f"{target} already holds {what} ({whole[0]}); give --force to replace it, or another folder")


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
