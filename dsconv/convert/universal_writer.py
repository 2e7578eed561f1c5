"""``to_universal``: a ZeRO checkpoint, also of AutoTP or pipeline ranks, or a DCP directory with an optimizer into a
DeepSpeed universal checkpoint, streaming, whole or absent.

Nothing is extracted first: each byte of the optimizer files is read once and put where it belongs in ``zero/``. A file
is finished, with its checksum, as soon as its last byte has arrived.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_output
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.destination import Destination, FileRange, FillingFile, OutputFile, Written
from dsconv.convert.parts import parse_part
from dsconv.convert.progress import Progress
from dsconv.convert.report import Report
from dsconv.convert.staging import recover_interrupted
from dsconv.convert.universal_files import StateFile
from dsconv.convert.universal_plan import (
    FOLDER,
    LATEST,
    ModelFile,
    UniversalPlan,
    plan_universal,
    training_of,
)
from dsconv.convert.universal_verify import verify_universal
from dsconv.convert.writing import WriteOptions, refuse_target, write
from dsconv.errors import OutputError, UnsupportedError

MODEL_STATES = "model_states.pt"  # mp_rank_00_model_states.pt, layer_00-model_states.pt


@dataclass(kw_only=True)
class UniversalReport(Report):
    """What ``to_universal`` did, or with ``dry_run`` would do. Sizes are in bytes; ``files`` is their number."""

    stage: int
    states: list[str]
    files: int
    latest: str
    verified: bool = False


def to_universal(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    follow_links: bool = False,
    item: str | None = None,
    exclude_frozen: bool = False,
    dry_run: bool = False,
    verify_output: bool = False,
    force: bool = False,
    fsync: bool | None = None,
    workers: int | None = None,
    part: str | None = None,
    progress: Progress | None = None,
) -> UniversalReport:
    """Convert a checkpoint of DeepSpeed, of any ZeRO stage or none, or of torch's own engines into a universal one.

    Any number of ranks and any stage can load the result. Of torch's engines, DCP directories are taken that hold the
    optimizer, as torch's state-dict API, accelerate, the Trainer and torchtitan save it. A checkpoint of
    tensor-parallel (AutoTP) or pipeline ranks can be loaded at other degrees of those too.

    Args:
        source: a path, a URL, or a checkpoint that is open.
        output: the folder to write, on the disk or in a store (default: SAVE_DIR/<tag>_universal, or
            <folder>_universal beside a DCP directory; of a source in a store, in the current folder). It becomes a tag
            folder, as the ``--output_folder`` of the official tool does: its parent gets a ``latest_universal`` that
            names it, so both ``load_checkpoint(parent)`` and ``load_checkpoint(output)`` find it.
        tag: the checkpoint of a save folder to take (default: what the file ``latest`` names).
        follow_links: read what links lead to that leave the checkpoint's folder.
        item: the key of the model to take, where the checkpoint holds several.
        exclude_frozen: make no files in ``zero/`` for frozen weights and buffers. No loader of DeepSpeed's looks for
            them there; they stay in the model states.
        dry_run: write nothing, and report the plan.
        verify_output: read the output back and compare every byte, before it counts.
        force: replace a universal checkpoint that ``output`` already holds.
        fsync: have the output on disk before it counts as written (default: yes). A store takes None only.
        workers: the number of copying threads (default: one per core, at most 8).
        part: ``I/N`` for part I of N, each written by a process of its own, or ``auto``. See docs/many-machines.md.
        progress: called with (phase, bytes done, bytes in all), from any thread.

    Returns:
        What was written, or with ``dry_run`` would be.

    Raises:
        DsconvError: what ``open_checkpoint`` raises; UnsupportedError for a source without optimizer states of one
            value a weight, or whose parameters differ in what DeepSpeed keeps once for all of them; OutputError when
            the output exists (without ``force``), is being written by another run or does not fit the disk;
            MismatchError when ``verify_output`` finds a difference.
    """
    target = as_output(output) if output is not None else None
    checkpoint = (
        source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item, follow_links=follow_links)
    )
    training = training_of(checkpoint)
    if checkpoint.format == "DeepSpeed universal":
        raise UnsupportedError(
            f"{checkpoint.path}: a universal checkpoint already, which every stage and world size loads"
        )
    if target is None:
        target = _beside(checkpoint)
    plan = plan_universal(checkpoint, training, exclude_frozen)
    report = _report(checkpoint, training, target, plan, dry_run)
    destination = UniversalOutput(checkpoint, plan, target)
    if dry_run:
        report.warnings += refuse_target(destination, target, WriteOptions(force))
        report.plan = [*map(_state_row, plan.written), *map(_model_row, plan.models)]
        return report
    recover_interrupted(target)

    def check(folder: Path) -> None:
        verify_universal(checkpoint, plan, folder, target, progress)
        report.verified = True

    settings = repr((tag, item, follow_links, exclude_frozen, verify_output))
    options = WriteOptions(force, fsync, False, workers, progress, parse_part(part), settings)
    written = write(destination, checkpoint, target, options, check if verify_output else None)
    report.note_copy(written)
    report.warnings += [f"{text}: load the output's own folder, or name the tag" for text in written.warnings]
    return report


def _beside(checkpoint: Checkpoint) -> Path:
    """Return the folder that is written where the user names none."""
    tag = checkpoint.info.get("tag")
    name = f"{checkpoint.path.name if tag is None else tag}_universal"
    if is_remote(checkpoint.folder):
        return Path(name)
    return Path(checkpoint.folder, name) if tag is not None else Path(checkpoint.path.absolute().parent, name)


def _report(
    checkpoint: Checkpoint, training: Training, target: Path, plan: UniversalPlan, dry_run: bool
) -> UniversalReport:
    states = sorted({state for of in training.states.values() for state in of})
    return UniversalReport(
        source=str(checkpoint.path),
        output=str(target),
        format=checkpoint.format,
        step=checkpoint.step,
        stage=training.stage,
        tensors=len(training.states),
        parameters=sum(checkpoint[name].numel for name in training.states),
        states=["fp32", *states],
        nbytes=plan.nbytes,
        files=len(plan.written) + len(plan.models),
        latest=str(target.resolve().parent / LATEST),
        dry_run=dry_run,
        warnings=[*checkpoint.warnings, *training.warnings, *plan.warnings],
    )


def _state_row(file: StateFile) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file.path, "bytes": file.nbytes}
    if len(file.streams) == 1:
        (stream,) = file.streams
        row |= {
            "dtype": str(stream.dtype),
            "stored_dtype": str(stream.entry.dtype),
            "shape": list(stream.entry.shape),
            "role": file.role,
        }
    return row


def _model_row(file: ModelFile) -> dict[str, Any]:
    return {"file": file.path, "bytes": file.nbytes, "copied_from": str(file.source)}


class UniversalOutput(Destination):
    """The files of a plan, and ``latest_universal`` in the folder, which makes them a checkpoint, and beside it."""

    what = "a checkpoint"
    command = "to-universal"

    def __init__(self, checkpoint: Checkpoint, plan: UniversalPlan, target: Path) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._target = target
        self._states = {file.path: file for file in plan.written}
        self._ranges: dict[str, list[FileRange | None]] = {}

    @property
    def files(self) -> Sequence[OutputFile]:
        """A file for each state of each parameter, and the model states."""
        states = [OutputFile(file.path, file.nbytes, file.data_bytes) for file in self._plan.written]
        return states + [OutputFile(file.path, file.nbytes, file.nbytes) for file in self._plan.models]

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield the states, and the model states as arrays of bytes."""
        read: set[Record] = set()
        for file in self._plan.written:
            ranges: list[FileRange | None] = []
            for stream, offset in zip(file.streams, file.archive.streamed, strict=True):
                ranges.append(files[file.path].range(offset, stream.nbytes) if stream.nbytes else None)
                if (filled := ranges[-1]) is None:
                    continue
                if self._plan.models:
                    read.update(piece.extent.record for piece in stream.entry.pieces if piece.region is None)
                name = file.path if len(file.streams) == 1 else stream.entry.name
                yield file.path, stream.entry, Target(name, stream.dtype, filled.write)
            self._ranges[file.path] = ranges
        raw = BY_NAME["uint8"]
        for model in self._plan.models:
            filled = files[model.path].range(0, model.nbytes)
            yield model.path, _bytes_of(model, read), Target(model.path, raw, filled.write)

    def rest(self, name: str) -> Iterable[tuple[int, bytes]]:
        """Return what surrounds the tensors in their file, now that their CRC-32s are known."""
        file = self._states.get(name)
        if file is None:
            return ()
        return file.archive.fixed(0 if one is None else one.checksum.value for one in self._ranges[name])

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return ``latest_universal``, which names the folder itself: DeepSpeed joins the folder and the tag."""
        return {LATEST: b"."}

    @property
    def links(self) -> Mapping[str, str]:
        """The model states under the names that other stages look for."""
        return self._plan.links

    @property
    def commit_order(self) -> Sequence[str]:
        """``latest_universal`` makes the folder a checkpoint."""
        return [FOLDER, *self._plan.model_names, *self._plan.links, LATEST]

    def older(self, target: Path) -> list[str]:
        """Return what of an earlier universal checkpoint lies in ``target``, ``latest_universal`` first.

        Raises:
            OutputError: ``target`` is the source, or holds another checkpoint, or files in ``zero/`` that no universal
                checkpoint has.
        """
        here = target.resolve()
        if here in (self._checkpoint.path.resolve(), self._checkpoint.folder.resolve()):
            raise OutputError(
                f"{target} is the checkpoint itself; give the output a folder of its own, such as {here}_universal"
            )
        names = sorted(path.name for path in target.iterdir())
        others = [name for name in names if name.endswith("_optim_states.pt")]
        states = [name for name in names if name.endswith(MODEL_STATES)]
        if states and FOLDER not in names and LATEST not in names:
            others += states
        if others:
            raise OutputError(f"{target} holds another checkpoint ({others[0]}); give the output a folder of its own")
        if FOLDER in names and (foreign := _foreign(target / FOLDER)) is not None:
            raise OutputError(
                f"{foreign} belongs to no universal checkpoint, and would be removed with {target / FOLDER}: move it"
                " away, or give the output a folder of its own"
            )
        found = [*states, *(name for name in names if name in (FOLDER, LATEST))]
        return sorted(found, key=lambda name: name != LATEST)

    @property
    def sources(self) -> Sequence[Path]:
        """The model states, which are copied as they are."""
        return [model.source for model in self._plan.models]

    @property
    def pointers(self) -> Mapping[Path, bytes]:
        """``latest_universal`` beside the output, as the official tool leaves it."""
        here = self._target.resolve()
        return {here.parent / LATEST: os.fsencode(here.name)} if here.parent != here else {}  # a bucket has no parent


def _foreign(zero: Path) -> Path | None:
    """Return what in ``zero/`` no universal checkpoint has: anything but files called ``.pt``, in at most one folder.

    DeepSpeed's checkpoint/ds_to_universal.py writes ``zero/<parameter>/<state>.pt`` and ``zero/optimizer_state.pt``.
    """
    if (not is_remote(zero) and zero.is_symlink()) or not zero.is_dir():
        return None  # which is refused elsewhere
    for path in sorted(zero.iterdir()):
        is_folder = path.is_dir() and (is_remote(path) or not path.is_symlink())
        for file in sorted(path.iterdir()) if is_folder else [path]:
            if file.suffix != ".pt" or not (file.is_file() if is_remote(file) else stat.S_ISREG(file.lstat().st_mode)):
                return file
    return None


def _bytes_of(model: ModelFile, read: set[Record]) -> TensorEntry:
    """Return the whole file as an array of bytes: its records, whose CRC-32s are checked on the way, and the rest.

    A record in ``read`` is read again here, and was checked there.
    """

    def pieces() -> Iterator[Piece]:
        records = sorted(TorchFile(model.source).archive.records.values(), key=lambda record: record.offset_bytes)
        position = 0
        for record in (*records, Record(model.source, model.nbytes, 0)):
            if record.offset_bytes > position:
                between = Record(model.source, position, record.offset_bytes - position)
                yield Piece(Extent(between, position, between.nbytes), position, between.nbytes)
            if record.nbytes:
                if record in read:
                    record = Record(record.path, record.offset_bytes, record.nbytes)
                yield Piece(Extent(record, record.offset_bytes, record.nbytes), record.offset_bytes, record.nbytes)
            position = record.offset_bytes + record.nbytes

    return TensorEntry(model.path, BY_NAME["uint8"], (model.nbytes,), lambda: tuple(pieces()))
