"""Stage-0 checkpoints: one ``mp_rank_00_model_states.pt`` whose ``module`` is the model.

With bf16 or fp16 the optimizer's state, inline, holds fp32 masters (DeepSpeed 0.19.8 ``runtime/fp16/unfused_optimizer.py``
``fp32_groups``, ``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``). They carry no names: they are matched to the
module's tensors by order and shape, and each match is checked by casting the first elements of the master.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dsconv.checkpoint.formats import crosscheck
from dsconv.checkpoint.formats.module_states import ModuleStates, read_module_states, refuse_missing_experts
from dsconv.checkpoint.standins import TensorRef
from dsconv.checkpoint.tensormap import Checkpoint, Extent, TensorEntry
from dsconv.checkpoint.torch_file import TorchFile, is_contiguous, read_extent
from dsconv.errors import MalformedError, MissingShardError
from dsconv.zero_utils.files import TagFolder


def read_stage0(folder: TagFolder) -> Checkpoint:
    """The tensor map of a checkpoint without ZeRO optimizer files.

    Raises MissingShardError where the model states say that there should be some.
    """
    if not folder.model:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 model states without optimizer files (zero_pp_rank_*_optim_states.pt), which hold the weights"
        )
    states = read_module_states(next(iter(folder.model.values())))
    refuse_zero(folder, states)
    refuse_missing_experts(states)
    warnings = list(folder.warnings)
    ties = states.ties()
    entries = states.module_entries(exclude=set(), ties=ties)
    if not entries:
        raise MalformedError(f"{states.path}: the module holds no tensors")
    entries = {name: _as_parameter(entry) for name, entry in entries.items()}
    masters = _masters(states, entries, warnings)
    entries.update(masters)
    return finish(folder, states, entries, len(masters), warnings)


def refuse_zero(folder: TagFolder, states: ModuleStates) -> None:
    if states.param_shapes:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is of a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there are none. "
            "Copy them from the nodes that wrote them"
        )


def finish(folder: TagFolder, states: ModuleStates, entries: dict[str, TensorEntry], masters: int, warnings: list[str]) -> Checkpoint:
    if not states.file.archive.checksummed:
        warnings.append("the file was saved without checksums (torch.serialization.set_crc32_options): damage cannot be seen")
    return Checkpoint(
        folder.path,
        "DeepSpeed stage 0",
        entries,
        folder=folder.save_dir,
        step=states.step,
        world={"data_parallel": _world(states), "model_parallel": 1},
        info={"zero_stage": 0, "tag": folder.tag, "deepspeed_version": states.ds_version, "masters": masters},
        warnings=tuple(warnings),
        sources=(states.path,),
        is_zero=True,
    )


def _as_parameter(entry: TensorEntry) -> TensorEntry:
    """Stage 0 does not say what was frozen."""
    if entry.role == "buffer":
        return entry
    return TensorEntry(entry.name, entry.dtype, entry.shape, entry.layout, entry.aliases, "parameter")


def _world(states: ModuleStates) -> int:
    world = states.raw.get("dp_world_size")
    return world if type(world) is int and world > 0 else 1


def _masters(states: ModuleStates, entries: dict[str, TensorEntry], warnings: list[str]) -> dict[str, TensorEntry]:
    """Entries read from the fp32 masters, by name; empty where there are none or they cannot be told apart."""
    optimizer = states.optimizer
    if not isinstance(optimizer, dict):
        return {}
    groups = optimizer.get("fp32_groups")
    flat = optimizer.get("fp32_groups_flat")
    names = [name for name, entry in entries.items() if entry.role == "parameter"]
    if isinstance(groups, list) and groups:
        matched, unknown = match(states.file, names, entries, masters_of(groups))
    elif isinstance(flat, list) and all(isinstance(t, TensorRef) for t in flat):
        matched, unknown = match_flat(states.file, names, entries, flat)
    else:
        return {}
    if unknown:
        warnings.append(
            "the fp32 masters in the optimizer's state could not be matched to the parameters: the module's own weights were taken"
        )
        return {}
    result = {}
    for name, master in matched.items():
        old = entries[name]
        result[name] = TensorEntry(name, master.dtype, old.shape, partial(states.file.pieces, master), old.aliases, "parameter")
        result[name].layout()
    unmatched = [name for name in names if name not in matched]
    for name in unmatched:  # no master, so the optimizer did not own it
        old = entries[name]
        result[name] = TensorEntry(name, old.dtype, old.shape, old.layout, old.aliases, "frozen")
    return result


def masters_of(groups: list[Any]) -> list[TensorRef]:
    """The tensors of ``fp32_groups``, a list a parameter group."""
    return [t for group in groups if isinstance(group, list) for t in group if isinstance(t, TensorRef)]


def _agrees(file: TorchFile, master: TensorRef, entry: TensorEntry) -> bool:
    """Whether the first elements of a master, which lies in ``file``, are the weight's when cast."""
    if entry.shape != master.shape or not entry.numel:
        return entry.shape == master.shape
    piece = entry.pieces[0]
    if piece.strides is not None or not is_contiguous(master.shape, master.strides):
        return True
    count = min(crosscheck.SAMPLES * 4, piece.numel)
    high = crosscheck.decode(read_extent(file.extent(master, 0, count)), master.dtype)
    extent = Extent(piece.extent.record, piece.extent.offset_bytes, count * entry.dtype.itemsize)
    low = crosscheck.decode(read_extent(extent), entry.dtype)
    if high is None or low is None:
        return True
    return all(crosscheck.cast(h, entry.dtype) == w or h != h for h, w in zip(high, low, strict=True))


def match(file: TorchFile, names: list[str], entries: dict[str, TensorEntry], tensors: list[TensorRef]) -> tuple[dict[str, TensorRef], int]:
    """Give each master the next parameter, in the order of ``names``, of its shape and values; and how many found none."""
    free = dict.fromkeys(names)
    matched: dict[str, TensorRef] = {}
    position = unknown = 0
    index = {name: i for i, name in enumerate(names)}
    for master in tensors:
        following = [name for name in names[position:] if name in free] + [name for name in names[:position] if name in free]
        name = next((name for name in following if _agrees(file, master, entries[name])), None)
        if name is None:
            unknown += 1
            continue
        matched[name] = master
        del free[name]
        position = index[name] + 1
    return matched, unknown


def match_flat(
    file: TorchFile, names: list[str], entries: dict[str, TensorEntry], flats: list[TensorRef]
) -> tuple[dict[str, TensorRef], int]:
    """The same for groups flattened into one tensor each: walk the names' order and cut the group as it goes."""
    matched: dict[str, TensorRef] = {}
    free = list(names)
    for flat in flats:
        offset = 0
        while offset < flat.numel:
            for name in free:
                entry = entries[name]
                if not entry.numel or offset + entry.numel > flat.numel:
                    continue
                strides = _row_major(entry.shape)
                view = TensorRef(flat.storage, flat.dtype, flat.offset + offset, entry.shape, strides)
                if _agrees(file, view, entry):
                    matched[name] = view
                    free.remove(name)
                    offset += entry.numel
                    break
            else:
                return {}, 1
    return matched, 0


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
