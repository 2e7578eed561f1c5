"""Recognise whose names a checkpoint has, and give it Hugging Face's names by the table of its family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.patched import KeptBoxes, entry_of
from dsconv.checkpoint.map.patches import View
from dsconv.checkpoint.map.regions import box, prove_cover
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.transfer.reading import is_zero, same_bytes
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, UnsupportedError
from dsconv.names import megatron, torchtitan
from dsconv.names.marks import HF, MEGATRON, framework_of
from dsconv.names.operations import Config, Vocabulary, WrongShape
from dsconv.names.tables import Family, Found

FAMILIES: tuple[Family, ...] = torchtitan.FAMILIES + megatron.FAMILIES
MIN_PART_BYTES = 8  # of each tensor or block that one tensor is divided into; real ones have kilobytes
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Recognised:
    """The family whose names a checkpoint has, and the names that the family's table does not know."""

    family: Family
    unknown: tuple[str, ...]

    @property
    def hint(self) -> str:
        """Return what a merge that keeps the names says."""
        return (
            f"the tensors have the names of {self.family.framework} ({self.family.name}), which from_pretrained does"
            " not find. --names hf, with --config-from DIR for the model's config.json, gives them Hugging Face's"
        )

    def __str__(self) -> str:
        text = f"{self.family.framework}, {self.family.name}"
        return f"{text} ({len(self.unknown)} of the names are not)" if self.unknown else text


def recognise(names: Iterable[str]) -> Recognised | None:
    """Return whose names these are; None where they are Hugging Face's own, or those of no framework in the tables."""
    return min(_candidates(names), key=lambda one: len(one.unknown), default=None)


def _candidates(names: Iterable[str]) -> list[Recognised]:
    given = list(names)
    framework = framework_of(given)
    return [
        Recognised(family, tuple(name for name in given if not (family.find(name) or family.leaves_out(name))))
        for family in FAMILIES
        if family.framework == framework and family.marked(given)
    ]


def to_hf(checkpoint: Checkpoint, config: Config | None) -> Checkpoint:
    """Return a checkpoint under Hugging Face's names and in its layouts. No data is moved.

    Args:
        checkpoint: a checkpoint with the names of a framework in the tables.
        config: the config.json of the model.

    Raises:
        UnsupportedError: the names are of no known framework, or a tensor is not in the family's table.
        CheckpointNotFoundError: there is no ``config``.
        InconsistentCheckpointError: the configuration is of another family, or a tensor does not fit it.
    """
    recognised = _chosen(checkpoint, config)
    family = recognised.family
    if recognised.unknown:
        raise UnsupportedError(
            f"{checkpoint.path}: the names are those of {family.framework}'s {family.name}, but not that of"
            f" {safe_repr(recognised.unknown[0])}, so nothing says what Hugging Face calls it. Leave out --names to"
            " keep the names"
        )
    views: dict[str, View] = {}
    for entry in checkpoint.values():
        found = family.find(entry.name)
        if found is not None and config is not None:
            for name, view in _parts(entry, found, config):
                if name in views:
                    raise InconsistentCheckpointError(
                        f"{checkpoint.path}: {safe_repr(entry.name)} and another tensor would both be {name!r}"
                    )
                views[name] = view
    left_out = [entry for entry in checkpoint.values() if family.leaves_out(entry.name)]
    prove_all_used([entry for entry in checkpoint.values() if _is_used_whole(entry, family)], views.values())
    kept = KeptBoxes()
    entries = {name: entry_of(view, name, kept) for name, view in views.items()}
    if config is not None and config.values.get("tie_word_embeddings") is True:
        _drop_tied(checkpoint, entries, config)
    result = with_entries(checkpoint, entries, family, HF)
    result.warnings += _warnings(left_out, family)
    if family.framework == MEGATRON:
        result.warnings += megatron.check_arguments(checkpoint)
    return result


def _known() -> str:
    return ", ".join(dict.fromkeys(f"{family.framework}'s {family.name}" for family in FAMILIES))


def _chosen(checkpoint: Checkpoint, config: Config | None) -> Recognised:
    """Return the family of the names that is the configuration's."""
    candidates = _candidates(checkpoint)
    if not candidates:
        some = ", ".join(safe_repr(name) for name in list(checkpoint)[:3])
        raise UnsupportedError(
            f"{checkpoint.path}: the names, such as {some}, are of no framework and family that --names hf knows:"
            f" {_known()}"
        )
    best = min(candidates, key=lambda one: len(one.unknown))
    whose = f"{best.family.framework}'s {best.family.name}"
    if config is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: --names hf needs the model's config.json, which tells how the weights of {whose} are"
            " arranged. Name the folder of the Hugging Face model with --config-from"
        )
    model_type = config.values.get("model_type")
    fitting = [one for one in candidates if model_type in one.family.model_types]
    if not fitting:
        expected = sorted({kind for one in candidates for kind in one.family.model_types})
        raise InconsistentCheckpointError(
            f"{config.path}: model_type is {model_type!r:.80}; the names in {checkpoint.path} are those of {whose},"
            f" which is {' or '.join(expected)}. Name the right model's folder with --config-from"
        )
    chosen = min(fitting, key=lambda one: len(one.unknown))
    require_expected(chosen.family, config, whose)
    return chosen


def require_expected(family: Family, config: Config, whose: str) -> None:
    """Raise UnsupportedError where a configuration has a value for which the family's table is not right.

    Args:
        family: The family.
        config: The model's configuration.
        whose: Who needs the value, for the message.
    """
    for key, value in family.expects.items():
        if config.values.get(key, value) != value:
            raise UnsupportedError(f"{config.path}: {key} is {config.values[key]!r:.80}; {whose} needs {value!r}")


def _parts(entry: TensorEntry, found: Found, config: Config) -> Iterator[tuple[str, View]]:
    """Yield the tensors of Hugging Face that make up a framework's tensor, by name."""
    rule = found.rule
    if len(entry.shape) < rule.stacked:
        raise InconsistentCheckpointError(
            f"{safe_repr(entry.name)} has the shape {list(entry.shape)}; its first {rule.stacked} dimensions should"
            f" stack the tensors {rule.ours[0]}"
        )
    stacked = math.prod(entry.shape[: rule.stacked])
    require_room(entry.name, entry.nbytes, stacked)
    for index in product(*map(range, entry.shape[: rule.stacked])):
        view = View.of(entry)
        for number in index:
            view = view.narrow(0, number, 1).squeeze(0)
        try:
            parts = rule.operation.to_hf(view, config)
        except WrongShape as error:
            raise InconsistentCheckpointError(
                f"{safe_repr(entry.name)}: expected {error} from {config.path}, found the shape {list(entry.shape)}"
            ) from None
        require_room(entry.name, entry.nbytes, stacked * sum(len(part.patches) for part in parts))
        for name, part in zip(rule.ours, parts, strict=True):
            yield name.format(*found.numbers, *index), part


def require_room(name: str, nbytes: int, count: int) -> None:
    """Raise InconsistentCheckpointError for a tensor of hardly a byte for each part that it is divided into.

    A shape without elements may have any sizes, and a configuration may have any numbers. What is made of them would
    take time and memory out of proportion to the file.
    """
    if count > 1 and count * MIN_PART_BYTES > nbytes:
        raise InconsistentCheckpointError(
            f"{safe_repr(name)} has {nbytes:,} bytes and would be divided into {count:,} parts; its shape or the"
            " configuration is not a real model's"
        )


def _warnings(left_out: Sequence[TensorEntry], family: Family) -> tuple[str, ...]:
    """Return a warning about left-out tensors that are not zero."""
    lost = [entry.name for entry in left_out if not is_zero(entry)]
    if not lost:
        return ()
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    text = (
        f"left out {safe_repr(lost[0])}{more}: it is not zero, and {' and '.join(family.model_types)} of transformers"
        f" have no place for it, so the model may give other results. {family.framework}'s own converter leaves it out"
        " too"
    )
    return (text,)


def _is_used_whole(entry: TensorEntry, family: Family) -> bool:
    """Return whether no part of a tensor is left out, as the padding of a vocabulary is."""
    found = family.find(entry.name)
    return found is not None and not isinstance(found.rule.operation, Vocabulary)


def prove_all_used(entries: Iterable[TensorEntry], views: Iterable[View]) -> None:
    """Raise InconsistentCheckpointError unless every element of every tensor is in exactly one of the views."""
    boxes: dict[int, list[tuple[Sequence[int], Sequence[int]]]] = {}
    for view in views:
        for patch in view.patches:
            sizes = [1] * len(patch.source)
            for size, dim in zip(patch.sizes, patch.dims, strict=True):
                if dim is not None:
                    sizes[dim] = size
            boxes.setdefault(id(patch.entry), []).append((patch.source, sizes))
    for entry in entries:
        prove_cover([box(*one) for one in boxes.get(id(entry), [])], entry.shape, entry.name)


def _drop_tied(checkpoint: Checkpoint, entries: dict[str, TensorEntry], config: Config) -> None:
    """Leave out the output layer if the configuration ties it to the embedding and both hold the same bytes."""
    if HEAD not in entries or EMBEDDING not in entries:
        return
    embedding, head = entries[EMBEDDING], entries[HEAD]
    if not same_bytes(embedding, head):
        raise InconsistentCheckpointError(
            f"{checkpoint.path}: the output layer and the embedding differ, and {config.path} ties them"
            " (tie_word_embeddings): one of them would be lost. Correct the configuration"
        )
    del entries[HEAD]


def with_entries(checkpoint: Checkpoint, entries: Mapping[str, TensorEntry], family: Family, names: str) -> Checkpoint:
    """Return a checkpoint of these tensors, which notes that ``names`` were given to those of a family."""
    return checkpoint.with_entries(
        entries,
        {"names": {"from": family.framework, "family": family.name, "to": names}},
        no_training="its tensors have other names than those that were trained",
    )
