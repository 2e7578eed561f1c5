"""Find the optimizer among the items of a checkpoint by its structure, whatever it is called.

The forms are those of ``torch/optim/optimizer.py`` ``state_dict`` (``state`` and ``param_groups``), of
``torch/distributed/checkpoint/state_dict.py`` (the same by parameter names, nested or, with
``flatten_optimizer_state_dict``, in dotted keys as torchtitan saves them), and of Megatron-core 0.16
``optimizer/distrib_optimizer.py`` (``exp_avg.NAME`` beside ``exp_avg_sq.NAME``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dsconv.checkpoint.formats.items.state_dicts import Leaf, Parts
from dsconv.checkpoint.pickles.values import safe_repr

STATE = "state"
GROUPS = "param_groups"
PAIR = ("exp_avg", "exp_avg_sq")
# What optimizers keep for a parameter: torch/optim/*.py, and the masters of Megatron-core.
SLOTS = frozenset(
    (
        *PAIR,
        "max_exp_avg_sq",
        "exp_inf",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
    )
) | {"acc_delta", "step", "fp32_param", "master_param"}
# Names that a module may have too: torch/optim/{adagrad,adamax,asgd,nadam,rprop,_adafactor}.py, bitsandbytes 8-bit.
RARE_SLOTS = SLOTS | {"sum", "state1", "state2"}
ALL_SLOTS = RARE_SLOTS | {"prev", "step_size", "ax", "row_var", "col_var", "variance"}


@dataclass
class OptimizerParts:
    """The items of optimizers.

    Attributes:
        of: {flat name: the name of the optimizer's part that it belongs to}.
        holders: {flat name: the words that lead to ``state`` and ``param_groups``}, of those that lie below the two.
        warnings: What was taken for an optimizer's without proof.
    """

    of: dict[str, str] = field(default_factory=dict)
    holders: dict[str, Parts] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def optimizer_parts(leaves: Mapping[str, Leaf]) -> OptimizerParts:
    """Find the optimizers' items.

    Args:
        leaves: Every item of a checkpoint, by its flat name. Dictionaries that were flattened into dotted keys are
            followed too.

    Returns:
        The items. Where no ``param_groups`` prove the optimizer, a warning says what was taken for one.
    """
    parts = {flat: tuple(c for part in leaf.path for c in part.split(".")) for flat, leaf in leaves.items()}
    states: dict[Parts, list[str]] = {}
    groups: dict[Parts, list[str]] = {}
    slots: dict[Parts, dict[str, list[str]]] = {}
    for flat, names in parts.items():
        for at, name in enumerate(names):
            if name == STATE and at + 1 < len(names):
                states.setdefault(names[:at], []).append(flat)
            elif name == GROUPS:
                groups.setdefault(names[:at], []).append(flat)
            elif name in SLOTS:
                slots.setdefault(names[:at], {}).setdefault(name, []).append(flat)
    found = OptimizerParts()
    shapes = _shapes(leaves) if states or slots else {}
    for holder in [holder for holder in states if holder in groups]:
        if any(leaves[flat].is_weight for flat in groups[holder]):
            continue
        owners = {".".join(parts[flat][len(holder) + 1 : -1]) for flat in groups[holder]}
        depth = len(holder)
        own = [
            flat
            for flat in states.pop(holder)
            if _is_key(leaves[flat].path, depth) or _is_state(parts[flat][depth + 1 :], owners, shapes)
        ]
        for part, flats in ((STATE, own), (GROUPS, groups[holder])):
            found.of.update(dict.fromkeys(flats, _label(holder, part)))
            found.holders.update(dict.fromkeys(flats, holder))
    _without_groups(leaves, parts, states, slots, found, shapes)
    _beside_their_parameters(leaves, parts, found)
    _nothing_else(leaves, parts, found)
    return found


def _beside_their_parameters(leaves: Mapping[str, Leaf], parts: Mapping[str, Parts], found: OptimizerParts) -> None:
    """Add states that lie under a parameter's own name, or by their slot under a copy of all names.

    A tensor is no module, so ``fc.weight.sum`` beside ``fc.weight`` is not a model's. (What quantized weights keep
    there, such as ``fc.weight.absmax``, has other names.)
    """
    shape_of = {parts[flat]: leaf.shape for flat, leaf in leaves.items() if leaf.is_tensor and flat not in found.of}
    copies: dict[Parts, list[str]] = {}
    for flat, leaf in leaves.items():
        names = parts[flat]
        if flat in found.of or not leaf.is_tensor:
            continue
        if names[-1] in ALL_SLOTS and names[:-1] in shape_of:
            same = names[-1] in SLOTS or leaf.numel == 1 or leaf.shape == shape_of[names[:-1]]
            if same:
                _take(found, [flat], names[-1], "states under the names of parameters")
        for at, name in enumerate(names[:-1]):
            if name in SLOTS and not _is_key(leaf.path, at):
                copies.setdefault(names[: at + 1], []).append(flat)
    for holder, flats in copies.items():
        of = [(*holder[:-1], *parts[flat][len(holder) :]) for flat in flats]
        if all(shape_of.get(name) == leaves[flat].shape for name, flat in zip(of, flats, strict=True)):
            _take(found, flats, holder[-1], "a copy of parameters that are stored beside it")


def _nothing_else(leaves: Mapping[str, Leaf], parts: Mapping[str, Parts], found: OptimizerParts) -> None:
    """Add what holds an optimizer's states and no weight besides: all that is stored, or a dictionary at the top."""
    held: dict[str, list[str]] = {}
    for flat, leaf in leaves.items():
        if leaf.is_tensor and flat not in found.of:
            held.setdefault(leaf.path[0] if len(leaf.path) > 1 else "", []).append(flat)

    def are_states(flats: Collection[str], last: Collection[str] = SLOTS) -> bool:
        weights = [parts[flat] for flat in flats if leaves[flat].is_weight]
        return bool(weights) and all(
            not SLOTS.isdisjoint(names) or (len(names) > 1 and names[-1] in last) for names in weights
        )

    everything = [flat for flats in held.values() for flat in flats]
    if are_states(everything, RARE_SLOTS):
        _take(found, everything, "optimizer states", "no weights are stored beside them")
        return
    for key, flats in held.items():
        if key and key not in SLOTS and are_states(flats):  # {"ema": …, "exp_avg": …} may be two models
            _take(found, flats, key, "it holds states of an optimizer and no weights")


def _is_key(path: Parts, at: int) -> bool:
    """Return whether the ``at``-th word of a path is a dictionary's key, and not a part of a dotted name."""
    words = 0
    for part in path:
        if words == at:
            return "." not in part
        words += part.count(".") + 1
    return False


def _is_state(rest: Parts, owners: Collection[str], shapes: Mapping[str, set[tuple[int, ...]]]) -> bool:
    """Return whether ``rest``, the words after ``state`` in a dotted name, are a parameter and what is kept for it.

    A model's child module may be called ``state`` as well.
    """
    owner = ".".join(rest[:-1])
    return bool(owner) and (owner in owners or owner in shapes or rest[-1] in SLOTS)


def _shapes(leaves: Mapping[str, Leaf]) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes of tensors that are not an optimizer's, by each end of their paths."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for leaf in leaves.values():
        if leaf.shape is not None and not SLOTS.intersection(leaf.path[-1].split(".")):
            for at in range(len(leaf.path)):
                shapes.setdefault(".".join(leaf.path[at:]), set()).add(leaf.shape)
    return shapes


def _without_groups(
    leaves: Mapping[str, Leaf],
    parts: Mapping[str, Parts],
    states: Mapping[Parts, list[str]],
    slots: Mapping[Parts, Mapping[str, list[str]]],
    found: OptimizerParts,
    shapes: Mapping[str, set[tuple[int, ...]]],
) -> None:
    """Add optimizers that no ``param_groups`` prove: states of parameters that are stored beside them."""
    suspects = [
        holder
        for holder, kept in slots.items()
        if all(name in kept for name in PAIR) and not all(flat in found.of for flat in kept[PAIR[0]])
    ]
    if not states and not suspects:
        return
    of_weights = {shape for known in shapes.values() for shape in known}
    for holder, flats in states.items():
        own = [
            flat
            for flat in flats
            for known in (shapes.get(".".join(parts[flat][len(holder) + 1 : -1]), ()),)
            if known and (leaves[flat].shape in known or leaves[flat].numel == 1)
        ]
        if any(leaves[flat].is_weight for flat in own):
            _take(found, own, _label(holder, STATE), "states of parameters that are stored beside them")
            found.holders.update(dict.fromkeys(own, holder))
    for holder in suspects:
        members = {flat: name for name, flats in slots[holder].items() for flat in flats}
        pairs = [
            {".".join(parts[flat][len(holder) + 1 :]): leaves[flat].shape for flat in slots[holder][name]}
            for name in PAIR
        ]
        alike = bool(pairs[0]) and pairs[0] == pairs[1] and None not in pairs[0].values()
        if alike and ("step" in slots[holder] or any(shape in of_weights for shape in pairs[0].values())):
            _take(found, list(members), _label(holder, PAIR[0]), f"{PAIR[0]} beside {PAIR[1]}")


def _take(found: OptimizerParts, flats: list[str], label: str, why: str) -> None:
    new = [flat for flat in flats if flat not in found.of]
    if not new:
        return
    found.of.update(dict.fromkeys(new, label))
    start = f"took {safe_repr(label)} for an optimizer's: {why}"
    if start not in found.warnings and not any(line.endswith(why) for line in found.warnings):
        found.warnings.append(start)


def _label(holder: Parts, part: str) -> str:
    return ".".join(holder) or part
