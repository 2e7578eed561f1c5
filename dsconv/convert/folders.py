"""Folders by their descriptors: the one way in which dsconv creates, clears and renames files on disk.

Names are looked up in an open folder, and no link is followed, whether a file is created or opened or a folder is
cleared. Only the path of the folder that the user names is looked up as usual, and even that must not end in a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dsconv.checkpoint.storage.local import kind_of
from dsconv.errors import OutputError

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # the last one avoids waiting for a fifo


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
        """Open a subfolder.

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
        """Return the content of a regular file. Raises OSError if it is none, or larger than ``limit_bytes``."""
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
        """Return the names of everything in the folder, sorted."""
        return sorted(os.listdir(self.descriptor))

    def stat(self, name: str) -> os.stat_result | None:
        """Return the ``stat`` of a name, that of a link itself, or None if the name does not exist."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return None

    def signature(self, name: str) -> list[int] | None:
        """Return what distinguishes a file (inode, size, time) or a folder (inode) from another of the same name."""
        found = self.stat(name)
        if found is None:
            return None
        return [found.st_ino] if stat.S_ISDIR(found.st_mode) else [found.st_ino, found.st_size, found.st_mtime_ns]

    def rename(self, name: str, folder: Folder, new: str) -> None:
        """Move a file or folder from here into ``folder``, in one step. An existing file is replaced."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=folder.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file, or a link itself. Raises OSError."""
        os.unlink(name, dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists. A link is removed, not followed.

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
        """Have the names in this folder on disk. Raises OSError."""
        os.fsync(self.descriptor)

    def sync_below(self, files: bool = False) -> None:
        """Have the names in all folders below this one on disk, and with ``files`` their files. Raises OSError."""
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
        """Replace a small file in one step. It is on disk when this returns.

        Args:
            name: the file.
            data: its new content.
            fresh: the name under which it is written first, which must be free (default: one that nobody has).

        Raises:
            OutputError: a link, or something else that is no file, has the name.
            OSError: the system refuses. The file is as it was then.
        """
        refuse_special(self, [name])
        fresh = fresh or f".{name}.{os.urandom(4).hex()}"
        descriptor = self.open_file(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                write_all(descriptor, data)
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


@contextlib.contextmanager
def opened(path: Path, make: bool = False) -> Iterator[Folder]:
    """Open the folder that the user named; see ``Folder.open``. A path whose last part is a link is looked up first."""
    with Folder.open(path.resolve() if path.is_symlink() else path, make) as folder:
        yield folder


def refuse_link(path: Path) -> None:
    """Raise OutputError if ``path`` is a link."""
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


def is_plain(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
