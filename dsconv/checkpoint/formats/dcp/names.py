"""Decide which items of a DCP directory are the model, and what they are called there.

A directory of torch.distributed.checkpoint holds whatever dictionary the trainer gave it. The path of each item in that
dictionary is known (planner_data), so nothing is guessed from dots: ``model.model.norm.weight`` may be
``model.norm.weight`` of ``model``, or the name itself, and its path says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsconv.checkpoint.formats.dcp.metadata import Metadata
from dsconv.checkpoint.formats.huggingface.transformers_source import children_of
from dsconv.checkpoint.formats.items.models import Items, choose_model
from dsconv.checkpoint.formats.items.state_dicts import Leaf
from dsconv.checkpoint.map.renaming import unwrap
from dsconv.checkpoint.pickles.values import safe_repr

ROOTS = ("model.", "module.", "app.model.")  # prefixes of all names that the model's own architecture may rule out


def leaves_of(metadata: Metadata) -> dict[str, Leaf]:
    """Return the items of a directory by their flat names; an item that planner_data lacks is at the top."""
    leaves = {
        name: Leaf(metadata.paths.get(name, (name,)), meta.shape, meta.dtype is None or meta.dtype.floating)
        for name, meta in metadata.tensors.items()
    }
    return leaves | {name: Leaf(metadata.paths.get(name, (name,))) for name in metadata.objects}


def choose(leaves: Mapping[str, Leaf], folder: Path, config: Path | None, item: str | None = None) -> Items:
    """Choose the model of a directory and name its tensors as the model does.

    Args:
        leaves: What ``leaves_of`` returned.
        folder: The directory, for messages.
        config: The model's config.json, if there is one; its architecture may rule out a prefix of all names.
        item: The key of the wanted model; None if there is only one.

    Raises:
        SeveralModelsError, CheckpointNotFoundError, UnsupportedError: As ``choose_model`` does.
    """
    names = choose_model(leaves, folder, item)
    unwrapped = unwrap(names.chosen.values())
    names.chosen = {flat: unwrapped(name) for flat, name in names.chosen.items()}
    names.removed += unwrapped.removed
    if config is not None:
        _remove_root(names, leaves, config)
    return names


def _remove_root(names: Items, leaves: Mapping[str, Leaf], config: Path) -> None:
    """Remove a prefix that the architecture of config.json has no place for.

    All names have the prefix, except those that the architecture has no place for either way. These were beside the
    model in a dictionary that was flattened: weights keep their names, and single numbers are left out with a warning.
    """
    for root in ROOTS:
        short = {flat: name.removeprefix(root) for flat, name in names.chosen.items() if name.startswith(root)}
        others = {flat: name for flat, name in names.chosen.items() if flat not in short}
        if not short or not all(short.values()):
            continue
        fits = children_of(config)
        if fits is None:
            return
        if any(map(fits, others.values())) or not all(map(fits, short.values())):
            continue
        if all(fits(names.chosen[flat]) for flat in short):
            continue
        for flat, name in others.items():
            if leaves[flat].is_weight:
                short[flat] = name
            else:
                names.left_out[name] = names.left_out.get(name, 0) + 1
                names.warnings.append(f"left out {safe_repr(name)}, for which {config} has no place")
        names.chosen = short
        names.removed.append(root)
        return
