"""Stage-0 checkpoints: one ``mp_rank_00_model_states.pt`` whose ``module`` is the model.

With bf16 or fp16 the optimizer's state, which lies in the same file, holds fp32 masters without names; see
``unnamed_masters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import (
    ModuleStates,
    read_module_states,
    refuse_missing_experts,
    warn_of_absent,
    warn_of_unlisted,
)
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import MasterSlot, match_masters
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, MissingShardError, UnsupportedError
from dsconv.zero_utils.tag_folder import TagFolder

KIND = "DeepSpeed stage 0"


def read_rank(folder: TagFolder, warnings: list[str]) -> RankMap:
    """Return the map of a model-parallel rank without optimizer files (``TagFolder.of_rank``).

    Raises:
        MissingShardError: The model states say that there should be optimizer files.
        MalformedError: The model states hold no tensors.
        UnsupportedError: Which master belongs to which weight cannot be determined.
    """
    states = read_states(folder)
    entries = states.module_entries(exclude=set(), ties=states.ties())
    if not entries:
        raise MalformedError(f"{states.path}: the module holds no tensors")
    if folder.own_weights:
        trained = {name for group in states.param_shapes for name in group}
        entries = {
            name: as_parameter(entry) if name in trained or not trained else entry for name, entry in entries.items()
        }
        warn_of_unlisted(states, warnings)
        warn_of_absent(states, entries, warnings)
        return own_weights_map(states, entries)
    entries = {name: as_parameter(entry) for name, entry in entries.items()}
    masters = match_masters(states.file, states.optimizer, module_order(states, entries), states.stored)
    if masters:
        entries |= replaced_by_masters(states.file, entries, masters)
    return RankMap(states, entries, [], KIND, 0, states.data_parallel, masters)


def read_states(folder: TagFolder) -> ModuleStates:
    """Return the model states of a rank that should have no optimizer files.

    Raises:
        MissingShardError: It should have some, and the model's own weights were not asked for.
        UnsupportedError: The model's own weights were asked for, and are sharded (ZeRO-3).
        MalformedError: The weights have no elements.
    """
    if not folder.model and folder.own_weights:
        raise UnsupportedError(
            f"{folder.path}: ZeRO-3 keeps no whole 16-bit weights in the model states, which hold empty tensors in"
            " their place. Merge the fp32 masters (--weights masters), or take the file that save_16bit_model wrote"
        )
    if not folder.model:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 model states without optimizer files (zero_pp_rank_*_optim_states.pt), which hold"
            " the weights"
        )
    states = read_module_states(next(iter(folder.model.values())))
    consistency.own_name(states.file)
    if states.param_shapes and not folder.own_weights:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is from a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there"
            f" are none. Copy them from the nodes that wrote them, or take the model's own 16-bit weights, which are"
            " here, with dsconv merge --weights 16bit"
        )
    refuse_missing_experts(states)
    _refuse_hollow(states)
    return states


def _refuse_hollow(states: ModuleStates) -> None:
    """Raise MalformedError if the weights are the empty tensors that ZeRO-3 puts in the place of its shards."""
    tensors = [value for value in states.module.values() if isinstance(value, TensorRef)]
    shapes = {shape for group in states.param_shapes for shape in group.values()} - {(0,)}
    if tensors and all(value.shape == (0,) for value in tensors) and (shapes or not states.param_shapes):
        raise MalformedError(
            f"{states.path}: all weights ({len(tensors):,}) are empty (shape [0]): the file was saved under ZeRO-3"
            " without gathering them, and holds none. Merge the checkpoint of that run that has *_optim_states.pt files"
        )


def own_weights_map(states: ModuleStates, entries: dict[str, TensorEntry]) -> RankMap:
    """Return the map of a rank whose own weights were asked for, in the place of masters."""
    stage = states.stage
    kind = f"{f'ZeRO-{stage}' if stage else KIND}, 16-bit weights"
    return RankMap(states, entries, [], kind, stage, states.data_parallel, own_weights=True)


def module_order(states: ModuleStates, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the parameters among ``entries`` as ``named_parameters`` lists them: a tied one at its first name."""
    order = {name: i for i, name in enumerate(states.module)}
    parameters = [entry for entry in entries.values() if entry.role != "buffer"]
    parameters.sort(key=lambda entry: min(order[name] for name in (entry.name, *entry.aliases)))
    return {entry.name: entry for entry in parameters}


def as_parameter(entry: TensorEntry) -> TensorEntry:
    """Return ``entry`` as a parameter unless it is a buffer: stage 0 does not say what was frozen."""
    return entry if entry.role == "buffer" else replace(entry, role="parameter")


def replaced_by_masters(
    file: TorchFile, entries: Mapping[str, TensorEntry], masters: Mapping[str, MasterSlot]
) -> dict[str, TensorEntry]:
    """Return the parameters of ``entries`` as their masters in ``file``; those without one were not trained."""
    result = {}
    for name, old in entries.items():
        master = masters[name].master if name in masters else None
        if master is not None:
            layout = partial(file.pieces, master)
            layout()  # bounds are proved now, not when the bytes are wanted
            result[name] = TensorEntry(name, master.dtype, old.shape, layout, old.aliases, "parameter")
        elif old.role == "parameter":
            result[name] = replace(old, role="frozen")
    return result
