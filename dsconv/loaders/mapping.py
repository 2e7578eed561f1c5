"""Match the tensors of a checkpoint with those of a model.

For a transformers model, names and conversions are transformers' own (5.24 ``conversion_mapping.py``
``get_model_conversion_mapping``, ``core_model_loading.py`` ``rename_source_key``). They run on tensors that are not yet
read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.patched import patches_of
from dsconv.checkpoint.map.patches import Patch
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import UnsupportedError
from dsconv.loaders.symbolic import NotBoxes, Unread


@dataclass
class Computed:
    """Tensors that a conversion computes from whole tensors.

    Each rank reads ``entries`` in full, one group at a time. ``why`` names the operation that needs them whole.
    """

    entries: list[TensorEntry]
    compute: Any
    why: str

    def values(self) -> dict[str, torch.Tensor]:
        """Read the entries and return the computed tensors by their names in the model."""
        tensors = load_tensors(self.entries)
        return {name: value.contiguous() for name, value in self.compute(tensors).items()}


@dataclass
class Matched:
    """How a checkpoint's tensors match a model's.

    Attributes:
        sources: What makes each tensor of the model: patches, or the group that computes it.
        missing: Names of the model that the checkpoint lacks.
        unexpected: Names of the checkpoint that the model lacks.
        mismatched: (shape in the checkpoint, shape in the model) of names whose shapes differ.
    """

    sources: dict[str, tuple[Patch, ...] | Computed] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


def _unread(entry: TensorEntry) -> Unread:
    """Return an entry as an unread tensor: made of boxes of what lies in the files, where it is a view of that.

    A transposed view is left whole: a rank would read its boxes element by element.
    """
    patches = patches_of(entry)
    dims = [[dim for dim in patch.dims if dim is not None] for patch in patches]
    return Unread(entry.shape, patches) if all(each == sorted(each) for each in dims) else Unread.of(entry)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the full tensor, which ZeRO-3 or DTensor may have sharded."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def match(model: torch.nn.Module, checkpoint: Checkpoint) -> Matched:
    """Find what makes each tensor of the model's state dict, without reading data.

    Raises:
        UnsupportedError: transformers' conversion of a group of tensors fails.
    """
    wanted = {
        name: full_shape(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    found: dict[str, Any] = {}
    unexpected: set[str] = set()
    entries: dict[str, TensorEntry] = {**{name: checkpoint[name] for name in checkpoint.ties}, **checkpoint}
    if hasattr(model, "base_model_prefix"):
        _match_transformers(model, entries, wanted, found, unexpected)
    else:
        for name, entry in entries.items():
            found.setdefault(name, _unread(entry)) if name in wanted else unexpected.add(name)
    result = Matched(missing=set(wanted) - set(found), unexpected=unexpected)
    for name, source in found.items():
        shape = tuple(source.shape) if isinstance(source, Unread) else wanted[name]
        if shape != wanted[name]:
            result.mismatched[name] = (shape, wanted[name])
        else:
            result.sources[name] = source.patches if isinstance(source, Unread) else source
    return result


def leave_out_ties(model: torch.nn.Module, matched: Matched) -> None:
    """Leave tied names to ``tie_weights``, so that the bytes of a tied tensor are read once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, owner in tied.items():
        source = matched.sources.get(name)
        if isinstance(source, tuple) and owner not in tied and source == matched.sources.get(owner):
            del matched.sources[name]
            matched.missing.add(name)


def _match_transformers(
    model: Any,
    entries: Mapping[str, TensorEntry],
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, Any],
    unexpected: set[str],
) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, tuple[Any, dict[str, list[TensorEntry]]]] = {}
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unexpected.add(name)
        elif pattern is None:
            found.setdefault(target, _unread(entries[name]))
        else:
            _, collected = groups.setdefault(target, (by_pattern[pattern], {}))
            collected.setdefault(pattern, []).append(entries[name])
    for target, (converter, collected) in groups.items():
        found.update(_convert(model, target, converter, collected, wanted))
    model._weight_conversions = [item for item in mapping if item.was_used()]


class Shapes:
    """Stand in for the model when a conversion asks for a parameter's full shape."""

    def __init__(self, model: Any, wanted: dict[str, tuple[int, ...]]) -> None:
        self._model = model
        self._wanted = wanted

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._wanted[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _convert(
    model: Any, target: str, converter: Any, collected: dict[str, list[TensorEntry]], wanted: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return {name in the model: Unread or Computed} for one group of tensors that a conversion takes together."""

    def run(tensors: dict[str, list[Any]]) -> dict[str, Any]:
        for operation in converter.operations:
            tensors = copy.copy(operation).convert(
                tensors, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns,
                full_layer_name=target, model=Shapes(model, wanted), config=model.config, missing_keys=None,
            )  # fmt: skip
        # The results are keyed by target patterns. What surrounds the pattern in the target's name is the same for all.
        name = target.replace("*.", "0.")
        known = next((pattern for pattern in tensors if pattern in name), None)
        before, _, after = name.partition(known) if known is not None else ("", "", "")
        return {
            before + pattern + after: value[0] if isinstance(value, list) else value
            for pattern, value in tensors.items()
        }

    try:
        made = run({pattern: [_unread(entry) for entry in entries] for pattern, entries in collected.items()})
        return {name: value for name, value in made.items() if name in wanted}
    except NotBoxes as error:
        why = str(error)
    except (ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedError(
            f"transformers cannot make {target!r} from {sorted(collected)} with {converter.operations}: {error}"
        ) from None
    flat = [entry for entries in collected.values() for entry in entries]

    def compute(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return run({pattern: [tensors[entry.name] for entry in entries] for pattern, entries in collected.items()})

    group = Computed(flat, compute, why)
    with torch.device("meta"):
        made = compute({entry.name: torch.empty(entry.shape) for entry in flat})
    return {name: group for name in made if name in wanted}
