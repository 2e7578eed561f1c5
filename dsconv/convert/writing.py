"""The writer behind every output: merge, to-universal and to-dcp hand it a ``Destination``, and it does the rest.

It refuses an output that is there already, opens the place (a folder of the disk or of a store; only ``open_place``
knows which), creates the files, runs the copy, tells of its progress, keeps the disk busy, syncs each file once its
last byte has arrived, checks the source records, and puts everything into place, the commit marker last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import (
    MAX_DEFAULT_WORKERS,
    CopyRun,
    Gather,
    Target,
    copies_of,
    default_workers,
    runs_of,
)
from dsconv.checkpoint.transfer.ordered import run_all
from dsconv.checkpoint.transfer.record_checks import source_checks
from dsconv.convert.staging import open_staging, refuse_existing, require_space
from dsconv.errors import DsconvError, OutputError

Progress = Callable[[str, int, int], None]
FLUSH_BYTES = 32 << 20
FINISHERS = 4  # threads that wait for the disk
MAX_OPEN_FILES = 128  # an output of more files opens each of them anew for every write: a process may open 1,024


@dataclass(frozen=True)
class OutputFile:
    """A file that the copy fills.

    Attributes:
        name: its path within the output, with ``/``.
        nbytes: its size.
        data_bytes: how many of its bytes are those of tensors.
        head: the bytes that it begins with, which are known before the copy.
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
    """

    bytes_read: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Destination(Protocol):
    """A kind of output. It knows tensors and where their bytes go, and nothing of formats, threads, disks or stores.

    A new one is a class that inherits from this one, gives ``what``, ``files``, ``targets``, ``commit_order`` and
    ``older``, and is handed to ``write``. The plan is made before: ``files`` are all sizes, so that a disk that is too
    small is found out at the start and a dry run can print the plan.

    ``write`` calls ``targets`` once, with a ``FillingFile`` for each of ``files``. For each tensor it yields the file
    in which the tensor begins, the entry, and a ``Target``, whose ``write`` puts bytes of the tensor into a
    ``FileRange`` of the file, or into several. A file is finished when all of its ``data_bytes`` have arrived:
    ``rest`` then gives the bytes between and around them, which may depend on the checksums of the ranges. After
    the copy, ``small_files`` and ``links`` are added; ``commit_order`` says in which order all of it appears in the
    target. Its last name is the commit marker: the file without which the others are no output.

    A store takes the bytes of a file from the first to the last only. A destination that has no ``rest``, and that
    yields the tensors of a file in their order, one after the other, can be written to a store too.
    """

    what: str  # an output of this kind, for messages: "a model"

    @property
    def files(self) -> Sequence[OutputFile]:
        """The files that the copy fills."""
        ...

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield (name of the file in which it begins, entry, target) for each tensor, in the order of the files."""
        ...

    def rest(self, name: str) -> Iterable[tuple[int, bytes]]:
        """Return (offset, bytes) of what is in the file besides ``head`` and tensors. Called once they are there."""
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

        ``write`` refuses them without ``force`` and takes them away with it. Raises OutputError where the output must
        not go into this folder at all.
        """
        ...

    @property
    def pointers(self) -> Mapping[Path, bytes]:
        """Small files outside of the target that are replaced, in one step each, once the output is in place."""
        return {}


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written.

    Attributes:
        force: replace an older output.
        fsync: have the output on the disk before it counts; None is yes. A store takes None only.
        sha256: compute the sha256 of each file.
        workers: the number of copying threads; None is one a core, at most 8, and 8 where the source is in a store.
        progress: called with (phase, bytes done, bytes in all), from any thread.
    """

    force: bool = False
    fsync: bool | None = None
    sha256: bool = False
    workers: int | None = None
    progress: Progress | None = None


class PlaceFile(Protocol):
    """A file in a place, open for writing."""

    def begin(self, head: bytes) -> None:
        """Make the file, with the bytes that it begins with."""
        ...

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Write all of ``data``. Raises OutputError or RemoteError."""
        ...

    def start_writeback(self) -> None:
        """Have the system write to the disk what was written so far, without waiting."""
        ...

    def finish(self, rest: Iterable[tuple[int, bytes]]) -> None:
        """Write ``rest``, have all of it on the disk or in the store, and close the file."""
        ...

    def close(self) -> None:
        """Let go of the file, finished or not. May be called twice."""
        ...


class Place(Protocol):
    """Where an output goes: everything is gathered out of sight, and then put into place as a whole."""

    in_order: bool  # whether a file takes its bytes from the first to the last only

    def create(self, name: str, nbytes: int, keep_open: bool, hashed: bool) -> PlaceFile:
        """Return a file that is made by its ``begin``. With ``hashed`` its sha256 will be asked for."""
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
        """Take away ``obsolete``, then put ``names`` into place in their order. What ``verify`` refuses is not kept."""
        ...

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file outside of the place in one step. Raises OSError."""
        ...


class ProgressCounter:
    """Counts bytes from any thread and tells ``report`` of them, as (phase, bytes done, bytes in all)."""

    def __init__(self, phase: str, total_bytes: int, report: Progress | None) -> None:
        self.done_bytes = 0
        self._phase = phase
        self._total_bytes = total_bytes
        self._report = report
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more."""
        with self._lock:
            self.done_bytes += nbytes
            done = self.done_bytes
        if self._report is not None:
            self._report(self._phase, done, self._total_bytes)


class FileRange:
    """A range of a file that one tensor, or a chunk of one, fills. ``checksum`` is that of what was written."""

    def __init__(self, file: FillingFile, offset_bytes: int, nbytes: int) -> None:
        self.checksum = RunningChecksum(nbytes)
        self._file = file
        self._offset_bytes = offset_bytes

    def write(self, data: memoryview, offset_bytes: int, crc: int) -> None:
        """Write ``data``, whose CRC-32 is ``crc``, at ``offset_bytes`` of the range."""
        self._file.opened.write(data, self._offset_bytes + offset_bytes)
        self.checksum.add(offset_bytes, len(data), crc)
        self._file.count(len(data))


class FillingFile:
    """A file while the copy fills it."""

    def __init__(self, file: OutputFile, opened: PlaceFile, complete: Callable[[FillingFile], None]) -> None:
        self.file = file
        self.opened = opened
        self.finished = False
        self._missing_bytes = file.data_bytes
        self._complete = complete
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Make the file. One without tensors is complete by that."""
        self.opened.begin(self.file.head)
        if not self._missing_bytes:
            self._complete(self)

    def range(self, offset_bytes: int, nbytes: int) -> FileRange:
        """Return the range of ``nbytes`` from ``offset_bytes`` of the file on."""
        return FileRange(self, offset_bytes, nbytes)

    def count(self, nbytes: int) -> None:
        """Count bytes that have arrived; the last ones complete the file."""
        with self._lock:
            self._missing_bytes -= nbytes
            completed = not self._missing_bytes and nbytes
        if completed:
            self._complete(self)


def write(
    destination: Destination,
    checkpoint: Checkpoint,
    target: Path,
    options: WriteOptions,
    verify: Callable[[Path], None] | None = None,
) -> Written:
    """Write an output, whole or not at all.

    Args:
        destination: what to write.
        checkpoint: the source, by whose stamps changes of its files are noticed.
        target: the folder, on the disk or in a store.
        options: how to write.
        verify: reads back what was written into a folder and raises MismatchError where it differs.

    Returns:
        What the copy did.

    Raises:
        OutputError: the output exists (without ``force``), is being written by another run, does not fit the disk or
            cannot be written.
        MalformedError: a source cannot be read, was damaged, or was written to meanwhile.
        MismatchError: ``verify`` found a difference. Nothing was kept.
        RemoteError: a store failed.
    """
    older_output(destination, target, options.force)
    if not is_remote(target):
        require_space(target, sum(file.nbytes for file in destination.files))
    with open_place(target, options.fsync) as place:
        old = older_output(destination, target, options.force)  # again, now that no other run can write there
        written = _fill(destination, checkpoint, place, options)
        for name, data in destination.small_files(written).items():
            place.write(name, data)
        for name, existing in destination.links.items():
            place.link(name, existing)
        place.commit(destination.commit_order, old, verify)
        for path, data in destination.pointers.items():
            try:
                place.replace(path, data)
            except OSError as error:
                written.warnings.append(f"{path} could not be written ({error.strerror or error})")
    return written


def older_output(destination: Destination, target: Path, force: bool) -> list[str]:
    """Return the names of an older output in ``target``, its commit marker first.

    Raises:
        OutputError: there is one and ``force`` is not given, or the output must not go there.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    names = destination.older(target) if target.is_dir() else []
    refuse_existing(target, names, destination.what, force)
    return names


@contextlib.contextmanager
def open_place(target: Path, fsync: bool | None) -> Iterator[Place]:
    """Open the folder ``target`` of the disk or of a store for one run. What was not committed is gone at the end.

    Raises:
        OutputError: another run is at work there, or it cannot be written to.
    """
    if not is_remote(target):
        with open_staging(target, fsync is not False) as staging:
            yield staging
        return
    if fsync is not None:
        raise OutputError(
            f"{target}: --fsync and --no-fsync are for local disks. Leave them out: a store keeps what it acknowledges"
        )
    from dsconv.convert.upload import open_upload

    with open_upload(target) as upload:
        yield upload


def _fill(destination: Destination, checkpoint: Checkpoint, place: Place, options: WriteOptions) -> Written:
    """Create the files and copy all tensors into them."""
    workers = options.workers or (MAX_DEFAULT_WORKERS if is_remote(checkpoint.path) else default_workers())
    outputs = destination.files
    counter = ProgressCounter("copy", sum(file.data_bytes for file in outputs), options.progress)
    finishing: list[Future[None]] = []
    files: dict[str, FillingFile] = {}
    try:
        with contextlib.ExitStack() as stack:
            finishers = stack.enter_context(ThreadPoolExecutor(FINISHERS))
            waits = not place.in_order and options.fsync is not False  # for the disk

            def complete(filling: FillingFile) -> None:
                if waits:
                    finishing.append(finishers.submit(_finish, destination, filling))
                else:
                    _finish(destination, filling)

            for file in outputs:
                opened = place.create(file.name, file.nbytes, len(outputs) <= MAX_OPEN_FILES, options.sha256)
                stack.callback(opened.close)
                files[file.name] = FillingFile(file, opened, complete)
            targets = list(destination.targets(files))
            if not place.in_order:
                for filling in files.values():
                    filling.begin()
            run = CopyRun(workers, {}, counter.add, checkpoint.stamps)
            with _flushing(files.values(), counter, waits):
                if place.in_order:
                    _run_in_order(targets, files, run)
                else:
                    run_all(((entry, target) for _, entry, target in targets), run)
                for future in finishing:
                    future.result()
    except DsconvError:  # some are OSErrors too: the source's error is the one to report
        raise
    except OSError as error:
        raise OutputError(f"writing the output failed: {error.strerror or error}; nothing of it was kept") from None
    unfinished = [name for name, filling in files.items() if not filling.finished]
    if unfinished:
        raise OutputError(
            f"{unfinished[0]}: not all of it was written, and nothing was kept. This is a fault of"
            " dsconv: please report it"
        )
    digests = place.digests(list(files), options.progress) if options.sha256 else {}
    return Written(run.stats.bytes_read, run.stats.overflowed, digests)


def _finish(destination: Destination, filling: FillingFile) -> None:
    filling.opened.finish(destination.rest(filling.file.name))
    filling.finished = True


def _run_in_order(
    targets: Sequence[tuple[str, TensorEntry, Target]], files: Mapping[str, FillingFile], run: CopyRun
) -> None:
    """Fill each file from its first byte to its last. A source record is checked as in every copy."""
    copies = chain.from_iterable(copies_of(entry, target) for _, entry, target in targets)
    checks, padding = source_checks(copies)
    run.checks.update(checks)

    def stream(name: str, of_file: Sequence[tuple[str, TensorEntry, Target]]) -> Iterator[Gather]:
        files[name].begin()
        for _, entry, target in of_file:
            yield from runs_of(entry, target)

    grouped = {name: list(of_file) for name, of_file in groupby(targets, key=lambda item: item[0])}
    casts = any(target.dtype != entry.dtype for _, entry, target in targets)
    run.run_in_order((stream(name, grouped.get(name, [])) for name in files), casts)
    run.run(padding)
    run.check_records()


@contextlib.contextmanager
def _flushing(files: Iterable[FillingFile], counter: ProgressCounter, on: bool) -> Iterator[None]:
    """Start the write-back of the files whenever FLUSH_BYTES more are there, in a thread, unless ``on`` is False.

    Nothing waits for it before each file's fsync. Against a sync at the end this took 0.55 s instead of 0.72 s for
    1.4 GB; syncing in steps took 1.1 s, since each step waits for the disk.
    """
    if not on:
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=partial(_flush, list(files), counter, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _flush(files: Sequence[FillingFile], counter: ProgressCounter, end: threading.Event) -> None:
    flushed = 0
    while not end.wait(0.02):
        if counter.done_bytes - flushed >= FLUSH_BYTES:
            flushed = counter.done_bytes
            for filling in files:
                filling.opened.start_writeback()
