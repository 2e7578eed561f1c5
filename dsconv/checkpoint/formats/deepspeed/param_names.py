"""The names that an optimizer itself keeps of its parameters.

An optimizer that is made of ``model.named_parameters()`` has ``param_names`` in each group (torch 2.6 and later,
``optim/optimizer.py`` ``add_param_group``), in the order of the group's parameters. Without ZeRO, DeepSpeed saves the
groups as they are, so the names are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsconv.checkpoint.map.tensors import TensorEntry


def names_of_groups(
    groups: Any, weights: Mapping[str, TensorEntry], stored: Mapping[str, str]
) -> list[list[str]] | None:
    """Return the parameters of each group, in its order, by their names among ``weights``.

    Args:
        groups: ``param_groups`` of an optimizer's state.
        weights: The weights of the model by name.
        stored: The name in the file for each name from which a wrapper was removed.

    Returns:
        None unless every group names its parameters, each one is among ``weights``, and none is named twice. The names
        may be those of a part of the model, for instance, and then say nothing about the whole.
    """
    known = {alias: name for name, entry in weights.items() for alias in (name, *entry.aliases)}
    known |= {old: known[new] for new, old in stored.items() if new in known}
    found: list[list[str]] = []
    for group in groups if isinstance(groups, (list, tuple)) else ():
        names = group.get("param_names") if isinstance(group, dict) else None
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n in known for n in names):
            return None
        found.append([known[name] for name in names])
    every = [name for names in found for name in names]
    return found if every and len(set(every)) == len(every) else None


def with_elements(names: Sequence[Sequence[str]], weights: Mapping[str, TensorEntry]) -> list[list[str]]:
    """Return the names of weights that have elements; DeepSpeed keeps no master of others."""
    return [[name for name in group if weights[name].numel] for group in names]
