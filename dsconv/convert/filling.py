"""Fill the files of an output: create them, run the copy, keep the disk busy, and sync each once it is complete."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import Record, TensorEntry
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.transfer.copy import (
    MAX_DEFAULT_WORKERS,
    CopyRun,
    Gather,
    Target,
    copies_of,
    default_workers,
    runs_of,
)
from dsconv.checkpoint.transfer.ordered import run_share
from dsconv.checkpoint.transfer.record_checks import source_checks
from dsconv.convert.computed import ComputedEntry, fill_all
from dsconv.convert.destination import Destination, FillingFile, Place, Written
from dsconv.convert.parts import Part
from dsconv.convert.progress import Progress, ProgressCounter
from dsconv.convert.shares import Share
from dsconv.errors import DsconvError, OutputError, UnsupportedError
from dsconv.text import quote

FLUSH_BYTES = 32 << 20
FINISHERS = 4  # threads that wait for the disk
MAX_OPEN_FILES = 128  # an output of more files opens each of them anew for every write: a process may open 1,024


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written.

    Attributes:
        force: replace an older output.
        fsync: have the output on disk before it counts; None is yes. A store takes None only.
        sha256: compute the sha256 of each file.
        workers: the number of copying threads; None is one per core, at most 8, and 8 where the source is in a store.
        progress: called with (phase, bytes done, bytes in all), from any thread.
        part: which part of the output this process writes; None is all of it.
        settings: what the user asked for that decides what is written, as text. All parts must have the same.
    """

    force: bool = False
    fsync: bool | None = None
    sha256: bool = False
    workers: int | None = None
    progress: Progress | None = None
    part: Part | None = None
    settings: str = ""

    def workers_for(self, source: Path) -> int:
        """Return the number of copying threads for a checkpoint at ``source``."""
        if self.workers is not None:
            return self.workers
        return MAX_DEFAULT_WORKERS if is_remote(source) else default_workers(self.part.neighbours if self.part else 1)


def fill(destination: Destination, checkpoint: Checkpoint, place: Place, options: WriteOptions) -> Written:
    """Create all files of an output and copy all tensors into them.

    Raises:
        OutputError: the disk refuses.
        DsconvError: a source cannot be read, or a store failed.
    """
    outputs = destination.files
    counter = ProgressCounter("copy", sum(file.data_bytes for file in outputs), options.progress)
    files: dict[str, FillingFile] = {}
    waits = not place.in_order and options.fsync is not False  # for the disk
    with _output_errors(), contextlib.ExitStack() as stack:
        finishing = stack.enter_context(_Finishing(waits))
        for file in outputs:
            opened = place.create(file.name, file.nbytes, len(outputs) <= MAX_OPEN_FILES, options.sha256)
            stack.callback(opened.close)
            files[file.name] = FillingFile(file, finishing.complete, opened)
        targets = list(destination.targets(files))
        if not place.in_order:
            for filling in files.values():
                filling.begin(destination.rest(filling.file.name))
        run = CopyRun(options.workers_for(checkpoint.path), {}, counter.add, checkpoint.signatures)
        with _flushing(files.values(), counter, waits):
            if place.in_order:
                _run_in_order(destination, targets, files, run)
            else:
                fill_all(((entry, target) for _, entry, target in targets), run)
            finishing.wait()
    _require_finished(files.values())
    digests = place.digests(list(files), options.progress) if options.sha256 else {}
    return Written(run.stats.bytes_read, run.stats.overflowed, digests, nonfinite=run.stats.nonfinite)


def fill_share(
    destination: Destination, share: Share, checkpoint: Checkpoint, place: Place, options: WriteOptions
) -> tuple[CopyRun, set[Record]]:
    """Write one part of an output: its share of the tensors, and what else is in the files that it has to itself.

    Returns:
        The copy, whose checks hold what was read of each record, also where other parts read the rest of it; and the
        records that were read in a way that gives no checksum.

    Raises:
        OutputError: the disk refuses.
        DsconvError: a source cannot be read.
    """
    counter = ProgressCounter("copy", share.nbytes, options.progress)
    waits = options.fsync is not False
    with _output_errors(), contextlib.ExitStack() as stack:
        finishing = stack.enter_context(_Finishing(waits))
        for mine in share.files:
            file = mine.filling.file
            opened = place.create(file.name, file.nbytes, len(share.files) <= MAX_OPEN_FILES, False)
            stack.callback(opened.close)
            mine.filling.open_for(finishing.complete, opened, mine.nbytes)
            mine.filling.begin(destination.rest(file.name) if mine.whole else (), mine.first)
        run = CopyRun(options.workers_for(checkpoint.path), {}, counter.add, checkpoint.signatures)
        with _flushing([mine.filling for mine in share.files], counter, waits):
            cut = chain.from_iterable(runs_of(*piece) for piece in share.cut)
            scattered = run_share(share.whole, cut, run)
            finishing.wait()
    _require_finished(mine.filling for mine in share.files)
    return run, scattered


def commit(
    destination: Destination,
    place: Place,
    written: Written,
    old: Sequence[str],
    verify: Callable[[Path], None] | None,
) -> None:
    """Add what is written after the copy, put all of it into place, and have the pointers name it.

    Args:
        destination: the output.
        place: where its files are complete.
        written: what the copy did; a pointer that cannot be written is noted here.
        old: an older output, which is removed, its commit marker first.
        verify: see ``Place.commit``.

    Raises:
        OutputError: the disk refuses.
        MismatchError: ``verify`` found a difference.
    """
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


class _Finishing:
    """Finishes files that are complete: in threads, where that waits for the disk."""

    def __init__(self, waits: bool) -> None:
        self._waits = waits
        self._finishers = ThreadPoolExecutor(FINISHERS)
        self._begun: list[Future[None]] = []

    def complete(self, filling: FillingFile) -> None:
        """Finish a file whose last byte has arrived."""
        if self._waits:
            self._begun.append(self._finishers.submit(_finish, filling))
        else:
            _finish(filling)

    def wait(self) -> None:
        """Wait until all of them are finished. Raises what finishing one raised."""
        for future in self._begun:
            future.result()

    def __enter__(self) -> _Finishing:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finishers.shutdown()


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    """Turn the system's errors into OutputErrors."""
    try:
        yield
    except DsconvError:  # some are OSErrors too: the source's error is the one to report
        raise
    except OSError as error:
        raise OutputError(f"writing the output failed: {error.strerror or error}; nothing was kept") from None


def _require_finished(files: Iterable[FillingFile]) -> None:
    unfinished = [filling.file.name for filling in files if not filling.finished]
    if unfinished:
        raise OutputError(
            f"{unfinished[0]}: not all of it was written, and nothing was kept. This is a fault of"
            " dsconv: please report it"
        )


def _finish(filling: FillingFile) -> None:
    filling.opened.finish()
    filling.finished = True


def _run_in_order(
    destination: Destination,
    targets: Sequence[tuple[str, TensorEntry, Target]],
    files: Mapping[str, FillingFile],
    run: CopyRun,
) -> None:
    """Fill each file from its first byte to its last. A source record is checked as in every copy."""
    if made := next((entry for _, entry, _ in targets if isinstance(entry, ComputedEntry)), None):
        raise UnsupportedError(
            f"{quote(made.name)} is computed, which is written to a disk only: write a folder first, then merge that"
            " one into the store"
        )
    copies = chain.from_iterable(copies_of(entry, target) for _, entry, target in targets)
    checks, padding = source_checks(copies)
    run.checks.update(checks)

    within: dict[str, list[tuple[TensorEntry, Target, int, int]]] = {name: [] for name in files}
    for begins_in, entry, target in targets:
        for name, first, end in target.spans or ((begins_in, 0, entry.numel),):
            within[name].append((entry, target, first, end))

    def stream(name: str) -> Iterator[Gather]:
        files[name].begin(destination.rest(name))
        for entry, target, first, end in within[name]:
            yield from runs_of(entry, target, first, end)

    run.run_in_order(map(stream, files))
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
