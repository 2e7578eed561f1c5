"""The names of a family of models in a framework: a table of rules, each for one of the framework's tensors.

``{}`` stands for a number: first that of the layer, then that of the expert. Where Hugging Face's name has more numbers
than the framework's, the framework stacks these tensors in the leading dimensions of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from dsconv.names.operations import Operation, Same

SAME = Same()
NUMBER = r"(0|[1-9]\d{0,8})"


@dataclass(frozen=True)
class Rule:
    """One of the framework's tensors, what Hugging Face calls its parts, and how they are arranged.

    ``also`` are further names of the tensor: the framework's models look for it under one of them.
    """

    theirs: str
    ours: tuple[str, ...]
    operation: Operation = SAME
    also: tuple[str, ...] = ()

    @property
    def stacked(self) -> int:
        """The number of leading dimensions of the framework's tensor that stack Hugging Face's tensors."""
        return self.ours[0].count("{}") - self.theirs.count("{}")


@dataclass(frozen=True)
class Family:
    """The models of one framework that share a table.

    Attributes:
        framework: The framework that uses these names.
        name: The framework's name for the family.
        model_types: The ``model_type`` of the configurations that this family is.
        marks: Names that identify the family: every checkpoint of it has one of them, and no other family does.
        rules: The table.
        expects: {key of the configuration: the only value for which the table is right}, even if the key is absent.
        numbered: The rules of a checkpoint that numbers its layers, where those of ``rules`` stack them; () where there
            is one form.
        no_place: Names of small tensors that Hugging Face's model has no place for. The framework's own converter
            leaves them out.
    """

    framework: str
    name: str
    model_types: tuple[str, ...]
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    expects: Mapping[str, Any] = field(default_factory=dict)
    no_place: tuple[str, ...] = ()
    numbered: tuple[Rule, ...] = ()

    @cached_property
    def _theirs(self) -> Patterns:
        rules = (*self.rules, *self.numbered)
        return Patterns((name, rule, 0) for rule in rules for name in (rule.theirs, *rule.also))

    @cached_property
    def _ours(self) -> Patterns:
        return _by_our_names(self.rules)

    @cached_property
    def _ours_numbered(self) -> Patterns:
        return _by_our_names(self.numbered)

    def find(self, name: str) -> Found | None:
        """Return the rule for a name of the framework's."""
        return self._theirs.find(name)

    def find_hf(self, name: str, numbered: bool = False) -> Found | None:
        """Return the rule for a name of Hugging Face's, in ``numbered`` or in ``rules``."""
        return (self._ours_numbered if numbered else self._ours).find(name)

    def leaves_out(self, name: str) -> bool:
        """Return whether Hugging Face's model has no place for a tensor."""
        return any(_pattern(pattern).fullmatch(name) for pattern in self.no_place)

    def marked(self, names: Iterable[str]) -> bool:
        """Return whether one of the names marks the family."""
        marks = [_pattern(mark) for mark in self.marks]
        return any(mark.fullmatch(name) for name in names for mark in marks)


@dataclass(frozen=True)
class Found:
    """A rule that fits a name: the name's numbers, and its place among ``rule.ours``."""

    rule: Rule
    numbers: tuple[int, ...]
    place: int


class Patterns:
    """Names with ``{}``, each with a rule."""

    def __init__(self, rows: Iterable[tuple[str, Rule, int]]) -> None:
        self._rows = {re.sub(r"\{\}", "0", name): (_pattern(name), rule, place) for name, rule, place in rows}

    def find(self, name: str) -> Found | None:
        row = self._rows.get(re.sub(r"(?<=\.)\d+(?=\.)", "0", name))
        match = row[0].fullmatch(name) if row is not None else None
        if row is None or match is None:
            return None
        return Found(row[1], tuple(map(int, match.groups())), row[2])


def _by_our_names(rules: Iterable[Rule]) -> Patterns:
    return Patterns((name, rule, place) for rule in rules for place, name in enumerate(rule.ours))


@lru_cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(NUMBER.join(map(re.escape, name.split("{}"))))
