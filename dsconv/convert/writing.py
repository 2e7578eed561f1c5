"""The writer behind every output: merge, to-universal and to-dcp hand it a ``Destination``, and it does the rest.

It refuses an output that is there already, opens the place (a folder on disk or of a store; only ``open_place``
knows which), creates the files, runs the copy, tells of its progress, keeps the disk busy, syncs each file once its
last byte has arrived, checks the source records, and puts everything into place, the commit marker last.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
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
from dsconv.checkpoint.transfer.record_checks import source_checks
from dsconv.convert.computed import ComputedEntry, fill_all
from dsconv.convert.destination import Destination, FillingFile, Place, Written
from dsconv.convert.folders import Folder, refuse_link, refuse_special
from dsconv.convert.progress import Progress, ProgressCounter
from dsconv.convert.staging import open_staging, refuse_existing, require_space
from dsconv.errors import DsconvError, OutputError, UnsupportedError
from dsconv.text import quote, redact

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
    """

    force: bool = False
    fsync: bool | None = None
    sha256: bool = False
    workers: int | None = None
    progress: Progress | None = None


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
        checkpoint: the source, by whose signatures changes of its files are noticed.
        target: the folder, on disk or in a store.
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
    with open_place(target, options.fsync, _command(destination, checkpoint, target)) as place:
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


def _command(destination: Destination, checkpoint: Checkpoint, target: Path) -> str:
    """Return the command that makes the output, without the options that it had; "" where there is none."""
    words = (destination.command, redact(str(checkpoint.path)), redact(str(target)))
    return f"dsconv {shlex.join(words)}" if destination.command else ""


def older_output(destination: Destination, target: Path, force: bool) -> list[str]:
    """Return the names of an older output in ``target``, its commit marker first.

    Raises:
        OutputError: there is one and ``force`` is not given, or the output must not go there.
    """
    if not is_remote(target):
        refuse_link(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    names = destination.older(target) if target.is_dir() else []
    if target.is_dir() and not is_remote(target):
        with Folder.open(target) as folder:
            inner = {file.name.partition("/")[0] for file in destination.files if "/" in file.name}
            refuse_special(folder, [*destination.commit_order, *names], inner)
    refuse_existing(target, names, destination.what, force)
    return names


def refuse_target(destination: Destination, target: Path, options: WriteOptions) -> list[str]:
    """Raise what ``write`` would refuse the target with, without touching it. A dry run ends as the run would.

    Whether another run is writing there is not looked at.

    Returns:
        A warning if the disk has too little space now: a plan is often made before the space is.

    Raises:
        OutputError: the output exists (without ``force``) or cannot be written to.
    """
    older_output(destination, target, options.force)
    if is_remote(target):
        _refuse_fsync(target, options.fsync)
        return []
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise OutputError(f"{target} cannot be made: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{target} cannot be written: {existing} is not writable; name another folder")
    try:
        require_space(target, sum(file.nbytes for file in destination.files))
    except OutputError as error:
        return [f"without --dry-run this is refused: {error}"]
    return []


def _refuse_fsync(target: Path, fsync: bool | None) -> None:
    if fsync is not None:
        raise OutputError(
            f"{target}: --fsync and --no-fsync are for local disks. Leave them out: a store keeps what it acknowledges"
        )


@contextlib.contextmanager
def open_place(target: Path, fsync: bool | None, repeat: str = "") -> Iterator[Place]:
    """Open the folder ``target`` on disk or of a store for one run. What was not committed is gone at the end.

    Args:
        target: the folder.
        fsync: see ``WriteOptions``.
        repeat: the command that makes the output, for those who find it half in place in a store.

    Raises:
        OutputError: another run is at work there, or it cannot be written to.
    """
    if not is_remote(target):
        with open_staging(target, fsync is not False) as staging:
            yield staging
        return
    _refuse_fsync(target, fsync)
    from dsconv.convert.upload import open_upload

    with open_upload(target, repeat) as upload:
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
                    finishing.append(finishers.submit(_finish, filling))
                else:
                    _finish(filling)

            for file in outputs:
                opened = place.create(file.name, file.nbytes, len(outputs) <= MAX_OPEN_FILES, options.sha256)
                stack.callback(opened.close)
                files[file.name] = FillingFile(file, opened, complete)
            targets = list(destination.targets(files))
            if not place.in_order:
                for filling in files.values():
                    filling.begin(destination.rest(filling.file.name))
            run = CopyRun(workers, {}, counter.add, checkpoint.signatures)
            with _flushing(files.values(), counter, waits):
                if place.in_order:
                    _run_in_order(destination, targets, files, run)
                else:
                    fill_all(((entry, target) for _, entry, target in targets), run)
                for future in finishing:
                    future.result()
    except DsconvError:  # some are OSErrors too: the source's error is the one to report
        raise
    except OSError as error:
        raise OutputError(f"writing the output failed: {error.strerror or error}; nothing was kept") from None
    unfinished = [name for name, filling in files.items() if not filling.finished]
    if unfinished:
        raise OutputError(
            f"{unfinished[0]}: not all of it was written, and nothing was kept. This is a fault of"
            " dsconv: please report it"
        )
    digests = place.digests(list(files), options.progress) if options.sha256 else {}
    return Written(run.stats.bytes_read, run.stats.overflowed, digests, nonfinite=run.stats.nonfinite)


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
