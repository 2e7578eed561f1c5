"""A checkpoint with Hugging Face's names under those of a framework: the tables, read the other way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.patched import KeptBoxes, entry_of, patches_of
from dsconv.checkpoint.map.patches import View, whole
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, UnsupportedError
from dsconv.names.marks import FRAMEWORKS
from dsconv.names.naming import EMBEDDING, FAMILIES, HEAD, prove_all_used, require_expected, with_entries
from dsconv.names.operations import Config, WrongShape
from dsconv.names.tables import Family, Rule
from dsconv.text import count

Parts = dict[tuple[int, ...], dict[int, View]]  # by the numbers that are stacked, and the place in rule.ours


def from_hf(checkpoint: Checkpoint, config: Config | None, names: str) -> Checkpoint:
    """Return a checkpoint of Hugging Face's names under a framework's, and in its layouts. No data is moved.

    Args:
        checkpoint: a checkpoint with Hugging Face's names, of any format.
        config: the config.json of the model.
        names: whose names are wanted, a key of ``FRAMEWORKS``.

    Raises:
        CheckpointNotFoundError: there is no ``config``.
        UnsupportedError: the model is of no family in the tables, or a tensor is not in the family's table.
        InconsistentCheckpointError: a tensor is missing, or does not fit the configuration.
    """
    if config is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: --names {names} needs the model's config.json beside the weights"
        )
    family = _family(config, names)
    numbered = _has_several_kinds(checkpoint, family)
    groups: dict[tuple[Rule, tuple[int, ...]], Parts] = {}
    for entry in checkpoint.values():
        found = family.find_hf(entry.name, numbered)
        if found is None:
            raise UnsupportedError(
                f"{checkpoint.path}: {safe_repr(entry.name)} is no tensor of a {config.values['model_type']} that"
                f" {family.framework}'s {family.name} has a name for"
            )
        own = found.rule.theirs.count("{}")
        parts = groups.setdefault((found.rule, found.numbers[:own]), {})
        parts.setdefault(found.numbers[own:], {})[found.place] = View(entry.shape, patches_of(entry))
    entries: dict[str, TensorEntry] = {}
    views = []
    kept = KeptBoxes()
    for (rule, numbers), parts in groups.items():
        view = _joined(rule, numbers, parts, config)
        views.append(view)
        name = rule.theirs.format(*numbers)
        further = tuple(other.format(*numbers) for other in rule.also)
        entries[name] = replace(entry_of(view, name, kept), aliases=further)
    _prove_all_used(checkpoint, views)
    _tie(checkpoint, entries, family, config)
    return with_entries(checkpoint, entries, family, names)


def _prove_all_used(checkpoint: Checkpoint, views: Sequence[View]) -> None:
    """Raise InconsistentCheckpointError unless every element of the checkpoint is in the views.

    Of tensors that are made of parts of others, only the numbers of elements are compared.
    """
    entries = list(checkpoint.values())
    if all(patches_of(entry) == (whole(entry),) for entry in entries):
        prove_all_used(entries, views)
    elif (used := sum(math.prod(view.shape) for view in views)) != (held := sum(entry.numel for entry in entries)):
        raise InconsistentCheckpointError(f"{checkpoint.path}: of {held} elements {used} would be written")


def _family(config: Config, names: str) -> Family:
    model_type = config.values.get("model_type")
    families = [family for family in FAMILIES if family.framework == FRAMEWORKS[names]]
    family = next((one for one in families if model_type in one.model_types), None)
    if family is None:
        known = ", ".join(dict.fromkeys(kind for one in families for kind in one.model_types))
        raise UnsupportedError(f"{config.path}: model_type is {model_type!r:.80}; --names {names} knows {known}")
    require_expected(family, config, names)
    return family


def _has_several_kinds(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether some layers have tensors that others lack, and so cannot be stacked."""
    layers: dict[int, set[tuple[str, int]]] = {}
    for name in checkpoint:
        found = family.find_hf(name)
        if found is not None and found.rule.stacked and family.numbered:
            layers.setdefault(found.numbers[0], set()).add((found.rule.theirs, found.place))
    return len({frozenset(kinds) for kinds in layers.values()}) > 1


def _joined(rule: Rule, numbers: tuple[int, ...], parts: Mapping[tuple[int, ...], Mapping[int, View]],
            config: Config) -> View:  # fmt: skip
    """Return the framework's tensor of all its parts. Raises InconsistentCheckpointError where one is missing."""
    sizes = tuple(max(column) + 1 for column in zip(*parts, strict=True))
    made: list[View] = []
    if math.prod(sizes) > len(parts) * 2 + 1000:
        raise InconsistentCheckpointError(f"{rule.ours[0]}: {count(len(parts), 'tensor')}, numbered up to {sizes}")
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
