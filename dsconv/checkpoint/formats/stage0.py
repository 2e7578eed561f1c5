"""Stage-0 checkpoints: one ``mp_rank_00_model_states.pt`` whose ``module`` is the model.

With bf16 or fp16 the optimizer's state, inline, holds fp32 masters (DeepSpeed 0.19.8 ``runtime/fp16/unfused_optimizer.py``
``fp32_groups``, ``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``). They carry no names: they are matched to the
module's tensors by order and shape, and each match is checked by casting the first elements of the master.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dsconv.checkpoint.formats import crosscheck
from dsconv.checkpoint.formats.module_states import ModuleStates, read_module_states, refuse_missing_experts
from dsconv.checkpoint.formats.rank_map import RankMap, of_one_rank
from dsconv.checkpoint.standins import TensorRef
from dsconv.checkpoint.tensormap import Checkpoint, TensorEntry
from dsconv.checkpoint.torch_file import TorchFile, is_contiguous, read_extent
from dsconv.errors import MalformedError, MissingShardError
from dsconv.zero_utils.files import TagFolder


def read_stage0(folder: TagFolder) -> Checkpoint:
    """The tensor map of a checkpoint of one model-parallel rank without ZeRO optimizer files.

    Raises MissingShardError where the model states say that there should be some.
    """
    warnings = list(folder.warnings)
    return of_one_rank(folder, read_rank(folder, warnings), warnings)


def read_rank(folder: TagFolder, warnings: list[str]) -> RankMap:
    """The map of a model-parallel rank from its files alone (``TagFolder.of_rank``); raises what ``read_stage0`` does."""
    states = read_states(folder)
    ties = states.ties()
    entries = states.module_entries(exclude=set(), ties=ties)
    if not entries:
        raise MalformedError(f"{states.path}: the module holds no tensors")
    entries = {name: as_parameter(entry) for name, entry in entries.items()}
    weights = {name: (states.file, states.module[name]) for name in entries}
    masters = match_masters(states, weights, entries, warnings)
    if masters:
        entries |= replaced_by_masters(states.file, entries, masters)
    return RankMap(states, entries, [], "DeepSpeed stage 0", 0, world_of(states), masters)


def read_states(folder: TagFolder) -> ModuleStates:
    """The model states of a rank that should have no optimizer files; raises MissingShardError where it should."""
    if not folder.model:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 model states without optimizer files (zero_pp_rank_*_optim_states.pt), which hold the weights"
        )
    states = read_module_states(next(iter(folder.model.values())))
    crosscheck.own_name(states.file)
    if states.param_shapes:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is of a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there are none. "
            "Copy them from the nodes that wrote them"
        )
    refuse_missing_experts(states)
    return states


def as_parameter(entry: TensorEntry) -> TensorEntry:
    """Stage 0 does not say what was frozen."""
    if entry.role == "buffer":
        return entry
    return TensorEntry(entry.name, entry.dtype, entry.shape, entry.layout, entry.aliases, "parameter")


def world_of(states: ModuleStates) -> int:
    world = states.raw.get("dp_world_size")
    return world if type(world) is int and world > 0 else 1


Weights = Mapping[str, tuple[TorchFile, TensorRef]]


def match_masters(states: ModuleStates, weights: Weights, entries: Mapping[str, TensorEntry], warnings: list[str]) -> dict[str, TensorRef]:
    """The fp32 masters in the optimizer of ``states`` by name, of ``entries`` whose weights are ``weights``, in their order.

    Empty where there are none or they cannot be told apart.
    """
    optimizer = states.optimizer
    if not isinstance(optimizer, dict):
        return {}
    groups = optimizer.get("fp32_groups")
    flat = optimizer.get("fp32_groups_flat")
    names = [name for name, entry in entries.items() if entry.role == "parameter"]
    if isinstance(groups, list) and groups:
        tensors = [t for group in groups if isinstance(group, list) for t in group if isinstance(t, TensorRef)]
        matched = _match(states.file, weights, names, tensors)
    elif isinstance(flat, list) and all(isinstance(t, TensorRef) for t in flat):
        matched = _match_flat(states.file, weights, names, flat)
    else:
        return {}
    if matched is None:
        warnings.append(
            "the fp32 masters in the optimizer's state could not be matched to the parameters: the module's own weights were taken"
        )
        return {}
    return matched


def replaced_by_masters(file: TorchFile, entries: Mapping[str, TensorEntry], masters: Mapping[str, TensorRef]) -> dict[str, TensorEntry]:
    """``entries`` that are parameters, read from their masters in ``file``; one without a master was not trained."""
    result = {}
    for name, old in entries.items():
        master = masters.get(name)
        if master is not None:
            result[name] = TensorEntry(name, master.dtype, old.shape, partial(file.pieces, master), old.aliases, "parameter")
            result[name].layout()
        elif old.role == "parameter":  # the optimizer did not own it
            result[name] = replace(old, role="frozen")
    return result


def agrees(file: TorchFile, weights: Weights, name: str, master: TensorRef) -> bool:
    """Whether the first elements of a master in ``file``, cast, are the weight's."""
    holder, weight = weights[name]
    if weight.shape != master.shape or not is_contiguous(weight.shape, weight.strides) or not is_contiguous(master.shape, master.strides):
        return weight.shape == master.shape
    count = min(crosscheck.SAMPLES * 4, weight.numel)
    high = crosscheck.decode(read_extent(file.extent(master, 0, count)), master.dtype)
    low = crosscheck.decode(read_extent(holder.extent(weight, 0, count)), weight.dtype)
    if high is None or low is None:
        return True
    return all(crosscheck.cast(h, weight.dtype) == w or h != h for h, w in zip(high, low, strict=True))


def _match(file: TorchFile, weights: Weights, names: list[str], tensors: list[TensorRef]) -> dict[str, TensorRef] | None:
    """Give each master the next parameter, in the order of ``names``, of its shape and values; None where one finds none."""
    free = dict.fromkeys(names)
    matched: dict[str, TensorRef] = {}
    position = 0
    index = {name: i for i, name in enumerate(names)}
    for master in tensors:
        candidates = [name for name in free if agrees(file, weights, name, master)]
        if not candidates:
            return None
        name = next((c for c in candidates if index[c] >= position), candidates[0])
        matched[name] = master
        del free[name]
        position = index[name] + 1
    return matched


def _match_flat(file: TorchFile, weights: Weights, names: list[str], flats: list[TensorRef]) -> dict[str, TensorRef] | None:
    """The same for groups flattened into one tensor each: walk the names and cut the group as it goes."""
    matched: dict[str, TensorRef] = {}
    free = list(names)
    for flat in flats:
        offset = 0
        while offset < flat.numel:
            for name in free:
                shape, numel = weights[name][1].shape, weights[name][1].numel
                if not numel or offset + numel > flat.numel:
                    continue
                view = TensorRef(flat.storage, flat.dtype, flat.offset + offset, shape, row_major(shape))
                if agrees(file, weights, name, view):
                    matched[name] = view
                    free.remove(name)
                    offset += numel
                    break
            else:
                return None
    return matched


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
