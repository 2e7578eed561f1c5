"""Folders by their descriptors: the one way in which dsconv creates, clears and renames files on the disk.

Names are looked up in an open folder, and no link is followed: neither where a file is created or opened, nor where a
folder is cleared. Only the path of the folder that the user names is looked up as usual, and even that may not end in a
link.

A ``MarkedFolder`` is a hidden folder that dsconv made. Its file ``lock`` says so: it holds the folder's own inode,
which a folder that was downloaded or copied cannot have, and the names of what dsconv put there. Only those are ever
removed. The lock itself goes last, so that a run which takes the folder over never loses a file to the run before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from dsconv.errors import OutputError

LOCK = "lock"
ALL = "*"  # the mark of a folder that dsconv has to itself: other libraries write into it at its bidding
MAX_LOCK_BYTES = 64 << 20
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # the last, so that a fifo is not waited for


class Folder:
    """An open folder. ``path`` is where it was found, for messages. A context manager that closes it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @staticmethod
    def open(path: Path, make: bool = False) -> Folder:
        """Open the folder that the user named.

        Args:
            path: may lead through links, but must not be one itself.
            make: make it, and those above it, if need be.

        Raises:
            OutputError: it is a link or no folder, or the system refuses.
        """
        try:
            if make:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
            return Folder(os.open(path, FOLDER_FLAGS), path)
        except OSError as error:
            refuse_link(path)
            raise OutputError(f"{path}: cannot be written to: {error.strerror}") from None

    def inner(self, name: str, make: bool = False) -> Folder:
        """Open a folder in this one.

        Raises:
            OutputError: it is a link or no folder.
            OSError: the system refuses.
        """
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
        try:
            return Folder(os.open(name, FOLDER_FLAGS, dir_fd=self.descriptor), self.path / name)
        except OSError:
            found = self.stat(name)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                raise OutputError(
                    f"{self.path / name} is {kind_of(found)}, and dsconv keeps a folder of that name there: move it"
                    " away"
                ) from None
            raise

    def open_file(self, name: str, flags: int) -> int:
        """Open a file below this folder, by a path with ``/``, and return its descriptor.

        Raises:
            OSError: the system refuses, or a part of the path is a link.
        """
        *folders, last = name.split("/")
        with contextlib.ExitStack() as stack:
            folder = self
            for part in folders:
                folder = stack.enter_context(folder.inner(part))
            return os.open(last, flags | FILE_FLAGS, 0o666, dir_fd=folder.descriptor)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Return the content of a regular file. Raises OSError where it is none, or larger than ``limit_bytes``."""
        with os.fdopen(self.open_file(name, os.O_RDONLY), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(f"{self.path / name} is no regular file")
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise OSError(f"{self.path / name} is larger than {limit_bytes} bytes")
        return data

    def make_parents(self, name: str) -> None:
        """Make the folders on the way to ``name``, a path with ``/``. Raises OSError or OutputError."""
        with contextlib.ExitStack() as stack:
            folder = self
            for part in name.split("/")[:-1]:
                folder = stack.enter_context(folder.inner(part, make=True))

    def names(self) -> list[str]:
        """Return the names of all that is in the folder, sorted."""
        return sorted(os.listdir(self.descriptor))

    def stat(self, name: str) -> os.stat_result | None:
        """Return what the system says of a name, of a link and not of what it leads to; None where there is none."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return None

    def signature(self, name: str) -> list[int] | None:
        """Return what tells a file (inode, size, time) or a folder (inode) from another of its name."""
        found = self.stat(name)
        if found is None:
            return None
        return [found.st_ino] if stat.S_ISDIR(found.st_mode) else [found.st_ino, found.st_size, found.st_mtime_ns]

    def rename(self, name: str, folder: Folder, new: str) -> None:
        """Move a file or folder of this one into ``folder``, in one step. A file that is there is replaced."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=folder.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file, or a link itself. Raises OSError."""
        os.unlink(name, dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there. A link is removed and not followed.

        Raises:
            OSError: the system refuses. What was removed so far stays removed.
        """
        found = self.stat(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.unlink(name)
            return
        with self.inner(name) as folder:
            for inside in folder.names():
                folder.remove(inside)
        os.rmdir(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Have the names in this folder on the disk. Raises OSError."""
        os.fsync(self.descriptor)

    def sync_below(self, files: bool = False) -> None:
        """Have the names in all folders below this one on the disk, and with ``files`` their files. Raises OSError."""
        for name in self.names():
            found = self.stat(name)
            if found is not None and stat.S_ISDIR(found.st_mode):
                with self.inner(name) as folder:
                    folder.sync_below(files)
                    folder.sync()
            elif files and found is not None and stat.S_ISREG(found.st_mode):
                descriptor = self.open_file(name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def replace_file(self, name: str, data: bytes, fresh: str | None = None) -> None:
        """Replace a small file in one step. It is on the disk when this returns.

        Args:
            name: the file.
            data: its new content.
            fresh: the name under which it is written first, which must be free (default: one that nobody has).

        Raises:
            OutputError: a link, or something else that is no file, has the name.
            OSError: the system refuses. The file is as it was then.
        """
        refuse_special(self, [name])
        fresh = fresh or f".{name}.{secrets.token_hex(4)}"
        descriptor = self.open_file(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.rename(fresh, self, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(fresh)
            raise
        self.sync()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
            _write_all(self._lock, "".join(json.dumps(name) + "\n" for name in new).encode())
        except OSError as error:
            raise OutputError(f"{self.path / LOCK}: cannot be written: {error.strerror}") from None
        self._marked.update(new)

    def sync_marks(self) -> None:
        """Have the marks on the disk. Raises OSError."""
        os.fsync(self._lock)

    def remove_marked(self, name: str) -> None:
        """Remove what dsconv made here under a name, if it is there.

        Raises:
            OutputError: it was not made by dsconv.
            OSError: the system refuses.
        """
        self._check(name)
        self.remove(name)

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
        if found is not None and (self._marked.isdisjoint((name, ALL)) or not _is_plain(found)):
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
        The folder; None where another process has the lock.

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
        if not stat.S_ISREG(os.fstat(lock).st_mode):
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


@contextlib.contextmanager
def opened(path: Path, make: bool = False) -> Iterator[Folder]:
    """Open the folder that the user named; see ``Folder.open``. A path whose last part is a link is looked up first."""
    with Folder.open(path.resolve() if path.is_symlink() else path, make) as folder:
        yield folder


def refuse_link(path: Path) -> None:
    """Raise OutputError where ``path`` is a link."""
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link, and dsconv writes through none: name the folder that it leads to,"
            f" {os.path.realpath(path)}"
        )


def refuse_special(folder: Folder, names: Iterable[str], folders: Collection[str] = ()) -> None:
    """Refuse to replace what dsconv cannot have made, so that nothing of that kind is lost.

    Args:
        folder: where the names are looked up.
        names: may be files, or absent.
        folders: those of ``names`` that may be folders, and nothing else.

    Raises:
        OutputError: one of them is something else, such as a link.
    """
    for name in names:
        found = folder.stat(name)
        wanted = "a folder" if name in folders else "a file"
        if found is not None and kind_of(found) != wanted:
            raise OutputError(
                f"{folder.path / name} is {kind_of(found)}, and the output has {wanted} of that name. dsconv neither"
                " follows nor replaces it: move it, or choose another folder"
            )


def kind_of(found: os.stat_result) -> str:
    """Return what a name is, for messages."""
    mode = found.st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a fifo" if stat.S_ISFIFO(mode) else "a device or socket"


def _is_plain(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)


def _is_locked(lock: int, folder: Folder) -> bool:
    """Take the lock; return whether it is on the file that is there: a run that ended removed its own."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    found = folder.stat(LOCK)
    return found is not None and os.path.samestat(os.fstat(lock), found)


def _read_marks(lock: int, folder: Folder) -> set[str]:
    """Return the names that were marked, and write the folder's own mark where it is new."""
    header = f"dsconv made this folder, whose inode is {os.fstat(folder.descriptor).st_ino}, and in it:\n".encode()
    size = os.fstat(lock).st_size
    data = os.pread(lock, size, 0) if size <= MAX_LOCK_BYTES else b""
    if not data.startswith(header):
        if size > len(header) or not header.startswith(data) or folder.names() != [LOCK]:
            raise _not_ours(folder, LOCK)
        os.ftruncate(lock, 0)  # a run was killed while it wrote the mark
        _write_all(lock, header)
        return set()
    whole = data[: data.rindex(b"\n") + 1]
    if len(whole) != size:
        os.ftruncate(lock, len(whole))  # a run was killed while it marked a file, which it had not made yet
    marked = set()
    for line in whole[len(header) :].splitlines():
        with contextlib.suppress(ValueError):
            marked.add(str(json.loads(line)))
    return marked


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _not_ours(folder: Folder, name: str) -> OutputError:
    return OutputError(
        f"{folder.path} was not made by dsconv on this disk (it holds {name}), so that nothing in it is touched: move"
        " it away"
    )
