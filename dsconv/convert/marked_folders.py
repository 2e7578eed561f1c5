"""Hidden folders that dsconv made, and may clear: those of a run that writes, of a watcher, and of the engine.

A ``MarkedFolder`` is a hidden folder that dsconv made. Its file ``lock`` says so: it holds the folder's own inode,
which a folder that was downloaded or copied cannot have, and the names of what dsconv put there. Only those are ever
removed. The lock itself goes last, so that a run which takes the folder over never loses a file to the run before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dsconv.convert.folders import Folder, is_plain, write_all
from dsconv.errors import OutputError

LOCK = "lock"
ALL = "*"  # the mark of a folder that dsconv has to itself: other libraries write into it at its bidding
MAX_LOCK_BYTES = 64 << 20


class MarkedFolder(Folder):
    """A hidden folder that dsconv made, locked for this process. Use ``open_marked``."""

    def __init__(self, descriptor: int, path: Path, parent: Folder, lock: int, marked: set[str]) -> None:
        super().__init__(descriptor, path)
        self._parent = parent
        self._lock = lock
        self._marked = marked

    def mark(self, names: Sequence[str]) -> None:
        """Note that dsconv makes files or folders of these names here, before it does.

        Raises:
            OutputError: it cannot be noted, and so the files must not be made.
        """
        new = [name for name in names if name not in self._marked]
        try:
            write_all(self._lock, "".join(json.dumps(name) + "\n" for name in new).encode())
        except OSError as error:
            raise OutputError(f"{self.path / LOCK}: cannot be written: {error.strerror}") from None
        self._marked.update(new)

    def sync_marks(self) -> None:
        """Have the marks on disk. Raises OSError."""
        os.fsync(self._lock)

    def remove_marked(self, name: str) -> None:
        """Remove what dsconv made here under a name, a path with ``/``, if it is there.

        Raises:
            OutputError: it was not made by dsconv.
            OSError: the system refuses.
        """
        self._check(name)
        *folders, last = name.split("/")
        with contextlib.ExitStack() as stack:
            folder: Folder = self
            for part in folders:
                folder = stack.enter_context(folder.inner(part))
            folder.remove(last)

    def clear(self) -> None:
        """Remove all that dsconv made here, but the lock.

        Raises:
            OutputError: something else is here, which the message names. Nothing is removed then.
            OSError: the system refuses.
        """
        names = [name for name in self.names() if name != LOCK]
        for name in names:
            self._check(name)
        for name in names:
            self.remove(name)

    def end(self) -> None:
        """Remove the folder, its lock last, unless something else is in it. Raises OutputError or OSError."""
        self.clear()
        self.unlink(LOCK)
        os.rmdir(self.path.name, dir_fd=self._parent.descriptor)  # fails where another run has begun in it

    def _check(self, name: str) -> None:
        found = self.stat(name)
        if found is not None and (self._marked.isdisjoint((name, ALL)) or not is_plain(found)):
            raise OutputError(
                f"{self.path / name} was not put there by dsconv, which clears that folder only of its own files: move"
                f" it away, or remove {self.path} yourself"
            )

    def close(self) -> None:
        """Let go of the lock and of the folder."""
        os.close(self._lock)
        super().close()


def open_marked(parent: Folder, name: str) -> MarkedFolder | None:
    """Open dsconv's own folder ``name`` in ``parent`` and lock it. It is made if need be.

    Returns:
        The folder; None if another process has the lock.

    Raises:
        OutputError: it is a link, no folder, or a folder that dsconv did not make here. Nothing in it was touched.
        OSError: the system refuses.
    """
    made = parent.stat(name) is None
    folder = parent.inner(name, make=made)
    lock = None
    try:
        inside = folder.names()
        if LOCK not in inside and inside:
            raise _not_ours(folder, inside[0])
        lock = folder.open_file(LOCK, os.O_RDWR | os.O_APPEND | (0 if inside else os.O_CREAT))
        found = os.fstat(lock)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # another name of it is somebody's file
            raise _not_ours(folder, LOCK)
        if not _is_locked(lock, folder):
            os.close(lock)
            folder.close()
            return None
        marked = _read_marks(lock, folder)
        return MarkedFolder(folder.descriptor, folder.path, parent, lock, marked)
    except BaseException:
        if lock is not None:
            if made:
                with contextlib.suppress(OSError):
                    folder.unlink(LOCK)
            os.close(lock)
        folder.close()
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent.descriptor)
        raise


def open_shared(parent: Folder, name: str) -> MarkedFolder | None:
    """Open dsconv's own folder ``name`` in ``parent``, and share its lock with other processes that do the same.

    Returns:
        The folder; None if it is not there, is not marked yet, or another process has the lock for itself.

    Raises:
        OutputError: it is a link or no folder.
        OSError: the system refuses.
    """
    folder = lock = None
    try:
        folder = parent.inner(name)
        lock = folder.open_file(LOCK, os.O_RDWR | os.O_APPEND)
        found = os.fstat(lock)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and _is_locked(lock, folder, fcntl.LOCK_SH):
            marked = _marked(_read_lock(lock), _header(folder))
            if marked is not None:
                shared = MarkedFolder(folder.descriptor, folder.path, parent, lock, marked)
                folder = lock = None
                return shared
    except FileNotFoundError:
        pass
    finally:
        if lock is not None:
            os.close(lock)
        if folder is not None:
            folder.close()
    return None


def _is_locked(lock: int, folder: Folder, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock; return whether it is on the file that is there: a run that ended removed its own."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    found = folder.stat(LOCK)
    return found is not None and os.path.samestat(os.fstat(lock), found)


def _header(folder: Folder) -> bytes:
    return f"dsconv made this folder, whose inode is {os.fstat(folder.descriptor).st_ino}, and in it:\n".encode()


def _read_lock(lock: int) -> bytes:
    size = os.fstat(lock).st_size
    return os.pread(lock, size, 0) if size <= MAX_LOCK_BYTES else b""


def _read_marks(lock: int, folder: Folder) -> set[str]:
    """Return the names that were marked, and write the folder's own mark where it is new."""
    header, size, data = _header(folder), os.fstat(lock).st_size, _read_lock(lock)
    marked = _marked(data, header)
    if marked is None:
        if size > len(header) or not header.startswith(data) or folder.names() != [LOCK]:
            raise _not_ours(folder, LOCK)
        os.ftruncate(lock, 0)  # a run was killed while it wrote the mark
        write_all(lock, header)
        return set()
    whole = data.rindex(b"\n") + 1
    if whole != size:
        os.ftruncate(lock, whole)  # a run was killed while it marked a file, which it had not made yet
    return marked


def _marked(data: bytes, header: bytes) -> set[str] | None:
    """Return the names that a lock's content marks; None where it does not begin with ``header``."""
    if not data.startswith(header):
        return None
    marked = set()
    for line in data[len(header) : data.rindex(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError):
            marked.add(str(json.loads(line)))
    return marked


def _not_ours(folder: Folder, name: str) -> OutputError:
    return OutputError(
        f"{folder.path} was not made by dsconv on this disk (it holds {name}), so that nothing in it is touched: move"
        " it away"
    )
