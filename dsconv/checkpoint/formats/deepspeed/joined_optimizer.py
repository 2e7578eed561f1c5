"""The optimizer states of a model that was cut: each model-parallel rank's, joined as the masters are.

A state of a parameter lies as its master does, so the shards of tensor-parallel ranks are joined by the master's own
rule, and a parameter of several pipeline stages is taken from the first that has it (DeepSpeed
``checkpoint/ds_to_universal.py`` ``extract_zero_shards``). Hyperparameters and settings are those of the first rank
(``_save_optimizer_state``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsconv.checkpoint.formats.copies import same
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.ranks import read_training
from dsconv.checkpoint.formats.deepspeed.shards import Rules, join_shards, path_of
from dsconv.checkpoint.formats.deepspeed.tp_plan_rules import PlanRules
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import InconsistentCheckpointError
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import TagFolder

States = dict[str, dict[str, TensorEntry]]


@dataclass
class _Slice:
    """What one tensor-parallel rank holds in all of its pipeline stages, by parameter."""

    states: States = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    module: dict[str, TensorEntry] = field(default_factory=dict)


def join_training(
    folder: TagFolder,
    ranks: Sequence[RankMap],
    shards: Mapping[int, Mapping[str, TensorEntry]],
    full: Mapping[str, TensorEntry],
    rules: Rules | None,
) -> Training:
    """Return the optimizer of the whole model.

    Args:
        folder: The tag's folder.
        ranks: The maps of the model-parallel ranks, stage-major, as their files are numbered.
        shards: The tensors of each tensor-parallel rank.
        full: The tensors that these make.
        rules: How they make them; None for one tensor-parallel rank.

    Raises:
        InconsistentCheckpointError: Ranks lack a state, hold copies of one that differ, or are of different steps.
        MalformedError: An optimizer's state is not what it should be.
        UnsupportedError: An optimizer keeps states that are not one value per weight.
    """
    of_ranks = [read_training(folder.of_rank(mp), r) for mp, r in enumerate(ranks)]
    degree = len(shards)
    slices = [_over_stages(of_ranks[tp::degree], rules) for tp in range(degree)]
    with Sources() as sources:
        states = {
            name: (
                slices[0].states[name]
                if rules is None or degree == 1
                else _join_states(name, slices, shards, rules, sources)
            )
            for name, entry in full.items()
            if entry.role == "parameter" and any(name in mine.states for mine in slices)
        }
    first = of_ranks[0]
    warnings = list(dict.fromkeys(warning for training in of_ranks for warning in training.warnings))
    if any(_hyperparameters(training) != _hyperparameters(first) for training in of_ranks):
        warnings.append(
            "the optimizer groups of the model-parallel ranks differ in hyperparameters: those of the first rank are"
            " used, as in DeepSpeed's own tool"
        )
    return replace(
        first,
        states=states,
        steps={name: step for name in states if (step := _step(name, slices, folder)) is not None},
        module={} if first.stage == 3 else _module(slices, shards, full, rules),
        model_files=tuple(path for training in of_ranks for path in training.model_files),
        members=_members(of_ranks, states),
        left_out=tuple(sorted({state for training in of_ranks for state in training.left_out})),
        cut=(
            UniversalInfo(_as_info(rules, states, shards), rules.path).cut
            if isinstance(rules, PlanRules)
            else first.cut
        ),
        stored={name: stored for training in of_ranks for name, stored in training.stored.items()},
        warnings=tuple(warnings),
    )


def _over_stages(stages: Sequence[Training], rules: Rules | None) -> _Slice:
    """Return one tensor-parallel rank's stages put together. A tied parameter is one: its copies must be equal."""
    found = _Slice()

    def first_is_right(name: str) -> bool:
        return isinstance(rules, UniversalInfo) and rules.is_pipeline_replicated(name)

    with Sources() as sources:
        for training in stages:
            for name, states in training.states.items():
                if name not in found.states:
                    found.states[name] = dict(states)
                    continue
                if first_is_right(name):
                    continue
                for state, entry in found.states[name].items():
                    other = states.get(state)
                    if other is None or not same(entry, 0, other, 0, entry.numel, sources):
                        raise InconsistentCheckpointError(
                            f"the optimizer's {quote(state)} of tied parameter {quote(name)} differs between pipeline"
                            f" stages{path_of(entry)}: the files are from different saves, or the stages trained it"
                            " apart"
                        )
            for name, step in training.steps.items():
                if found.steps.setdefault(name, step) != step and not first_is_right(name):
                    raise InconsistentCheckpointError(
                        f"{training.model_files[0].parent}: the optimizer's step of tied parameter {quote(name)}"
                        " differs between pipeline stages: files from two saves lie in one folder"
                    )
            for name, entry in training.module.items():
                found.module.setdefault(name, entry)
    return found


def _join_states(
    name: str, slices: Sequence[_Slice], shards: Mapping[int, Mapping[str, TensorEntry]], rules: Rules, sources: Sources
) -> dict[str, TensorEntry]:
    """Return {state: its full tensor} of a parameter. A rank whose shard has no elements keeps no states of it."""
    result = {}
    for state in dict.fromkeys(key for mine in slices for key in mine.states.get(name, {})):
        mine: dict[int, TensorEntry] = {}
        for tp, of_rank in enumerate(slices):
            master = shards[tp][name]
            entry = of_rank.states.get(name, {}).get(state, master)
            if entry is master and master.numel:
                raise InconsistentCheckpointError(
                    f"the optimizer has no {quote(state)} of {quote(name)} on model-parallel rank"
                    f" {tp}{path_of(master)}, and has it on another: the files are not from one save"
                )
            mine[tp] = entry
        joined = join_shards(name, mine, rules, "parameter", sources, f"the optimizer's {quote(state)} of ")
        result[state] = replace(joined, name=f"{name}/{state}")
    return result


def _step(name: str, slices: Sequence[_Slice], folder: TagFolder) -> Any:
    """Return the step counter of a parameter, on which the ranks that keep one agree, or None if none does."""
    steps = [mine.steps[name] for mine in slices if name in mine.steps]
    if any(step != steps[0] for step in steps):
        raise InconsistentCheckpointError(
            f"{folder.path}: the optimizer's step of {quote(name)} differs between tensor-parallel ranks: files from"
            " two saves lie in one folder"
        )
    return steps[0] if steps else None


def _module(
    slices: Sequence[_Slice],
    shards: Mapping[int, Mapping[str, TensorEntry]],
    full: Mapping[str, TensorEntry],
    rules: Rules | None,
) -> dict[str, TensorEntry]:
    """Return what else the model holds: frozen weights and buffers as they are joined in ``full``, and tied names as
    their owners.

    Those of a pipeline lie in layer files, which no universal checkpoint has; ``zero/`` is the only place for them.
    """
    names = dict.fromkeys(name for mine in slices for name in mine.module)
    owners = {alias: entry.name for entry in full.values() for alias in entry.aliases}
    found = {name: entry for name, entry in full.items() if entry.role != "parameter"}
    if rules is None:
        return found
    with Sources() as sources:
        for alias in names:
            owner = owners.get(alias)
            if owner is None or not all(alias in mine.module for mine in slices):
                continue
            mine = {tp: of_rank.module[alias] for tp, of_rank in enumerate(slices)}
            if all(entry.shape == shards[tp][owner].shape for tp, entry in mine.items()):
                joined = join_shards(owner, mine, rules, full[owner].role, sources)
                found[alias] = replace(joined, name=alias, role="frozen")
    return found


def _as_info(rules: PlanRules, states: States, shards: Mapping[int, Mapping[str, TensorEntry]]) -> dict[str, Any]:
    """Return what the model's plan says, as ``universal_checkpoint_info`` of a trainer that saved none."""
    info: dict[str, list[str]] = {}
    for name in states:
        shapes = [shards[tp][name].shape for tp in range(len(shards))]
        join = rules.join(name, shapes)
        if join.copies:
            key = "tp_replicated_parameter_patterns"
        elif len(join.blocks) > len(shapes):
            key = "parameter_with_2_sub_params_cat_dim_0"
        elif all(shape[:1] == join.shape[:1] for shape in shapes):
            key = "parameter_with_row_parallelism_patterns"
        else:
            continue
        info.setdefault(key, []).append(f"^{re.escape(name)}$")
    return info


def _hyperparameters(training: Training) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in training.param_groups]


def _members(of_ranks: Sequence[Training], states: States) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each group over all ranks; nothing where the ranks' groups are not the same."""
    first = of_ranks[0]
    if any(_hyperparameters(training) != _hyperparameters(first) for training in of_ranks):
        return ()
    if any(len(training.members) != len(first.members) for training in of_ranks):
        return ()
    return tuple(
        tuple(dict.fromkeys(name for training in of_ranks for name in training.members[number] if name in states))
        for number in range(len(first.members))
    )
