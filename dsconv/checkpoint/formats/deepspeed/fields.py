"""The fields of the mappings that DeepSpeed pickles, each checked for its type when it is read.

A user's ``client_state`` lies at the top level of the model states, and a file may hold anything under any name. So no
field is used before its type is known (``pickles/schema.py``), and one that is not what it should be is an error that
names field and file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsconv.checkpoint.pickles import schema
from dsconv.checkpoint.pickles.schema import expect_dict, expect_int, expect_list, expect_names, expect_shapes
from dsconv.errors import DsconvError

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]
expect_rank_count = partial(expect_int, least=1)  # of any size: it must not size a list


@dataclass(frozen=True)
class Fields:
    """The fields of one mapping of a file. Absent fields and None read as empty, unless they are required."""

    path: Path
    values: Mapping[Any, Any]

    @classmethod
    def of(cls, path: Path, values: Any, what: str) -> Fields:
        """Return the fields of ``values``; raise MalformedError, which names ``what``, unless it is a mapping."""
        return cls(path, expect_dict(values, path, what))

    def required(self, key: str) -> dict[Any, Any]:
        """Return a mapping that must be there."""
        return schema.field(self.values, key, expect_dict, self.path)

    def mapping(self, key: str) -> dict[Any, Any]:
        """Return a mapping; an empty one where the field is absent."""
        return schema.field(self.values, key, expect_dict, self.path, default={})

    def listing(self, key: str) -> list[Any]:
        """Return a list; an empty one where the field is absent."""
        return list(schema.field(self.values, key, expect_list, self.path, default=()))

    def names(self, key: str) -> list[str]:
        """Return a list of tensors' names."""
        return schema.field(self.values, key, expect_names, self.path, default=[])

    def ties(self, key: str) -> dict[str, str]:
        """Return {alias: owner}, whose owners are no aliases. Releases before 0.4 wrote a list of pairs."""
        value = self.values.get(key)
        if isinstance(value, (list, tuple)):
            pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
            if len(pairs) != len(value) or not all(isinstance(alias, str) for alias, _ in pairs):
                raise self.wrong(key, "pairs of names")
            value = {alias: owner for alias, owner in pairs}  # noqa: C416 - a pair may be a list
        return schema.expect_ties(value, self.path, key) if value is not None else {}

    def shapes(self, key: str) -> Shapes:
        """Return a mapping of names to shapes."""
        return schema.field(self.values, key, expect_shapes, self.path, default={})

    def groups_of_shapes(self, key: str) -> list[Shapes]:
        """Return a list of such mappings, one per parameter group. Releases before 0.4 wrote one group bare."""
        value = self.values.get(key)
        groups = [value] if isinstance(value, dict) else self.listing(key)
        return [expect_shapes(group, self.path, f"{key}[{number}]") for number, group in enumerate(groups)]

    def count(self, key: str) -> int | None:
        """Return a positive number of ranks, or None if the field is absent."""
        return schema.field(self.values, key, expect_rank_count, self.path, default=None)

    def counts(self, key: str) -> list[int]:
        """Return a number of ranks, or a list of them, as a list; it must be there."""
        value = self.values.get(key)
        if isinstance(value, (list, tuple)) and value:
            return [expect_rank_count(count, self.path, f"{key}[{number}]") for number, count in enumerate(value)]
        return [schema.field(self.values, key, expect_rank_count, self.path)]

    def number(self, key: str) -> int | None:
        """Return an integer that is not negative, or None if the field is absent."""
        return schema.field(self.values, key, expect_int, self.path, default=None)

    def text(self, key: str) -> str | None:
        """Return a text, or None if the field is absent."""
        return schema.field(self.values, key, schema.expect_text, self.path, default=None)

    def wrong(self, key: str, expected: str) -> DsconvError:
        """Return the error that says that field ``key`` is not what was ``expected``."""
        return schema.wrong(self.values.get(key), self.path, key, expected)
