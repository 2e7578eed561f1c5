"""The optimizer of a model with Hugging Face's names as torchtitan's own model of it has one.

torchtitan 0.3 ``models/common/attention.py`` ``FusedQKVLinear`` trains the query, key and value projections as one
parameter, ``wqkv`` (``fuse_qkv``, the default of every family that has them), and its state dict shows three. The
optimizer's states are those of the one (``components/optimizer/utils.py`` ``get_flat_optim_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.patched import entry_of, patches_of
from dsconv.checkpoint.map.patches import View
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.names.marks import TORCHTITAN
from dsconv.names.naming_back import from_hf
from dsconv.names.operations import Config, QueryGroups, WrongShape
from dsconv.text import quote

QUERY = re.compile(r"(?P<before>.*\.qkv_linear\.)wq\.(?P<kind>weight|bias)")


def with_titan_names(training: Training, checkpoint: Checkpoint, config: Config) -> Training:
    """Return ``training`` under the names and in the layouts of torchtitan's parameters. No data is moved.

    Args:
        training: The optimizer of a model with Hugging Face's names.
        checkpoint: That model.
        config: Its config.json.

    Raises:
        UnsupportedError: Parameters that torchtitan trains as one are in several groups, or differ in their step count.
        InconsistentCheckpointError: Some of these parameters have states, and others have none.
    """
    sources: dict[str, tuple[str, ...]] = {}
    states: dict[str, dict[str, TensorEntry]] = {}
    for state in sorted({state for of in training.states.values() for state in of}):
        kept = {name: replace(of[state], name=name) for name, of in training.states.items() if state in of}
        given = Checkpoint(checkpoint.path, checkpoint.format, kept)
        layouts = {id(patch.entry.layout): name for name, entry in kept.items() for patch in patches_of(entry)}
        named = from_hf(given, config, TORCHTITAN)
        for name, entry in _fused(named, config).items():
            of = tuple(dict.fromkeys(layouts[id(patch.entry.layout)] for patch in patches_of(entry)))
            if sources.setdefault(name, of) != of:
                raise InconsistentCheckpointError(
                    f"{checkpoint.path}: the optimizer's {quote(state)} is not there for all parts of {quote(name)}"
                )
            states.setdefault(name, {})[state] = replace(entry, name=f"{name}/{state}", aliases=())
    groups = {name: number for number, members in enumerate(training.members) for name in members}
    members: list[list[str]] = [[] for _ in training.members]
    steps: dict[str, Any] = {}
    for name, of in sources.items():
        members[_one(name, of, groups, checkpoint.path, "parameter groups")].append(name)
        if any(source in training.steps for source in of):
            steps[name] = _one(name, of, training.steps, checkpoint.path, "step counts")
    return replace(training, states=states, steps=steps, members=tuple(map(tuple, members)), stored={})


def _fused(named: Mapping[str, TensorEntry], config: Config) -> dict[str, TensorEntry]:
    """Return the entries with each query, key and value as the one tensor that torchtitan trains."""
    result = dict(named)
    for name in named:
        match = QUERY.fullmatch(name)
        if match is None:
            continue
        parts = [f"{match['before']}w{part}.{match['kind']}" for part in "qkv"]
        if not all(part in named for part in parts):
            raise InconsistentCheckpointError(
                f"{quote(name)} has optimizer states, and its key or value has none: torchtitan trains the three as one"
            )
        views = [View(named[part].shape, patches_of(named[part])) for part in parts]
        fused = f"{match['before']}wqkv.{match['kind']}"
        try:
            result[fused] = entry_of(QueryGroups().from_hf(views, config), fused)
        except WrongShape as error:
            raise InconsistentCheckpointError(f"{quote(name)}: expected {error} from {config.path}") from None
        for part in parts:
            del result[part]
    return result


def _one(name: str, sources: Iterable[str], of: Mapping[str, Any], path: Path, what: str) -> Any:
    """Return what all parts of a parameter have in common."""
    found = [of.get(source) for source in sources]
    if any(value != found[0] for value in found) or found[0] is None:
        raise UnsupportedError(
            f"{path}: torchtitan trains {quote(name)} as one parameter, and its parts differ in their {what}"
        )
    return found[0]
