"""Stage-0 checkpoints: one ``mp_rank_00_model_states.pt`` whose ``module`` is the model.

With bf16 or fp16 the optimizer's state, inline, holds fp32 masters (DeepSpeed 0.19.8
``runtime/fp16/unfused_optimizer.py`` ``fp32_groups``, ``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``). They
carry no names: they are matched to the module's tensors by order and shape, and each match is checked by casting the
first elements of the master.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states, refuse_missing_experts
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import match_masters
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, MissingShardError
from dsconv.zero_utils.files import TagFolder


def read_rank(folder: TagFolder, warnings: list[str]) -> RankMap:
    """The map of a model-parallel rank from its files alone (``TagFolder.of_rank``); raises what ``read_stage0``
    does.
    """
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
            f"{folder.path}: ZeRO-3 model states without optimizer files (zero_pp_rank_*_optim_states.pt), which hold"
            " the weights"
        )
    states = read_module_states(next(iter(folder.model.values())))
    consistency.own_name(states.file)
    if states.param_shapes:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is of a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there"
            " are none. Copy them from the nodes that wrote them"
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


def replaced_by_masters(
    file: TorchFile, entries: Mapping[str, TensorEntry], masters: Mapping[str, TensorRef]
) -> dict[str, TensorEntry]:
    """``entries`` that are parameters, read from their masters in ``file``; one without a master was not trained."""
    result = {}
    for name, old in entries.items():
        master = masters.get(name)
        if master is not None:
            result[name] = TensorEntry(
                name, master.dtype, old.shape, partial(file.pieces, master), old.aliases, "parameter"
            )
            result[name].layout()
        elif old.role == "parameter":  # the optimizer did not own it
            result[name] = replace(old, role="frozen")
    return result
