"""A checkpoint with Hugging Face's names under those of a framework: the tables, read the other way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.patched import entry_of
from dsconv.checkpoint.map.patches import View
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, UnsupportedError
from dsconv.names import torchtitan
from dsconv.names.naming import EMBEDDING, HEAD, prove_all_used, require_expected, with_entries
from dsconv.names.operations import Config, WrongShape
from dsconv.names.tables import Family, Rule

TORCHTITAN = "torchtitan"  # a value of --names
Parts = dict[tuple[int, ...], dict[int, View]]  # by the numbers that are stacked, and the place in rule.ours


def from_hf(checkpoint: Checkpoint, config: Config | None) -> Checkpoint:
    """Return a checkpoint of Hugging Face's names under torchtitan's, and in its layouts. No data is moved.

    Args:
        checkpoint: a checkpoint with Hugging Face's names, of any format.
        config: the config.json of the model.

    Raises:
        CheckpointNotFoundError: there is no ``config``.
        UnsupportedError: the model is of no family in the tables, or a tensor is not in the family's table.
        InconsistentCheckpointError: a tensor is missing, or does not fit the configuration.
    """
    if config is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: --names {TORCHTITAN} needs the model's config.json beside the weights"
        )
    family = _family(config)
    groups: dict[tuple[Rule, tuple[int, ...]], Parts] = {}
    for entry in checkpoint.values():
        found = family.find_hf(entry.name)
        if found is None:
            raise UnsupportedError(
                f"{checkpoint.path}: {safe_repr(entry.name)} is no tensor of a {config.values['model_type']} that"
                f" {family.framework}'s {family.name} has a name for"
            )
        own = found.rule.theirs.count("{}")
        parts = groups.setdefault((found.rule, found.numbers[:own]), {})
        parts.setdefault(found.numbers[own:], {})[found.place] = View.of(entry)
    views = {
        rule.theirs.format(*numbers): _joined(rule, numbers, parts, config) for (rule, numbers), parts in groups.items()
    }
    prove_all_used(checkpoint.values(), views.values())
    entries = {name: entry_of(view, name) for name, view in views.items()}
    _tie(checkpoint, entries, family, config)
    return with_entries(checkpoint, entries, family, TORCHTITAN)


def _family(config: Config) -> Family:
    model_type = config.values.get("model_type")
    family = next((one for one in torchtitan.FAMILIES if model_type in one.model_types), None)
    if family is None:
        known = ", ".join(kind for one in torchtitan.FAMILIES for kind in one.model_types)
        raise UnsupportedError(f"{config.path}: model_type is {model_type!r:.80}; --names {TORCHTITAN} knows {known}")
    require_expected(family, config, TORCHTITAN)
    return family


def _joined(rule: Rule, numbers: tuple[int, ...], parts: Mapping[tuple[int, ...], Mapping[int, View]],
            config: Config) -> View:  # fmt: skip
    """Return the framework's tensor of all its parts. Raises InconsistentCheckpointError where one is missing."""
    sizes = tuple(max(column) + 1 for column in zip(*parts, strict=True))
    made: list[View] = []
    if math.prod(sizes) > len(parts) * 2 + 1000:
        raise InconsistentCheckpointError(f"{rule.ours[0]}: {len(parts)} tensors, numbered up to {sizes}")
    for index in product(*map(range, sizes)):
        held = parts.get(index, {})
        for place, name in enumerate(rule.ours):
            if place not in held:
                raise InconsistentCheckpointError(
                    f"{name.format(*numbers, *index)!r} is missing, of which {rule.theirs.format(*numbers)!r} is made"
                )
        views = [held[place] for place in range(len(rule.ours))]
        try:
            made.append(rule.operation.from_hf(views, config))
        except WrongShape as error:
            name = rule.ours[0].format(*numbers, *index)
            raise InconsistentCheckpointError(
                f"{name!r}: expected {error} from {config.path}, found the shape {list(views[0].shape)}"
            ) from None
    for size in reversed(sizes):
        try:
            made = [View.stack(made[at : at + size]) for at in range(0, len(made), size)]
        except ValueError as error:
            raise InconsistentCheckpointError(f"{rule.theirs.format(*numbers)!r}: {error}") from None
    return made[0]


def _tie(checkpoint: Checkpoint, entries: dict[str, TensorEntry], family: Family, config: Config) -> None:
    """Give the embedding the output layer's name too where the model ties them, as torchtitan's adapters do."""
    embedding, head = (next(r.theirs for r in family.rules if r.ours == (name,)) for name in (EMBEDDING, HEAD))
    is_tied = config.values.get("tie_word_embeddings") is True or HEAD in checkpoint.ties
    if is_tied and head not in entries and embedding in entries:
        entries[embedding] = replace(entries[embedding], aliases=(head,))
