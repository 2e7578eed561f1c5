"""``stream_into``: fill an existing model from a checkpoint, however its parameters are sharded."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.patches import Patch
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.transfer.casting import CASTABLE
from dsconv.checkpoint.transfer.fill import Filling, Reads, Slot, reads_of
from dsconv.checkpoint.transfer.reading import tensor_bytes
from dsconv.errors import UnsupportedError
from dsconv.loaders.agreement import agreement
from dsconv.loaders.fingerprint import fingerprint
from dsconv.loaders.mapping import Computed, Matched, full_shape, match
from dsconv.loaders.masters import master_slots
from dsconv.loaders.memory import block_maker, slot_of
from dsconv.loaders.partitions import held_numel, partition_slots
from dsconv.loaders.report import LoadReport, check_strict
from dsconv.loaders.swapping import batches, in_buffers, is_swapped
from dsconv.names.choosing import as_hf


@dataclass(frozen=True)
class FillOptions:
    """How a model is filled; the fields are the keywords of the public loaders."""

    strict: bool
    ignore_mismatched_sizes: bool
    workers: int | None = None
    progress: Callable[[str, int, int], None] | None = None


def stream_into(
    model: torch.nn.Module,
    source: str | os.PathLike[str] | Checkpoint,
    *,
    strict: bool = True,
    tag: str | None = None,
    item: str | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LoadReport:
    """Fill ``model`` from any checkpoint that ``open_checkpoint`` reads.

    Each rank reads the bytes that it holds, once. Every rank that holds a part of the model must call this. Parameters
    may be plain, ZeRO-3 partitions (``zero.Init``), or DTensors of any placement but Partial; buffers are filled too. A
    DeepSpeed engine, or its model, also has the optimizer's fp32 masters filled from the checkpoint, at their own
    precision.

    Args:
        model: The model, a DeepSpeed engine or DistributedDataParallel.
        source: A path, a URL, the id of a model on the Hub, or an open checkpoint.
        strict: Require every tensor to match; without it, what fits is loaded.
        tag: The checkpoint to read, if ``source`` holds several.
        item: The key of the model to read, if the checkpoint holds several.
        workers: Reading threads; by default as many as the machine has use for.
        progress: Called with ("load", bytes done, bytes in all), from any thread.

    Returns:
        The report of this rank, which rank 0 prints too.

    Raises:
        InconsistentCheckpointError: ``strict``, and a tensor is missing, unexpected or of another shape, or the ranks
            do not read copies of one checkpoint. Nothing has been changed then.
        UnsupportedError: The model has parameters that cannot be filled, or the checkpoint cannot be read.
        RankFailedError: Another rank failed.
        DsconvError: ``open_checkpoint`` failed.
    """
    began = time.monotonic()
    model = _unwrapped(model)
    with agreement("stream_into") as told:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item)
        if hasattr(model, "base_model_prefix"):  # of transformers
            checkpoint = as_hf(checkpoint, model.config)
        told.fingerprint = fingerprint(checkpoint)
    with agreement("stream_into"):
        how = FillOptions(strict, ignore_mismatched_sizes=not strict, workers=workers, progress=progress)
        report = fill_model(model, checkpoint, match(model, checkpoint), how)
    report.seconds = time.monotonic() - began
    print_once(report)
    return report


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a DeepSpeed engine or DistributedDataParallel; its names are the checkpoint's."""
    if type(model).__name__ in ("DeepSpeedEngine", "DeepSpeedHybridEngine", "DistributedDataParallel"):
        return model.module
    return model


def fill_model(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    matched: Matched,
    how: FillOptions,
) -> LoadReport:
    """Check ``matched`` and read what it says. Ranks do not communicate here."""
    missing, unexpected = _adjusted(model, matched)
    if how.strict:
        check_strict(matched, missing, unexpected, str(checkpoint.path))
    elif matched.mismatched and not how.ignore_mismatched_sizes:
        check_strict(matched, (), (), str(checkpoint.path))
    report = LoadReport(
        str(checkpoint.path),
        checkpoint.format,
        missing=sorted(missing),
        unexpected=sorted(unexpected),
        mismatched=matched.mismatched,
    )
    report.warnings += checkpoint.warnings
    jobs: list[Reads] = []
    computed: dict[int, tuple[Computed, list[tuple[str, Slot | torch.Tensor]]]] = {}
    swapped: list[tuple[torch.Tensor, tuple[Patch, ...]]] = []  # partitions on NVMe
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    done: set[int] = set()
    devices: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        made_of = matched.sources.get(name)
        if made_of is None or id(tensor) in done:
            continue
        done.add(id(tensor))
        report.loaded += 1
        slots = list(_slots(name, tensor, copies, devices))
        _check_cast(name, tensor.dtype, made_of)
        if isinstance(made_of, Computed):
            parts = computed.setdefault(id(made_of), (made_of, []))[1]
            parts += [(name, part) for part in (*slots, *([tensor] if is_swapped(tensor) else []))]
            report.computed[name] = made_of.why
            continue
        jobs += [job for slot in slots for job in reads_of(made_of, slot)]
        if is_swapped(tensor):
            swapped.append((tensor, made_of))
    total = sum(job.nbytes for job in jobs) + sum(
        held_numel(tensor) * made_of[0].entry.dtype.itemsize for tensor, made_of in swapped
    )
    filling = Filling(how.workers, _counter(how.progress, total), block_maker(devices))
    filling.run(jobs)
    for batch in batches(swapped):
        with in_buffers([tensor for tensor, _ in batch]):
            filling.run(
                [
                    job
                    for tensor, made_of in batch
                    for slot in partition_slots(tensor)
                    for job in reads_of(made_of, slot)
                ]
            )
    report.bytes_read, report.overflowed = filling.bytes_read, filling.overflowed
    for group, parts in computed.values():  # one at a time: each holds whole tensors
        values = group.values()
        report.bytes_read += sum(entry.nbytes for entry in group.entries)
        for name, part in parts:
            if isinstance(part, Slot):
                _fill_from(values[name], part)
                continue
            with in_buffers([part]):
                for slot in partition_slots(part):
                    _fill_from(values[name], slot)
    with torch.no_grad():
        for target, contiguous in copies:
            target.copy_(contiguous)
    return report


def _slots(
    name: str, tensor: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]], devices: set[str]
) -> Iterator[Slot]:
    """Yield the slots of a model's tensor in this rank's memory.

    ``copies`` gains (target, contiguous copy) for memory that is not contiguous, and ``devices`` the devices in use.
    """
    if hasattr(tensor, "ds_tensor"):
        if hasattr(tensor.ds_tensor, "ds_quant_scale"):
            raise UnsupportedError(
                f"{name} has a quantized partition (zero_quantized_nontrainable_weights), which cannot be filled"
            )
        if not is_swapped(tensor):
            devices.add(tensor.ds_tensor.device.type)
            yield from partition_slots(tensor)
        if tensor.ds_status.name == "AVAILABLE":  # gathered, as persistent parameters stay after a step
            devices.add(tensor.device.type)
            yield slot_of(tensor.detach(), full_shape(tensor))
        yield from master_slots(name, tensor)
        return
    local, region = tensor.detach(), None
    if hasattr(tensor, "placements"):
        from dsconv.loaders.dtensors import region_of

        local, region = tensor.to_local().detach(), region_of(tensor, name)
    if local.device.type == "meta":
        raise UnsupportedError(f"{name} is on the meta device: allocate memory first, with model.to_empty(device=…)")
    devices.add(local.device.type)
    yield from master_slots(name, tensor)
    if not local.is_contiguous():
        copies.append((local, torch.empty(local.shape, dtype=local.dtype, device=local.device)))
        local = copies[-1][1]
    yield slot_of(local, full_shape(tensor), 0, region)


def _check_cast(name: str, dtype: torch.dtype, made_of: tuple[Patch, ...] | Computed) -> None:
    """Raise UnsupportedError if a cast would mistake quantized values for numbers, or the reverse."""
    wanted = BY_NAME[str(dtype).removeprefix("torch.")]
    for entry in made_of.entries if isinstance(made_of, Computed) else [patch.entry for patch in made_of]:
        stored = entry.dtype
        if not (stored.floating or wanted.floating) and stored != wanted:
            _check_integers(name, entry, dtype)
        if stored == wanted or {stored.name, wanted.name} <= CASTABLE or not (stored.floating or wanted.floating):
            continue
        raise UnsupportedError(
            f"{name} is {wanted} in the model, and {entry.name} is stored as {stored}: weights are neither"
            " quantized nor dequantized here"
        )


def _check_integers(name: str, entry: TensorEntry, dtype: torch.dtype) -> None:
    """Raise UnsupportedError unless the model's dtype holds every value of an entry of integers.

    The entry is read for that if its dtype is wider.
    """
    lowest, highest = _integer_limits(dtype)
    stored_lowest, stored_highest = _integer_limits(getattr(torch, entry.dtype.name))
    if (lowest <= stored_lowest and stored_highest <= highest) or not entry.numel:
        return
    values = entry.read()
    low, high = int(values.min()), int(values.max())
    if low < lowest or high > highest:
        raise UnsupportedError(
            f"{name} is {str(dtype).removeprefix('torch.')} in the model, but {entry.name} has values from {low} to"
            f" {high}, which do not fit: give the model a tensor of {entry.dtype}"
        )


def _integer_limits(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return 0, 1
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def _fill_from(full: torch.Tensor, slot: Slot) -> None:
    """Fill a slot from the whole tensor in memory."""
    if slot.numel == 0:
        return
    for dim, intervals in enumerate(slot.region or ()):
        full = full.index_select(dim, torch.cat([torch.arange(a, b) for a, b in intervals]))
    part = full.reshape(-1)[slot.start : slot.start + slot.numel].to(getattr(torch, slot.dtype.name)).contiguous()
    slot.write(tensor_bytes(part), 0)


def _counter(progress: Callable[[str, int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lock = threading.Lock()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress("load", done, total)

    return advance


def _adjusted(model: Any, matched: Matched) -> tuple[set[str], set[str]]:
    """Return the names that are really missing and unexpected.

    Tensors that are tied to one that is present do not count, nor do those that transformers ignores.
    """
    tensors = model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in tensors.items() if name in matched.sources}
    missing = {name for name in matched.missing if id(tensors[name]) not in there}
    if not hasattr(model, "_adjust_missing_and_unexpected_keys"):
        return missing, matched.unexpected
    tied = getattr(model, "all_tied_weights_keys", {})
    info = _info(missing - {name for name, owner in tied.items() if owner in matched.sources}, matched.unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.missing_keys), set(info.unexpected_keys)


def _info(missing: set[str], unexpected: set[str]) -> Any:
    from transformers.modeling_utils import LoadStateDictInfo

    return LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def finish_transformers(
    model: Any, matched: Matched, folder: Path | None, device_map: dict[str, Any] | None = None
) -> None:
    """Finish a load as ``from_pretrained`` does (transformers ``_finalize_model_loading``).

    Missing weights are initialised, weights are tied, and the generation configuration is read.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in matched.sources:
            tensor._is_hf_initialized = True
    info = _info(matched.missing | set(matched.mismatched), matched.unexpected)
    model.mark_tied_weights_as_initialized(info)
    if device_map is not None:  # under ZeRO-3 nothing is on the meta device
        model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), device_map, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model.eval()
    if folder is not None and (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def print_once(report: LoadReport) -> None:
    """Print the report on rank 0."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(report.summary(), file=sys.stderr)
