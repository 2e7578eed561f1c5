"""Sort the items of an optimizer in a DCP directory: states by parameter, settings by group.

The forms are those of ``torch/distributed/checkpoint/state_dict.py`` (``get_optimizer_state_dict``):

- nested, as accelerate and the Trainer save it: ``(…, "state", NAME, "exp_avg")`` and ``(…, "param_groups", 0, "lr")``,
  with the names of a group's parameters under ``params``;
- with ``flatten_optimizer_state_dict``, as torchtitan saves it: ``(…, "state.NAME.exp_avg")`` and
  ``(…, "param_groups.NAME.lr")``, so that each parameter has settings of its own.

A name has dots as well, so keys are told from parts of names by the paths of planner_data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dsconv.checkpoint.formats.items.optimizers import GROUPS, STATE
from dsconv.checkpoint.formats.items.state_dicts import Leaf, Parts

PARAMS = "params"
Named = dict[str, dict[str, str]]


@dataclass
class OptimizerItems:
    """The items of one optimizer.

    Attributes:
        holder: The words that lead to ``state`` and ``param_groups``.
        states: {parameter: {state: flat name}}.
        groups: {number of a group: {setting: flat name}}, where groups are listed.
        settings: {parameter: {setting: flat name}}, where parameters have settings of their own.
    """

    holder: Parts
    states: Named = field(default_factory=dict)
    groups: Named = field(default_factory=dict)
    settings: Named = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the optimizer is called, for messages."""
        return ".".join(self.holder) or "the optimizer"

    @property
    def parameters(self) -> dict[str, None]:
        """The names of the parameters that have states or settings, in order."""
        return dict.fromkeys((*self.states, *self.settings))


def sort_items(
    leaves: Mapping[str, Leaf], holders: Mapping[str, Parts], known: Collection[str]
) -> list[OptimizerItems]:
    """Sort the items of all optimizers.

    Args:
        leaves: Every item of a checkpoint, by its flat name.
        holders: ``OptimizerParts.holders``.
        known: The names of the model's parameters. They tell where a name ends and the key of a state begins, where
            both are joined by dots and the key has a dot too.
    """
    found: dict[Parts, OptimizerItems] = {}
    flattened: list[tuple[OptimizerItems, str, Parts]] = []
    for flat, holder in holders.items():
        items = found.setdefault(holder, OptimizerItems(holder))
        path = leaves[flat].path
        kind, rest, is_key = _behind(path, len(holder))
        if kind == GROUPS and rest:
            if is_key:
                items.groups.setdefault(rest[0], {})[".".join(rest[1:])] = flat
            elif len(rest) > 1:
                items.settings.setdefault(".".join(rest[:-1]), {})[rest[-1]] = flat
        elif kind == STATE and len(rest) > 1:
            if is_key:
                items.states.setdefault(rest[0], {})[".".join(rest[1:])] = flat
            else:
                flattened.append((items, flat, rest))
    for items, flat, rest in flattened:
        name, key = _divide(rest, items.settings, known)
        items.states.setdefault(name, {})[key] = flat
    return list(found.values())


def _behind(path: Parts, words: int) -> tuple[str, Parts, bool]:
    """Return the word number ``words`` of a path, what follows it, and whether it is a key or the end of one.

    What follows a key are keys, and what follows a word within a key are words.
    """
    for number, part in enumerate(path):
        inside = part.split(".")
        if words >= len(inside):
            words -= len(inside)
            continue
        rest = inside[words + 1 :]
        if not rest:
            return inside[words], path[number + 1 :], True
        return inside[words], (*rest, *(word for later in path[number + 1 :] for word in later.split("."))), False
    return "", (), True


def _divide(words: Parts, owners: Collection[str], known: Collection[str]) -> tuple[str, str]:
    """Divide words into the name of a parameter and the key of its state: the longest name that is one, or all but
    the last word.
    """
    for end in range(len(words) - 1, 0, -1):
        name = ".".join(words[:end])
        if name in owners or name in known:
            return name, ".".join(words[end:])
    return ".".join(words[:-1]), words[-1]
