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
from dsconv.checkpoint.tensormap import Checkpoint, TensorEntry
from dsconv.checkpoint.torch_file import is_contiguous, read_extent
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
    if states.param_shapes:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is of a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there are none. "
            "Copy them from the nodes that wrote them"
        )
    refuse_missing_experts(states)
    warnings = list(folder.warnings)
    ties = states.ties()
    entries = states.module_entries(exclude=set(), ties=ties)
    if not entries:
        raise MalformedError(f"{states.path}: the module holds no tensors")
    entries = {name: _as_parameter(entry) for name, entry in entries.items()}
    masters = _masters(states, entries, warnings)
    entries.update(masters)
    if not states.file.archive.checksummed:
        warnings.append("the file was saved without checksums (torch.serialization.set_crc32_options): damage cannot be seen")
    return Checkpoint(
        folder.path,
        "DeepSpeed stage 0",
        entries,
        folder=folder.save_dir,
        step=states.step,
        world={"data_parallel": _world(states), "model_parallel": 1},
        info={"zero_stage": 0, "tag": folder.tag, "deepspeed_version": states.ds_version, "masters": len(masters)},
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
        tensors = [t for group in groups if isinstance(group, list) for t in group if isinstance(t, TensorRef)]
        matched = _match(states, names, entries, tensors)
    elif isinstance(flat, list) and all(isinstance(t, TensorRef) for t in flat):
        matched = _match_flat(states, names, entries, flat)
    else:
        return {}
    if matched is None:
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


def _agrees(states: ModuleStates, name: str, master: TensorRef) -> bool:
    """Whether the first elements of a master, cast, are the module's."""
    weight: Any = states.module[name]
    if weight.shape != master.shape or not is_contiguous(weight.shape, weight.strides) or not is_contiguous(master.shape, master.strides):
        return bool(weight.shape == master.shape)
    count = min(crosscheck.SAMPLES * 4, weight.numel)
    high = crosscheck.decode(read_extent(states.file.extent(master, 0, count)), master.dtype)
    low = crosscheck.decode(read_extent(states.file.extent(weight, 0, count)), weight.dtype)
    if high is None or low is None:
        return True
    return all(crosscheck.cast(h, weight.dtype) == w or h != h for h, w in zip(high, low, strict=True))


def _match(
    states: ModuleStates, names: list[str], entries: dict[str, TensorEntry], tensors: list[TensorRef]
) -> dict[str, TensorRef] | None:
    """Give each master the next parameter, in the module's order, of its shape and values; None where one finds none."""
    free = dict.fromkeys(names)
    matched: dict[str, TensorRef] = {}
    position = 0
    index = {name: i for i, name in enumerate(names)}
    for master in tensors:
        candidates = [name for name in free if _agrees(states, name, master)]
        if not candidates:
            return None
        name = next((c for c in candidates if index[c] >= position), candidates[0])
        matched[name] = master
        del free[name]
        position = index[name] + 1
    return matched


def _match_flat(
    states: ModuleStates, names: list[str], entries: dict[str, TensorEntry], flats: list[TensorRef]
) -> dict[str, TensorRef] | None:
    """The same for groups flattened into one tensor each: walk the module's order and cut the group as it goes."""
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
                if _agrees(states, name, view):
                    matched[name] = view
                    free.remove(name)
                    offset += entry.numel
                    break
            else:
                return None
    return matched


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
