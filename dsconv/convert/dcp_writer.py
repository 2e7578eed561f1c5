"""``to_dcp``: a checkpoint into a DCP directory that ``torch.distributed.checkpoint.load`` reads, streaming, whole
or absent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsconv.checkpoint.config_files import find_config
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType, DTypeName, parse_dtype
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.storage.roots import as_output
from dsconv.convert.dcp_layout import DcpPlan, KeyPath, Value, flat_name, make_dcp_plan
from dsconv.convert.dcp_output import DcpOutput
from dsconv.convert.dcp_training import LAYOUTS, TITAN, TORCH, contents_with_optimizer, layout_of, model_items
from dsconv.convert.fp8 import dequantized
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.parts import parse_part
from dsconv.convert.plan import DEFAULT_SHARD_SIZE, parse_size, require_whole_set
from dsconv.convert.progress import Progress
from dsconv.convert.report import Report, tensor_row
from dsconv.convert.sidecars import MAX_MANIFEST_BYTES, read_json
from dsconv.convert.staging import recover_interrupted
from dsconv.convert.ties import tied_pairs
from dsconv.convert.torch_optimizer import torch_optimizer
from dsconv.convert.universal_plan import training_of
from dsconv.convert.writing import WriteOptions, refuse_target, write
from dsconv.errors import CheckpointNotFoundError, UsageError
from dsconv.names.choosing import with_names
from dsconv.names.marks import FRAMEWORKS, STORED

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class DcpReport(Report):
    """What a run did, or with ``dry_run`` would do. Sizes are in bytes.

    ``ties`` are {further name of a tensor: its own}. ``layout``, ``states`` and ``parameter_groups`` tell of the
    optimizer, and are None, empty and 0 without one.
    """

    files: list[str]
    prefix: str
    ties: dict[str, str]
    layout: str | None = None
    states: list[str] = field(default_factory=list)
    parameter_groups: int = 0


def to_dcp(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    tag: str | None = None,
    item: str | None = None,
    follow_links: bool = False,
    dtype: DTypeName | torch.dtype | None = None,
    prefix: str = "",
    names: Literal["stored", "torchtitan", "megatron"] = "stored",
    optimizer: bool = False,
    layout: Literal["torch", "accelerate", "torchtitan"] = "torch",
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
        optimizer: write the optimizer too: its states, step counts and parameter groups, with the fp32 masters as the
            parameters. The source is a checkpoint of DeepSpeed's, or a DCP directory, that holds them.
        layout: how the model and the optimizer are laid out. ``torch``: as ``{"model": …, "optim": …}`` of torch's
            state-dict API, below ``prefix``. ``accelerate``: in ``pytorch_model_fsdp_0/`` and ``optimizer_0/``, as
            ``Accelerator.load_state`` takes them under FSDP. ``torchtitan``: as a step of its own, for a model with
            Hugging Face's names whose config.json lies beside it.
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
            written by another run or does not fit the disk; with ``optimizer``, UnsupportedError when the source holds
            no optimizer, or one that torch cannot go on with.
        ValueError: the dtype, the size or the prefix is not one.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if layout != TORCH and not optimizer:
        raise UsageError("--layout says how a model lies beside its optimizer: add --optimizer")
    if prefix and layout != TORCH:
        raise UsageError(f"--layout {layout} has its own keys: leave --prefix out")
    wanted = parse_dtype(dtype) if dtype is not None else None
    max_file_bytes = parse_size(max_shard_size)
    if prefix and not all(prefix.removesuffix(".").split(".")):
        raise ValueError(f"{prefix!r} is not a prefix: write it like model. or app.model.")
    before = tuple(prefix.rstrip(".").split(".")) if prefix else ()
    target = as_output(output)
    checkpoint = (
        source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item, follow_links=follow_links)
    )
    if optimizer and wanted is not None:
        raise UsageError("--dtype casts weights, and an optimizer goes on from its masters as they are: leave it out")
    if names not in (STORED, *FRAMEWORKS):
        raise UsageError(f"names is {names!r}; expected {' or '.join(map(repr, (*FRAMEWORKS, STORED)))}")
    is_megatron = names == "megatron"  # with a destination of its own
    if is_megatron and prefix:
        raise UsageError("--prefix cannot be combined with --names megatron, whose names have none")
    if names != STORED and optimizer and layout != names:
        raise UsageError("--names renames weights only: leave out --optimizer, or give --layout torchtitan")
    config = find_config([checkpoint.path, checkpoint.folder])
    training = training_of(checkpoint, "a DCP checkpoint with an optimizer") if optimizer else None
    if training is not None and layout == TITAN:
        names = "torchtitan"
        training = _titan_training(training, checkpoint, config)
    checkpoint = dequantized(checkpoint, config, wanted)
    if names != STORED:
        checkpoint = with_names(checkpoint, config, names)
    require_whole_set(checkpoint)
    extra_names = _tied_names(checkpoint)
    if training is not None:
        paths = layout_of(layout, before)
        kept = torch_optimizer(training, checkpoint.path)
        made = contents_with_optimizer(checkpoint, training, kept, paths, max_file_bytes, extra_names)
        plans = made.plans
        report = _report(checkpoint, target, plans, paths.model, dry_run)
        report.prefix = flat_name(before)
        report.layout, report.parameter_groups = layout, len(kept.groups)
        report.states = sorted({state for states in training.states.values() for state in states})
        report.warnings += [*training.warnings, *kept.warnings, *made.warnings]
        destination = DcpOutput(plans, len(before), made.beside)
        report.files += made.beside
    else:
        plans = [_plan_weights(checkpoint, before, extra_names, wanted, max_file_bytes, is_megatron)]
        report = _report(checkpoint, target, plans, before, dry_run)
        destination = DcpOutput(plans, len(before))
        if is_megatron:
            from dsconv.convert.megatron_output import MegatronOutput

            destination = MegatronOutput(plans[0], checkpoint)
    if dry_run:
        report.warnings += refuse_target(destination, target, WriteOptions(force))
        for tensor in (tensor for plan in plans for tensor in plan.tensors):
            first = tensor.chunks[0]
            name, offset = flat_name(tensor.paths[0][len(before) :]), first.offset_bytes + first.head_bytes
            row = tensor_row(name, tensor.entry, tensor.dtype, first.filename, offset)
            report.plan.append({**row, "chunks": len(tensor.chunks)})
        return report
    recover_interrupted(target)
    settings = repr((tag, item, follow_links, wanted, prefix, names, optimizer, layout, max_file_bytes))
    options = WriteOptions(force, fsync, False, workers, progress, parse_part(part), settings)
    written = write(destination, checkpoint, target, options)
    report.note_copy(written)
    return report


def _titan_training(training: Training, checkpoint: Checkpoint, config: Path | None) -> Training:
    """Return the optimizer under torchtitan's names. Raises what ``with_titan_names`` raises."""
    from dsconv.convert.titan_training import with_titan_names
    from dsconv.names.operations import Config

    found = Config.read(config)
    if found is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: --layout torchtitan needs the model's config.json beside the weights"
        )
    return with_titan_names(training, checkpoint, found)


def _plan_weights(
    checkpoint: Checkpoint,
    before: KeyPath,
    extra_names: Mapping[str, list[str]],
    dtype: DType | None,
    max_file_bytes: int,
    is_megatron: bool,
) -> DcpPlan:
    """Lay out a model without an optimizer, and for Megatron-core the objects that it looks for."""
    folder, values = "", list[Value]()
    if is_megatron:
        from dsconv.convert.megatron_output import iteration_folder
        from dsconv.names.megatron import extra_states

        folder, values = iteration_folder(checkpoint), [Value([None], (key,)) for key in extra_states(checkpoint)]
    model = model_items(checkpoint, before, extra_names)
    return make_dcp_plan(
        model, values, source=checkpoint.path, dtype=dtype, max_file_bytes=max_file_bytes, folder=folder
    )


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


def _report(
    checkpoint: Checkpoint, target: Path, plans: Sequence[DcpPlan], before: KeyPath, dry_run: bool
) -> DcpReport:
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    ties = {path[len(before) :]: tensor.paths[0][len(before) :] for tensor in tensors for path in tensor.paths[1:]}
    return DcpReport(
        source=str(checkpoint.path),
        output=str(target),
        format=checkpoint.format,
        step=checkpoint.step,
        tensors=len(tensors),
        parameters=sum(entry.numel for entry in checkpoint.values()),
        nbytes=sum(plan.nbytes for plan in plans),
        files=[name for plan in plans for name in plan.names],
        prefix=flat_name(before),
        ties={flat_name(alias): flat_name(name) for alias, name in ties.items()},
        dry_run=dry_run,
        warnings=list(checkpoint.warnings),
    )
