"""A bound on the work that a pickle causes beyond being read."""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.pickles.errors import BadArguments
from dsconv.checkpoint.pickles.values import KEY_KINDS

BASE_WORK = 1_000_000
SMALL = 1 << 20
MAX_KEY_DEPTH = 4


class WorkBudget:
    """What is left of the work that a pickle of ``nbytes`` may cause beyond reading it, in items handled.

    A few bytes can hand the same large list to a constructor again, or add one more key to a dictionary whose keys all
    have one hash. Either takes quadratic time. Real files stay far below the limit: the largest seen causes 0.06 items
    a byte.
    """

    def __init__(self, nbytes: int) -> None:
        self.left = BASE_WORK + nbytes
        self.odd_keys = 0

    def spend(self, items: int) -> None:
        """Take ``items`` from the budget; raise BadArguments when nothing is left."""
        self.left -= items
        if self.left < 0:
            raise BadArguments("values that take more work to build than a file of its size has use for")

    def key(self, value: Any, depth: int = 0) -> Any:
        """Return ``value``, a dictionary key or an item of a set, if its hash has a bounded cost.

        Python's hashes of text are secret and those of numbers are not: a file can choose numbers that collide. So
        each number that is not a plain index pays for the comparisons with those before it.

        Raises:
            BadArguments: ``value`` cannot be a key, is nested too deep, or the budget is spent.
        """
        kind = type(value)
        if kind is str or kind is bytes:
            if len(value) > 64:
                self.spend(len(value) // 64)
        elif kind is int or kind is float:
            if depth or kind is float or not -SMALL < value < SMALL:
                self.odd_keys += 1
                self.spend(self.odd_keys // 32)
        elif kind is tuple or kind is frozenset:
            if depth == MAX_KEY_DEPTH:
                raise BadArguments(f"a dictionary key nested over {MAX_KEY_DEPTH} deep")
            self.spend(len(value))
            for item in value:
                self.key(item, depth + 1)
        elif value is not None and not isinstance(value, (bool, *KEY_KINDS)) and not callable(value):
            raise BadArguments(f"a {kind.__name__} as a dictionary key")
        return value
