"""``to_universal``: a ZeRO checkpoint, also of AutoTP or pipeline ranks, into a DeepSpeed universal checkpoint,
streaming, whole or absent.

Nothing is extracted first: each byte of the optimizer files is read once and put where it belongs in ``zero/``. A file
is finished, with its checksum, by the time its last byte arrives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Checkpoint, Record
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import (
    Copy,
    CopyRun,
    Gather,
    Target,
    copies_of,
    default_workers,
    source_checks,
    write_at,
)
from dsconv.convert.staging import Staging, open_staging, refuse_existing, require_space, settle
from dsconv.convert.universal_plan import (
    FOLDER,
    LATEST,
    ModelFile,
    StateFile,
    UniversalPlan,
    plan_universal,
    training_of,
)
from dsconv.convert.universal_verify import verify_universal
from dsconv.errors import OutputError

FINISHERS = 4  # threads that wait for the disk
MODEL_STATES = "_model_states.pt"
Progress = Callable[[str, int, int], None]


@dataclass
class UniversalReport:
    """What ``to_universal`` did, or with ``dry_run`` would do. Sizes are in bytes."""

    source: str
    output: str
    format: str
    step: int | None
    stage: int
    tensors: int
    parameters: int
    states: list[str]
    nbytes: int
    files: int
    latest: str
    dry_run: bool = False
    bytes_read: int = 0
    verified: bool = False
    warnings: list[str] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def to_universal(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    exclude_frozen: bool = False,
    dry_run: bool = False,
    verify_output: bool = False,
    force: bool = False,
    fsync: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> UniversalReport:
    """Convert a checkpoint of DeepSpeed, of any ZeRO stage or none, into a universal one, which any number of ranks and
    any stage can load.

    One of tensor-parallel (AutoTP) or pipeline ranks too: other degrees of those can load it.

    ``output`` (default: SAVE_DIR/<tag>_universal) becomes a tag folder, as the official tool's ``--output_folder``
    does: its parent gets a ``latest_universal`` that names it, so ``load_checkpoint(parent)`` finds it;
    ``load_checkpoint(output)`` works too. With ``exclude_frozen`` the frozen weights and buffers get no files in
    ``zero/``, where no loader of DeepSpeed's looks for them; they stay in the model states.

    Raises DsconvError: see ``open_checkpoint``; UnsupportedError for a source without optimizer states of one value a
    weight; OutputError when the output exists (without ``force``), is being written by another run or does not fit the
    disk; MismatchError when ``verify_output`` finds a difference.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag)
    training = training_of(checkpoint)
    target = Path(output) if output is not None else checkpoint.folder / f"{checkpoint.info['tag']}_universal"
    plan = plan_universal(checkpoint, training, exclude_frozen)
    report = _report(checkpoint, training, target, plan, dry_run)
    if dry_run:
        report.plan = [*map(_state_row, plan.states), *map(_model_row, plan.models)]
        return report
    settle(target)
    _existing(checkpoint, target, force)
    require_space(target, plan.nbytes)
    with open_staging(target, fsync) as staging:
        old = _existing(checkpoint, target, force)  # again, now that no other run can write there
        report.bytes_read = _write(plan, staging, workers or default_workers(), fsync, progress)
        _link(plan, staging, fsync)
        if verify_output:
            verify_universal(checkpoint, plan, staging.folder, target, progress)
            report.verified = True
        staging.write(LATEST, b".")  # DeepSpeed joins the folder and the tag
        names = [FOLDER, *(model.path for model in plan.models), *plan.links, LATEST]
        staging.commit(names, old)
        _point_to(staging, target, report)
    return report


def _report(
    checkpoint: Checkpoint, training: Training, target: Path, plan: UniversalPlan, dry_run: bool
) -> UniversalReport:
    states = sorted({state for of in training.states.values() for state in of})
    return UniversalReport(
        str(checkpoint.path),
        str(target),
        checkpoint.format,
        checkpoint.step,
        training.stage,
        len(training.states),
        sum(checkpoint[name].numel for name in training.states),
        ["fp32", *states],
        plan.nbytes,
        len(plan.states) + len(plan.models),
        str(target.resolve().parent / LATEST),
        dry_run=dry_run,
        warnings=[*checkpoint.warnings, *training.warnings],
    )


def _state_row(file: StateFile) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file.path, "bytes": file.nbytes}
    if file.entry is not None:
        row |= {
            "dtype": str(file.dtype),
            "stored_dtype": str(file.entry.dtype),
            "shape": list(file.entry.shape),
            "role": file.role,
        }
    return row


def _model_row(file: ModelFile) -> dict[str, Any]:
    return {"file": file.path, "bytes": file.nbytes, "copied_from": str(file.source)}


def _existing(checkpoint: Checkpoint, target: Path, force: bool) -> list[str]:
    """What of an earlier universal checkpoint lies in ``target``, which ``force`` replaces. Raises OutputError
    without it.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    here = target.resolve()
    if here in (checkpoint.path.resolve(), checkpoint.folder.resolve()):
        raise OutputError(
            f"{target} is the checkpoint itself; give the output a folder of its own, such as {here}_universal"
        )
    if not target.is_dir():
        return []
    found = sorted(p.name for p in target.iterdir() if p.name in (FOLDER, LATEST) or p.name.endswith(MODEL_STATES))
    refuse_existing(target, found, "a checkpoint", force)
    others = sorted(p.name for p in target.iterdir() if p.name.endswith("_optim_states.pt"))
    if others:
        raise OutputError(f"{target} holds another checkpoint ({others[0]}); give the output a folder of its own")
    return sorted(found, key=lambda name: name != LATEST)  # what names it goes first


class _Output:
    """One file that is being filled. Its descriptor is opened for each write: a checkpoint may have more files than
    a process.
    """

    def __init__(self, path: Path, nbytes: int, base_bytes: int) -> None:
        self.path = path
        self.base_bytes = base_bytes
        with self._opened(os.O_CREAT | os.O_EXCL) as descriptor:
            os.truncate(descriptor, nbytes)

    def write(self, data: memoryview, offset_bytes: int) -> None:
        with self._opened() as descriptor:
            write_at(descriptor, self.base_bytes, data, offset_bytes)

    def finish(self, fixed: Callable[[], Iterator[tuple[int, bytes]]], fsync: bool) -> None:
        with self._opened() as descriptor:
            for offset, data in fixed():
                write_at(descriptor, 0, memoryview(data), offset)
            if fsync:
                os.fsync(descriptor)

    def _opened(self, flags: int = 0) -> _Descriptor:
        return _Descriptor(self.path, os.O_RDWR | os.O_CLOEXEC | flags)


class _Descriptor:
    def __init__(self, path: Path, flags: int) -> None:
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be opened for writing: {error.strerror}; nothing of the output was kept"
            ) from None

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)


class _Completing(RunningChecksum):
    """A checksum that says when the last byte has been counted."""

    def __init__(self, nbytes: int, completed: Callable[[int], None]) -> None:
        super().__init__(nbytes)
        self._completed = completed
        self._was = False

    def add(self, offset: int, length: int, crc: int) -> None:
        super().add(offset, length, crc)
        with self._lock:  # of the last two adders only one may find it complete
            now, self._was = self.complete and not self._was, self.complete
        if now:
            self._completed(self.value)


def _write(plan: UniversalPlan, staging: Staging, workers: int, fsync: bool, progress: Progress | None) -> int:
    """Write all files into the staging folder; returns how many bytes were read."""
    done, total, lock = 0, plan.data_bytes, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            current = done
        if progress is not None:
            progress("copy", current, total)

    try:
        with ThreadPoolExecutor(FINISHERS) as finishers:
            finishing: list[Future[None]] = []
            copies: list[Copy | Gather] = []
            for folder in dict.fromkeys(staging.path(file.path).parent for file in plan.states):
                folder.mkdir(parents=True, exist_ok=True)
            for file in plan.states:
                copies += _state_copies(file, staging, partial(_submit, finishers, finishing), fsync)
            # Frozen weights and buffers are read once more, to be cast, and checked then.
            checked = {copy.record for copy in copies if isinstance(copy, Copy)}
            for model in plan.models:
                copies += _model_copies(model, staging, partial(_submit, finishers, finishing), fsync, checked)
            checks, padding = source_checks(copies)
            run = CopyRun(workers, checks, advance)
            run.run(chain(copies, padding))
            run.check_records()
        for future in finishing:
            future.result()
        expected = len(plan.states) + len(plan.models)
        assert len(finishing) == expected, f"{len(finishing)} of {expected} files were finished"
        if fsync:
            _sync_folders(staging.path(FOLDER))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{staging.target}: writing the output failed: {error.strerror}; nothing of it was kept"
        ) from None
    return run.stats.bytes_read


def _submit(finishers: ThreadPoolExecutor, finishing: list[Future[None]], task: Callable[[], None]) -> None:
    finishing.append(finishers.submit(task))


def _state_copies(
    file: StateFile, staging: Staging, submit: Callable[[Callable[[], None]], None], fsync: bool
) -> Iterator[Copy | Gather]:
    """Make the file and yield the copies that fill it; what has nothing to wait for is finished at once."""
    archive = file.archive
    base = archive.streamed[0] if archive.streamed else 0
    output = _Output(staging.path(file.path), archive.nbytes, base)
    if file.entry is None or file.dtype is None or not file.entry.numel:
        submit(partial(output.finish, partial(archive.fixed, [0] * len(archive.streamed)), fsync))
        return
    checksum = _Completing(
        file.entry.numel * file.dtype.itemsize,
        lambda crc: submit(partial(output.finish, partial(archive.fixed, [crc]), fsync)),
    )
    yield from copies_of(file.entry, Target(file.path, file.dtype, output.write, checksum))


def _model_copies(
    model: ModelFile, staging: Staging, submit: Callable[[Callable[[], None]], None], fsync: bool, checked: Set[Record]
) -> Iterator[Copy]:
    """The whole file: its records, so that their CRC-32s are checked on the way unless they are elsewhere, and what
    lies between.
    """
    raw = BY_NAME["uint8"]
    output = _Output(staging.path(model.path), model.nbytes, 0)
    checksum = _Completing(model.nbytes, lambda crc: submit(partial(output.finish, lambda: iter(()), fsync)))
    target = Target(model.path, raw, output.write, checksum)
    records = sorted(TorchFile(model.source).archive.records.values(), key=lambda record: record.offset_bytes)
    position = 0
    for record in (*records, Record(model.source, model.nbytes, 0)):
        if record.offset_bytes > position:
            between = Record(model.source, position, record.offset_bytes - position)
            yield Copy(between, position, between.nbytes, raw, target, position)
        if record.nbytes:
            if record in checked:
                record = Record(record.path, record.offset_bytes, record.nbytes)
            yield Copy(record, record.offset_bytes, record.nbytes, raw, target, record.offset_bytes)
        position = record.offset_bytes + record.nbytes


def _link(plan: UniversalPlan, staging: Staging, fsync: bool) -> None:
    """Second names of the model states: hard links, and copies where the file system has none."""
    for name, existing in plan.links.items():
        try:
            os.link(staging.path(existing), staging.path(name))
        except OSError:
            staging.write(name, b"")
            with open(staging.path(existing), "rb") as source, open(staging.path(name), "wb") as target:
                while data := source.read(8 << 20):
                    target.write(data)
                if fsync:
                    target.flush()
                    os.fsync(target.fileno())


def _sync_folders(root: Path) -> None:
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _point_to(staging: Staging, target: Path, report: UniversalReport) -> None:
    """``latest_universal`` beside the output, as the official tool leaves it, replaced in one step."""
    latest = target.resolve().parent / LATEST
    try:
        staging.replace("pointer", os.fsencode(target.resolve().name), latest)
    except OSError as error:
        reason = error.strerror or error
        report.warnings.append(
            f"{latest} could not be written ({reason}): load the output's own folder, or name the tag"
        )
