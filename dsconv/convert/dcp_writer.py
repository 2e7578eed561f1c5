"""``to_dcp``: a checkpoint into a DCP directory that ``torch.distributed.checkpoint.load`` reads, streaming, whole
or absent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsconv.checkpoint.config_files import find_config
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import parse_dtype
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.storage.roots import as_output
from dsconv.convert.dcp_layout import METADATA, DcpPlan, make_dcp_plan
from dsconv.convert.dcp_output import DcpOutput
from dsconv.convert.fp8 import dequantized
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.parts import parse_part
from dsconv.convert.plan import DEFAULT_SHARD_SIZE, parse_size
from dsconv.convert.progress import Progress
from dsconv.convert.report import Report, tensor_row
from dsconv.convert.sidecars import MAX_MANIFEST_BYTES, read_json
from dsconv.convert.staging import recover_interrupted
from dsconv.convert.ties import tied_pairs
from dsconv.convert.writing import WriteOptions, refuse_target, write
from dsconv.errors import UsageError
from dsconv.names.choosing import with_names
from dsconv.names.marks import FRAMEWORKS, STORED

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class DcpReport(Report):
    """What a run did, or with ``dry_run`` would do. Sizes are in bytes.

    ``ties`` are {further name of a tensor: its own}.
    """

    files: list[str]
    prefix: str
    ties: dict[str, str]


def to_dcp(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    tag: str | None = None,
    item: str | None = None,
    follow_links: bool = False,
    dtype: str | torch.dtype | None = None,
    prefix: str = "",
    names: str = STORED,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    dry_run: bool = False,
    force: bool = False,
    fsync: bool | None = None,
    workers: int | None = None,
    part: str | None = None,
    progress: Progress | None = None,
) -> DcpReport:
    """Write any checkpoint as a DCP directory, from which plain, FSDP2 and tensor-parallel models of any layout load.

    Tied weights are stored once and found under all of their names, also under those that a safetensors folder left
    out.

    Args:
        source: a path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        output: the folder to write, on the disk or in a store.
        tag: the checkpoint of a save folder to take (default: what the file ``latest`` names).
        item: the key of the model to take, where the checkpoint holds several.
        follow_links: read what links lead to that leave the checkpoint's folder.
        dtype: fp32, bf16 or fp16, by these names or torch's, or as a ``torch.dtype``. Every floating tensor of 16 bits
            or more is cast to it, once, to nearest even.
        prefix: the key that the trainer keeps its model under, such as ``model.``.
        names: ``torchtitan`` or ``megatron`` for that framework's names and layouts of a model that has Hugging Face's,
            whose config.json lies beside it; ``stored`` keeps the names. Megatron's checkpoint is a run folder.
        max_shard_size: the size of an output file, in bytes or like ``5GB``. Only a file of one chunk exceeds it.
        dry_run: write nothing, and report the plan.
        force: replace a DCP checkpoint that ``output`` already holds.
        fsync: have the output on disk before it counts as written (default: yes). A store takes None only.
        workers: the number of copying threads (default: one per core, at most 8).
        part: ``I/N`` for part I of N, each written by a process of its own, or ``auto``. See docs/many-machines.md.
        progress: called with (phase, bytes done, bytes in all), from any thread.

    Returns:
        What was written, or with ``dry_run`` would be.

    Raises:
        DsconvError: what ``open_checkpoint`` raises; OutputError when the output exists (without ``force``), is being
            written by another run or does not fit the disk.
        ValueError: the dtype, the size or the prefix is not one.
    """
    wanted = parse_dtype(dtype) if dtype is not None else None
    max_file_bytes = parse_size(max_shard_size)
    if prefix and not all(prefix.removesuffix(".").split(".")):
        raise ValueError(f"{prefix!r} is not a prefix: write it like model. or app.model.")
    target = as_output(output)
    checkpoint = (
        source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item, follow_links=follow_links)
    )
    if names not in (STORED, *FRAMEWORKS):
        raise UsageError(f"names is {names!r}; expected {' or '.join(map(repr, (*FRAMEWORKS, STORED)))}")
    is_megatron = names == "megatron"  # with a destination of its own
    if is_megatron and prefix:
        raise UsageError("--prefix cannot be combined with --names megatron, whose names have none")
    config = find_config([checkpoint.path, checkpoint.folder])
    checkpoint = dequantized(checkpoint, config, wanted)
    if names != STORED:
        checkpoint = with_names(checkpoint, config, names)
    folder = ""
    if is_megatron:
        from dsconv.convert.megatron_output import MegatronOutput, iteration_folder

        folder = iteration_folder(checkpoint)
    plan = make_dcp_plan(
        checkpoint,
        dtype=wanted,
        prefix=prefix,
        max_file_bytes=max_file_bytes,
        extra_names=_tied_names(checkpoint),
        folder=folder,
    )
    report = _report(checkpoint, target, plan, dry_run)
    destination = MegatronOutput(plan, checkpoint) if is_megatron else DcpOutput(plan)
    if dry_run:
        report.warnings += refuse_target(destination, target, WriteOptions(force))
        for tensor in plan.tensors:
            first = tensor.chunks[0]
            row = tensor_row(
                tensor.names[0], tensor.entry, tensor.dtype, first.filename, first.offset_bytes + first.head_bytes
            )
            report.plan.append({**row, "chunks": len(tensor.chunks)})
        return report
    recover_interrupted(target)
    settings = repr((tag, item, follow_links, wanted, prefix, names, max_file_bytes))
    options = WriteOptions(force, fsync, False, workers, progress, parse_part(part), settings)
    written = write(destination, checkpoint, target, options)
    report.note_copy(written)
    return report


def _tied_names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return {name: further names of the tensor that the checkpoint lacks}.

    A safetensors folder keeps one name of a tied weight. The others are those that the model's class ties, and those
    in the manifest of a merge.
    """
    manifest = read_json(checkpoint.path / MANIFEST, MAX_MANIFEST_BYTES)
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


def _report(checkpoint: Checkpoint, target: Path, plan: DcpPlan, dry_run: bool) -> DcpReport:
    return DcpReport(
        source=str(checkpoint.path),
        output=str(target),
        format=checkpoint.format,
        step=checkpoint.step,
        tensors=len(plan.tensors),
        parameters=sum(tensor.entry.numel for tensor in plan.tensors),
        nbytes=plan.nbytes,
        files=[*plan.files, plan.folder + METADATA],
        prefix=".".join(plan.prefix),
        ties={alias: tensor.names[0] for tensor in plan.tensors for alias in tensor.names[1:]},
        dry_run=dry_run,
        warnings=list(checkpoint.warnings),
    )
