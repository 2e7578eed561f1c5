"""Which fp32 master belongs to which weight, where the optimizer keeps masters without names.

Without ZeRO, DeepSpeed pickles the masters of 16-bit weights as lists of tensors, one per parameter group (DeepSpeed
``runtime/fp16/unfused_optimizer.py`` ``fp32_groups``), or each group as one flat tensor
(``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``). Nothing says which weights they are of, and which weights
were frozen and have none. Four things tell:

- **Names.** An optimizer that was made of ``named_parameters()`` keeps them (``param_names``). They count where shapes
  and values agree with them.
- **Values.** A weight is its master, cast. But norms of ones, biases of zeros, and weights that training has moved
  by less than rounding shows, are equal to others.
- **Equal masters.** Where all masters in question are equal, as norms of ones before the first step, each assignment
  gives the same weights. It does not give the same optimizer states.
- **Order.** A group lists its parameters in the module's order, as ``named_parameters`` gives them. That is a custom
  and no rule, so it counts only in a group that shows it: with two masters, at least, that values alone identify.

An assignment is used if it is the only one. Otherwise the checkpoint does not say whose master it is, and a guess would
give a weight the value of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dsconv.checkpoint.formats.deepspeed.param_names import names_of_groups, with_elements
from dsconv.checkpoint.formats.deepspeed.values import Values
from dsconv.checkpoint.map.pieces import row_major
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import UnsupportedError
from dsconv.text import count

MAX_LIVE = 10_000  # partial assignments at a time; a sound checkpoint has a few
OTHERWISE = "dsconv merge --weights 16bit takes the model's own 16-bit weights, which need no optimizer"


class Group(Protocol):
    """One parameter group of the optimizer: slots in a row, each of one parameter."""

    @property
    def end(self) -> int:
        """The position behind the last slot."""
        ...

    def slot(self, position: int, name: str) -> MasterSlot | None:
        """Return the slot at ``position`` as that of the parameter ``name``, judged by its shape; None if it cannot
        be.
        """
        ...


@dataclass(frozen=True)
class MasterSlot:
    """What a group holds of one parameter: its master (None in fp32 training, where weights are masters).

    ``number`` is the group's, [``position``, ``after``) what it takes up there. ``is_any`` says that it may be another
    parameter's whose master is equal: the weights are right, and what else the optimizer keeps there is not told.
    """

    number: int
    position: int
    after: int
    master: TensorRef | None = None
    is_any: bool = False


@dataclass(frozen=True)
class TensorList:
    """A group that lists a master tensor for each parameter."""

    number: int
    tensors: Sequence[TensorRef]
    weights: Mapping[str, TensorEntry]

    @property
    def end(self) -> int:
        return len(self.tensors)

    def slot(self, position: int, name: str) -> MasterSlot | None:
        master = self.tensors[position]
        if master.shape != self.weights[name].shape:
            return None
        return MasterSlot(self.number, position, position + 1, master)


@dataclass(frozen=True)
class FlatTensor:
    """A group whose masters lie end to end in one flat tensor. A parameter without elements takes no room there."""

    number: int
    flat: TensorRef
    weights: Mapping[str, TensorEntry]

    @property
    def end(self) -> int:
        return self.flat.numel

    def slot(self, position: int, name: str) -> MasterSlot | None:
        weight = self.weights[name]
        after = position + weight.numel
        if position == after or after > self.flat.numel:
            return None
        return MasterSlot(self.number, position, after, part_of(self.flat, position, weight.shape))


def part_of(flat: TensorRef, position: int, shape: tuple[int, ...]) -> TensorRef:
    """Return the elements of a flat tensor from ``position`` on as a tensor of ``shape``."""
    return TensorRef(flat.storage, flat.dtype, flat.offset + position, shape, row_major(shape))


def groups_of(optimizer: Any, weights: Mapping[str, TensorEntry]) -> list[Group]:
    """Return the groups of masters in an optimizer's state; none where it has no masters (fp32 training, no optimizer).

    Args:
        optimizer: ``optimizer`` of the model states.
        weights: The weights by name, whose shapes the slots must have.
    """
    if not isinstance(optimizer, dict):
        return []
    lists, flats = optimizer.get("fp32_groups"), optimizer.get("fp32_groups_flat")
    if isinstance(lists, list) and lists:
        found = [[t for t in group if isinstance(t, TensorRef)] if isinstance(group, list) else [] for group in lists]
        return [TensorList(number, tensors, weights) for number, tensors in enumerate(found)]
    if isinstance(flats, list) and all(isinstance(flat, TensorRef) for flat in flats):
        return [FlatTensor(number, flat, weights) for number, flat in enumerate(flats)]
    return []


Judge = Callable[[MasterSlot, str], bool]  # whether a slot can be of the parameter of a name


class Ambiguous(UnsupportedError):
    """More than one assignment fits, or none does."""


@dataclass(frozen=True)
class Matcher:
    """Assigns slots to names. ``judge`` says whether a slot can be that of a name."""

    names: Sequence[str]
    groups: Sequence[Group]
    sizes: Mapping[str, int]  # what each name takes up in a group
    judge: Judge

    def slots_of(self, name: str, positions: Sequence[int]) -> list[MasterSlot]:
        """Return the next slot of each group that can be of ``name``."""
        found = []
        for group, position in zip(self.groups, positions, strict=True):
            slot = group.slot(position, name) if position < group.end else None
            if slot is not None and self.judge(slot, name):
                found.append(slot)
        return found

    def in_order(self) -> tuple[int, dict[str, MasterSlot]]:
        """Return how many assignments keep the module's order in every group (0, 1 or 2 for more), and one of them.

        Walks the module with a position in each group: a parameter has the next slot of some group, or none. Positions
        that are reached in several ways count as such, so that in the end the ways are known.
        """
        ends = tuple(group.end for group in self.groups)
        # What the parameters from each one on can take up at most.
        left = list(accumulate((self.sizes[name] for name in reversed(self.names)), initial=0))[::-1]
        levels: list[dict[tuple[int, ...], tuple[int, tuple[int, ...], MasterSlot | None]]] = [
            {(0,) * len(ends): (1, (), None)}
        ]
        for at, name in enumerate(self.names):
            reached: dict[tuple[int, ...], tuple[int, tuple[int, ...], MasterSlot | None]] = {}
            for positions, (ways, *_) in levels[-1].items():
                steps: list[tuple[tuple[int, ...], MasterSlot | None]] = [(positions, None)]
                steps += [
                    ((*positions[: slot.number], slot.after, *positions[slot.number + 1 :]), slot)
                    for slot in self.slots_of(name, positions)
                ]
                for after, kept in steps:
                    if sum(ends) - sum(after) <= left[at + 1]:
                        before = reached[after][0] if after in reached else 0
                        reached[after] = (min(before + ways, 2), positions, kept)
            if len(reached) > MAX_LIVE:
                return 2, {}
            levels.append(reached)
        if ends not in levels[-1]:
            return 0, {}
        ways, position = levels[-1][ends][0], ends
        found: dict[str, MasterSlot] = {}
        for at in range(len(self.names), 0, -1):
            _, position, kept = levels[at][position]
            if kept is not None:
                found[self.names[at - 1]] = kept
        return ways, {name: found[name] for name in self.names if name in found}

    def by_value(self) -> dict[str, MasterSlot] | None:
        """Return the assignment that values alone give, whatever the order, or None if they do not tell."""
        found: dict[str, MasterSlot] = {}
        for group in self.groups:
            position = 0
            while position < group.end:
                slots = [
                    (name, slot)
                    for name in self.names
                    if (slot := group.slot(position, name)) is not None and self.judge(slot, name)
                ]
                if len(slots) != 1 or slots[0][0] in found:
                    return None
                name, slot = slots[0]
                found[name] = slot
                position = slot.after
        return found

    def by_names(self, names: Sequence[Sequence[str]]) -> dict[str, MasterSlot] | None:
        """Return the assignment in which each group holds its ``names`` one after another; None if one does not fit."""
        if len(names) != len(self.groups):
            return None
        found: dict[str, MasterSlot] = {}
        for group, mine in zip(self.groups, names, strict=True):
            position = 0
            for name in mine:
                slot = group.slot(position, name) if position < group.end else None
                if slot is None or not self.judge(slot, name):
                    return None
                found[name] = slot
                position = slot.after
            if position != group.end:
                return None
        return {name: found[name] for name in self.names if name in found}

    def candidates(self, slot: MasterSlot) -> list[str]:
        """Return the names that a slot could be of by its values, whatever the order."""
        group, size = self.groups[slot.number], slot.after - slot.position
        return [
            name
            for name in self.names
            if self.sizes[name] == size
            and (other := group.slot(slot.position, name)) is not None
            and self.judge(other, name)
        ]

    def unproven(self, found: Mapping[str, MasterSlot]) -> list[str]:
        """Return the names whose slots only the order tells, in groups that do not show that they keep it."""
        known: set[str] = set()
        doubtful: list[tuple[str, list[str]]] = []
        for number in range(len(self.groups)):
            mine = {name: self.candidates(slot) for name, slot in found.items() if slot.number == number}
            alone = [name for name, names in mine.items() if len(names) == 1]
            if len(alone) >= 2:
                known.update(mine)
            else:
                known.update(alone)
                doubtful += [(name, names) for name, names in mine.items() if len(names) > 1]
        while doubtful:
            settled = [name for name, names in doubtful if set(names) - known == {name}]
            if not settled:
                return [name for name, _ in doubtful]
            known.update(settled)
            doubtful = [(name, names) for name, names in doubtful if name not in known]
        return []


def assign(
    matcher: Matcher, path: Path, are_equal: Callable[[TensorRef, TensorRef], bool] | None = None
) -> dict[str, MasterSlot]:
    """Return the slot of each parameter that the optimizer owns.

    Args:
        matcher: Names, groups and what judges them.
        path: The file, for messages.
        are_equal: Whether two masters have the same bytes.

    Returns:
        The slots by name, in the order of the names; a name that is absent was not trained.

    Raises:
        Ambiguous: The values and the order allow several assignments, or none.
    """
    ways, found = matcher.in_order()
    if ways == 1 and not (doubtful := matcher.unproven(found)):
        return found
    by_value = matcher.by_value()
    if by_value is not None:
        return {name: by_value[name] for name in matcher.names if name in by_value}
    if ways == 1 and are_equal is not None and _are_exchangeable(matcher, found, doubtful, are_equal):
        return found | {name: replace(found[name], is_any=True) for name in doubtful}
    alike = doubtful if ways == 1 else _alike(matcher)
    if ways == 0 and not alike:
        raise Ambiguous(
            f"{path}: without ZeRO (stage 0) the fp32 masters have no names, and they do not fit the model's weights"
            f" by shape, values and order: the weights were changed without the optimizer, or the file is from two"
            f" saves. {OTHERWISE}"
        )
    raise Ambiguous(
        f"{path}: without ZeRO (stage 0) the fp32 masters have no names, and which master belongs to which weight"
        f" cannot be determined for {count(len(alike), 'weight')}, such as {', '.join(map(repr, alike[:2]))}: their"
        f" 16-bit values are equal to others', and which weights were frozen is not recorded. {OTHERWISE}"
    )


def _are_exchangeable(
    matcher: Matcher,
    found: Mapping[str, MasterSlot],
    doubtful: Sequence[str],
    are_equal: Callable[[TensorRef, TensorRef], bool],
) -> bool:
    """Return whether every other assignment gives the same weights: all candidates have masters, which are equal."""
    for name in doubtful:
        master = found[name].master
        others = [found.get(other) for other in matcher.candidates(found[name])]
        if master is None or not all(
            other is not None and other.master is not None and are_equal(master, other.master) for other in others
        ):
            return False
    return True


def _alike(matcher: Matcher) -> list[str]:
    """Return the names for which a slot fits that fits another name too; in a walk along each group."""
    found: dict[str, None] = {}
    for group in matcher.groups:
        reached, seen = [0], {0}
        while reached and len(seen) < MAX_LIVE:
            position = reached.pop()
            fitting = [
                (name, slot)
                for name in matcher.names
                if position < group.end
                and (slot := group.slot(position, name)) is not None
                and matcher.judge(slot, name)
            ]
            if len(fitting) > 1:
                found.update(dict.fromkeys(name for name, _ in fitting))
            for _, slot in fitting:
                if slot.after not in seen:
                    seen.add(slot.after)
                    reached.append(slot.after)
    return sorted(found, key=matcher.names.index)


def match_masters(
    file: TorchFile, optimizer: Any, weights: Mapping[str, TensorEntry], stored: Mapping[str, str]
) -> dict[str, MasterSlot]:
    """Return the slot, with its master, of each weight that the optimizer trained.

    Args:
        file: The file that the optimizer's tensors are in.
        optimizer: ``optimizer`` of the model states.
        weights: The weights that may have a master, in the module's order.
        stored: The name in the file for each name from which a wrapper was removed.

    Returns:
        The slots by name; empty if the optimizer has no masters.

    Raises:
        Ambiguous: The checkpoint does not say whose master is whose.
    """
    groups = groups_of(optimizer, weights)
    if not groups:
        return {}
    inner = optimizer.get("optimizer_state_dict")
    names = names_of_groups(inner.get("param_groups") if isinstance(inner, dict) else None, weights, stored)
    with Values(weights) as values:
        matcher = matcher_of(file, groups, weights, values)
        found = matcher.by_names(with_elements(names, weights)) if names is not None else None
        return found if found is not None else assign(matcher, file.path, partial(values.are_equal, file))


def match_known_masters(
    file: TorchFile, optimizer: Any, weights: Mapping[str, TensorEntry]
) -> tuple[dict[str, MasterSlot], int]:
    """Return the same, and how many masters are of no weight at all, which are left out.

    DeepSpeed does not save every weight of a model with experts. Masters in a flat tensor all need a weight, as nothing
    else tells where one ends.
    """
    groups = groups_of(optimizer, weights)
    if not groups:
        return {}, 0
    with Values(weights) as values:
        known: list[Group] = []
        unknown = 0
        for group in groups:
            if isinstance(group, TensorList):
                tensors = [t for t in group.tensors if any(values.begin_alike(name, file, t) for name in weights)]
                unknown += len(group.tensors) - len(tensors)
                group = TensorList(group.number, tensors, weights)
            known.append(group)
        return assign(matcher_of(file, known, weights, values), file.path, partial(values.are_equal, file)), unknown


def matcher_of(file: TorchFile, groups: Sequence[Group], weights: Mapping[str, TensorEntry], values: Values) -> Matcher:
    """Return the matcher that judges the masters of ``groups``, which lie in ``file``, by the values of ``weights``."""
    is_flat = any(isinstance(group, FlatTensor) for group in groups)
    sizes = {name: weight.numel if is_flat else 1 for name, weight in weights.items()}

    def agree(slot: MasterSlot, name: str) -> bool:
        return slot.master is not None and values.agree(name, file, slot.master)

    return Matcher(list(weights), groups, sizes, agree)
