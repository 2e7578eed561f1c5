"""``to_dcp``: a checkpoint into a DCP directory that ``torch.distributed.checkpoint.load`` reads, streaming, whole
or absent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import parse_dtype
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.transfer.checksums import RunningChecksum, crc32
from dsconv.checkpoint.transfer.copy import CopyRun, Target, default_workers, write_at
from dsconv.checkpoint.transfer.ordered import run_all
from dsconv.convert import dcp_layout
from dsconv.convert.dcp_layout import METADATA, SUFFIX, DcpPlan, PlacedTensor, make_dcp_plan
from dsconv.convert.flushing import Flusher
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.plan import DEFAULT_SHARD_SIZE, find_config, parse_size
from dsconv.convert.sidecars import read_json
from dsconv.convert.staging import Staging, open_staging, refuse_existing, require_space, settle
from dsconv.convert.ties import tied_pairs
from dsconv.errors import OutputError


@dataclass
class DcpReport:
    """What a run did, or with ``dry_run`` would do. Sizes are in bytes; ``ties`` are further names of a tensor, and
    its own.
    """

    source: str
    output: str
    format: str
    step: int | None
    tensors: int
    parameters: int
    nbytes: int
    files: list[str]
    prefix: str
    ties: dict[str, str]
    dry_run: bool = False
    bytes_read: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def to_dcp(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    tag: str | None = None,
    dtype: str | None = None,
    prefix: str = "",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    dry_run: bool = False,
    force: bool = False,
    fsync: bool = True,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DcpReport:
    """Write any checkpoint as a DCP directory, from which plain, FSDP2 and tensor-parallel models of any layout load.

    ``prefix`` is the key that the trainer keeps its model under, such as ``model.``. Tied weights are stored once and
    found under all of their names, also under those that a safetensors folder left out.

    Raises DsconvError: see ``open_checkpoint``; OutputError when the output exists (without ``force``), is being
    written by another run or does not fit the disk. ValueError for a dtype, size or prefix that is none.
    """
    wanted = parse_dtype(dtype) if dtype else None
    max_file_bytes = parse_size(max_shard_size)
    if prefix and not all(prefix.removesuffix(".").split(".")):
        raise ValueError(f"{prefix!r} is not a prefix: write it like model. or app.model.")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag)
    target = Path(output)
    plan = make_dcp_plan(
        checkpoint, dtype=wanted, prefix=prefix, max_file_bytes=max_file_bytes, extra_names=_tied_names(checkpoint)
    )
    report = _report(checkpoint, target, plan, dry_run)
    if dry_run:
        report.plan = [_row(tensor) for tensor in plan.tensors]
        return report
    settle(target)
    _existing(target, force)
    require_space(target, plan.nbytes)
    with open_staging(target, fsync) as staging:
        old = _existing(target, force)  # again, now that no other run can write there
        _write(plan, staging, report, workers or default_workers(), fsync, progress, checkpoint.stamps)
        staging.write(METADATA, dcp_layout.metadata(plan))
        staging.commit([*plan.files, METADATA], old)
    return report


def _tied_names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """{name: further names of it that the checkpoint lacks}: a safetensors folder keeps one name of a tied weight.

    They are those that the model's class ties, and those in the manifest of a merge.
    """
    manifest = read_json(checkpoint.path / MANIFEST)
    noted = manifest.get("ties") if isinstance(manifest, dict) else None
    pairs = {
        **tied_pairs(find_config([checkpoint.path, checkpoint.folder])),
        **(noted if isinstance(noted, dict) else {}),
    }
    names: dict[str, list[str]] = {}
    for alias, owner in pairs.items():
        if isinstance(owner, str) and owner in checkpoint and alias not in checkpoint:
            names.setdefault(checkpoint[owner].name, []).append(alias)
    return names


def _existing(target: Path, force: bool) -> list[str]:
    """The files of an earlier DCP checkpoint in ``target``, the one that counts first. Raises OutputError without
    ``force``.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    names = (
        sorted(p.name for p in target.iterdir() if p.name == METADATA or p.name.endswith(SUFFIX))
        if target.is_dir()
        else []
    )
    refuse_existing(target, names, "a DCP checkpoint", force)
    return names


def _report(checkpoint: Checkpoint, target: Path, plan: DcpPlan, dry_run: bool) -> DcpReport:
    ties = {alias: tensor.names[0] for tensor in plan.tensors for alias in tensor.names[1:]}
    numel = sum(tensor.entry.numel for tensor in plan.tensors)
    return DcpReport(
        str(checkpoint.path), str(target), checkpoint.format, checkpoint.step, len(plan.tensors), numel, plan.nbytes,
        [*plan.files, METADATA], ".".join(plan.prefix), ties, dry_run=dry_run, warnings=list(checkpoint.warnings),
    )  # fmt: skip


def _row(tensor: PlacedTensor) -> dict[str, Any]:
    first = tensor.chunks[0]
    return {
        "file": first.filename,
        "name": tensor.names[0],
        "dtype": str(tensor.dtype),
        "shape": list(tensor.entry.shape),
        "stored_dtype": str(tensor.entry.dtype),
        "offset": first.offset_bytes + first.head_bytes,
        "bytes": tensor.entry.numel * tensor.dtype.itemsize,
        "chunks": len(tensor.chunks),
        "pieces": tensor.entry.piece_count,
        "role": tensor.entry.role,
    }


class _ChunkedWriter:
    """Puts the bytes of one tensor into its chunks, and keeps the CRC-32 of each."""

    def __init__(self, tensor: PlacedTensor, descriptors: dict[str, int]) -> None:
        self.tensor = tensor
        self.descriptors = descriptors
        self.checks = [RunningChecksum(chunk.data_bytes) for chunk in tensor.chunks]

    def write(self, data: memoryview, offset_bytes: int) -> None:
        itemsize = self.tensor.dtype.itemsize
        while len(data):
            number = self.tensor.chunk_at(offset_bytes // itemsize)
            chunk = self.tensor.chunks[number]
            inside = offset_bytes - chunk.start * itemsize
            part = data[: chunk.data_bytes - inside]
            write_at(self.descriptors[chunk.filename], chunk.offset_bytes + chunk.head_bytes, part, inside)
            self.checks[number].add(inside, len(part), crc32(part))
            data, offset_bytes = data[len(part) :], offset_bytes + len(part)

    def finish(self) -> None:
        """Write what surrounds each chunk, now that its CRC-32 is known."""
        for chunk, check in zip(self.tensor.chunks, self.checks, strict=True):
            assert check.complete, f"not all of {self.tensor.names[0]} was written"
            head, tail = dcp_layout.zip_around(
                dcp_layout.data_pickle(self.tensor.dtype, chunk.sizes), chunk.data_bytes, check.value
            )
            descriptor = self.descriptors[chunk.filename]
            write_at(descriptor, chunk.offset_bytes, memoryview(head), 0)
            write_at(descriptor, chunk.offset_bytes, memoryview(tail), chunk.head_bytes + chunk.data_bytes)


def _write(
    plan: DcpPlan,
    staging: Staging,
    report: DcpReport,
    workers: int,
    fsync: bool,
    progress: Callable[[str, int, int], None] | None,
    stamps: Mapping[Path, object],
) -> None:
    descriptors: dict[str, int] = {}
    done = 0
    total = plan.data_bytes
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            current = done
        if progress is not None:
            progress("copy", current, total)

    try:
        for filename, nbytes in plan.files.items():
            descriptors[filename] = staging.create(filename, nbytes)
        writers = [_ChunkedWriter(tensor, descriptors) for tensor in plan.tensors]
        targets = [
            Target(
                w.tensor.names[0],
                w.tensor.dtype,
                w.write,
                RunningChecksum(w.tensor.entry.numel * w.tensor.dtype.itemsize),
            )
            for w in writers
        ]
        run = CopyRun(workers, {}, advance, stamps)
        with Flusher(list(descriptors.values()), lambda: done, fsync):
            run_all(((tensor.entry, target) for tensor, target in zip(plan.tensors, targets, strict=True)), run)
            for writer in writers:
                writer.finish()
            if fsync:
                for descriptor in descriptors.values():
                    os.fsync(descriptor)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{staging.target}: writing the output failed: {error.strerror}; nothing of it was kept"
        ) from None
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    report.bytes_read = run.stats.bytes_read
    report.overflowed = dict(sorted(run.stats.overflowed.items()))
    if report.overflowed:
        report.warnings.append(
            f"{sum(report.overflowed.values())} values in {len(report.overflowed)} tensors are too large for the dtype"
            f" and became infinite, first in {next(iter(report.overflowed))!r}"
        )
