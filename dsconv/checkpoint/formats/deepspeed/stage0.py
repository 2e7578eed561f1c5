"""Stage-0 checkpoints: one ``mp_rank_00_model_states.pt`` whose ``module`` is the model.

With bf16 or fp16 the optimizer's state, which lies in the same file, holds fp32 masters without names; see
``unnamed_masters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states, refuse_missing_experts
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import Slot, match_masters
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, MissingShardError
from dsconv.zero_utils.files import TagFolder

KIND = "DeepSpeed stage 0"


def read_rank(folder: TagFolder, warnings: list[str]) -> RankMap:
    """Return the map of a model-parallel rank without optimizer files (``TagFolder.of_rank``).

    Raises:
        MissingShardError: The model states say that there should be optimizer files.
        MalformedError: The model states hold no tensors.
        UnsupportedError: Which master belongs to which weight cannot be told.
    """
    states = read_states(folder)
    entries = states.module_entries(exclude=set(), ties=states.ties())
    if not entries:
        raise MalformedError(f"{states.path}: the module holds no tensors")
    entries = {name: as_parameter(entry) for name, entry in entries.items()}
    masters = match_masters(states.file, states.optimizer, module_order(states, entries))
    if masters:
        entries |= replaced_by_masters(states.file, entries, masters)
    return RankMap(states, entries, [], KIND, 0, states.data_parallel, masters)


def read_states(folder: TagFolder) -> ModuleStates:
    """Return the model states of a rank that should have no optimizer files; raise MissingShardError if it should."""
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
    file: TorchFile, entries: Mapping[str, TensorEntry], masters: Mapping[str, Slot]
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
