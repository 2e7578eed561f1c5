"""What the writer (``writing.py``) requires of a kind of output, and of the place that it goes to.

A ``Destination`` knows tensors and where their bytes go; a ``Place`` keeps files out of sight until all of them are
whole. Neither knows the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.progress import Progress
from dsconv.errors import OutputError


@dataclass(frozen=True)
class OutputFile:
    """A file that the copy fills.

    Attributes:
        name: its path within the output, with ``/``.
        nbytes: its size.
        data_bytes: how many of its bytes are those of tensors.
        head: its first bytes, which are known before the copy.
    """

    name: str
    nbytes: int
    data_bytes: int
    head: bytes = b""


@dataclass
class Written:
    """What a copy did.

    Attributes:
        bytes_read: how many bytes were read.
        overflowed: by tensor, how many finite values became infinite in a cast.
        digests: the sha256 of each file, where it was asked for.
        warnings: what could not be done, though the output is whole.
        nonfinite: by tensor, how many NaN or infinite values were seen in the source (``CopyStats``).
        part: what became of the part of the output that was written; None where all of it was.
    """

    bytes_read: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    part: PartReport | None = None


@dataclass(frozen=True)
class PartReport:
    """What became of one part of an output.

    Attributes:
        number: which part this was, from 1 on.
        of: how many there are.
        nbytes: how many bytes of tensors it has.
        missing: the parts that are not done.
        placed: whether the output is in its place, which takes all of them.
        by_this: whether this process put it there.
    """

    number: int
    of: int
    nbytes: int
    missing: tuple[int, ...] = ()
    placed: bool = False
    by_this: bool = False


class Destination(Protocol):
    """A kind of output. It knows tensors and where their bytes go, but no formats, threads, disks or stores.

    A new one is a class that inherits from this one, gives ``what``, ``files``, ``targets``, ``commit_order`` and
    ``older``, and is handed to ``write``. The plan comes first: ``files`` gives all sizes, so that a full disk is found
    at the start and a dry run can print the plan.

    ``write`` calls ``targets`` once, with a ``FillingFile`` for each of ``files``. For each tensor it yields the file
    in which the tensor begins, the entry, and a ``Target``, whose ``write`` puts bytes of the tensor into a
    ``FileRange`` of the file, or into several. A file is finished when all of its ``data_bytes`` have arrived:
    ``rest`` gives the bytes between and around them, which may depend on the checksums of the ranges. After the copy,
    ``small_files`` and ``links`` are added; ``commit_order`` says in which order all of it appears in the target. Its
    last name is the commit marker: the file without which the others are no output.

    A store takes the bytes of a file from the first to the last only. To be written to a store too, a destination
    yields the tensors of a file in their order, one after the other; its ``rest`` follows the order of the file, and
    none of its bytes depends on a tensor that comes after them.
    """

    what: str  # an output of this kind, for messages: "a model"
    command: str = ""  # the command of dsconv that makes one

    @property
    def files(self) -> Sequence[OutputFile]:
        """The files that the copy fills."""
        ...

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield (name of the file in which it begins, entry, target) for each tensor, in the order of the files."""
        ...

    def rest(self, name: str) -> Iterable[tuple[int, bytes]]:
        """Return (offset, bytes) of what is in the file besides ``head`` and tensors.

        Called once. Each item is asked for when all tensors that lie before it are there.
        """
        return ()

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return {name: content} of the small files, which are written after the copy."""
        return {}

    @property
    def links(self) -> Mapping[str, str]:
        """{second name: name} of files that are found under two names."""
        return {}

    @property
    def commit_order(self) -> Sequence[str]:
        """All names of the output in its folder, in the order in which they appear there: the commit marker last."""
        ...

    def older(self, target: Path) -> list[str]:
        """Return the names of an older output in the folder ``target``, its commit marker first.

        ``write`` refuses them without ``force``, and removes them with it. Raises OutputError if the output must not go
        into this folder at all.
        """
        ...

    @property
    def sources(self) -> Sequence[Path]:
        """Files that are read besides the checkpoint's own ``sources``; a change of one of them ends the run."""
        return ()

    @property
    def pointers(self) -> Mapping[Path, bytes]:
        """Small files outside the target that are replaced, in one step each, once the output is in place."""
        return {}


class FileRange:
    """A range of a file that one tensor, or a chunk of one, fills. ``checksum`` is that of what was written."""

    def __init__(self, file: FillingFile, offset_bytes: int, nbytes: int) -> None:
        self.checksum = RunningChecksum(nbytes)
        self.file = file
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes

    def write(self, data: memoryview, offset_bytes: int, crc: int) -> None:
        """Write ``data``, whose CRC-32 is ``crc``, at ``offset_bytes`` of the range."""
        self.file.opened.write(data, self.offset_bytes + offset_bytes)
        self.checksum.add(offset_bytes, len(data), crc)
        self.file.count(len(data))


class FillingFile:
    """A file while the copy fills it. ``ranges`` are those that were asked for.

    Args:
        file: what is filled.
        complete: called when the last of its bytes has arrived.
        opened: the file of the place. A part of an output gives those of its own files later (``open_for``).
    """

    def __init__(
        self,
        file: OutputFile,
        complete: Callable[[FillingFile], None] | None = None,
        opened: PlaceFile | None = None,
    ) -> None:
        self.file = file
        self.finished = False
        self.ranges: list[FileRange] = []
        self._opened = opened
        self._missing_bytes = file.data_bytes
        self._complete = complete
        self._lock = threading.Lock()

    @property
    def opened(self) -> PlaceFile:
        """The file of the place. Raises OutputError where the file belongs to other parts of the output."""
        if self._opened is None:
            raise OutputError(f"{self.file.name} is not open. This is a fault of dsconv: please report it")
        return self._opened

    def open_for(self, complete: Callable[[FillingFile], None], opened: PlaceFile, nbytes: int) -> None:
        """Take the file of the place, for ``nbytes`` of the tensors' bytes: those of one part of the output."""
        self._complete, self._opened, self._missing_bytes = complete, opened, nbytes

    def begin(self, rest: Iterable[tuple[int, bytes]], with_head: bool = True) -> None:
        """Make the file; ``rest`` is the destination's. One without tensors is complete by that."""
        self.opened.begin(self.file.head if with_head else b"", rest)
        if not self._missing_bytes and self._complete is not None:
            self._complete(self)

    def range(self, offset_bytes: int, nbytes: int) -> FileRange:
        """Return the range of ``nbytes`` from ``offset_bytes`` of the file on."""
        self.ranges.append(FileRange(self, offset_bytes, nbytes))
        return self.ranges[-1]

    def count(self, nbytes: int) -> None:
        """Count bytes that have arrived; the last ones complete the file."""
        with self._lock:
            self._missing_bytes -= nbytes
            completed = not self._missing_bytes and nbytes
        if completed and self._complete is not None:
            self._complete(self)


class PlaceFile(Protocol):
    """A file in a place, open for writing."""

    def begin(self, head: bytes, rest: Iterable[tuple[int, bytes]]) -> None:
        """Make the file, with the bytes that it begins with. ``rest`` is what else is not a tensor's."""
        ...

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Write all of ``data``. Raises OutputError or RemoteError."""
        ...

    def start_writeback(self) -> None:
        """Have the system write to the disk what was written so far, without waiting."""
        ...

    def finish(self) -> None:
        """Write what is left of ``rest``, have all of it on the disk or in the store, and close the file."""
        ...

    def close(self) -> None:
        """Release the file, finished or not. May be called twice."""
        ...


class Place(Protocol):
    """Where an output goes: everything is gathered out of sight, and then put into place as a whole."""

    in_order: bool  # whether a file takes its bytes from the first to the last only

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> PlaceFile:
        """Return a file that its ``begin`` makes. With ``hashed``, ``digests`` must know its sha256."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole."""
        ...

    def link(self, name: str, existing: str) -> None:
        """Give a finished file a second name."""
        ...

    def digests(self, names: Sequence[str], progress: Progress | None) -> dict[str, str]:
        """Return the sha256 of each of the finished files ``names``."""
        ...

    def commit(
        self, names: Sequence[str], obsolete: Sequence[str], verify: Callable[[Path], None] | None = None
    ) -> None:
        """Remove ``obsolete``, then put ``names`` into place in their order. Output that ``verify`` refuses is not
        kept.
        """
        ...

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file outside of the place in one step. Raises OSError."""
        ...
