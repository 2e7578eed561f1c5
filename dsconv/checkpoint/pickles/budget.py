"""Bound the memory and the work that a pickle causes, in proportion to its length.

Most opcodes cost at most some 20 bytes of memory for each of their own bytes and a fixed time, so they need no count.
``WorkBudget`` counts what costs more: containers, objects, and work that a few bytes can ask for again and again. So a
pickle of n bytes takes at most ``BASE_BYTES`` + n × ``TOTAL_BYTES_PER_BYTE`` of memory. Real files stay far below: the
pickle of a model of 20,000 tensors takes 5 bytes for each of its own.
"""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.pickles.errors import BadArguments
from dsconv.checkpoint.pickles.values import KEY_KINDS, TensorRef

BASE_BYTES = 16 << 20
COUNTED_BYTES_PER_BYTE = 40
UNCOUNTED_BYTES_PER_BYTE = 20
TOTAL_BYTES_PER_BYTE = COUNTED_BYTES_PER_BYTE + UNCOUNTED_BYTES_PER_BYTE
BASE_STEPS = 1_000_000
SMALL = 1 << 20  # integers below it are dense: a table of them has no collisions that matter
ODD_KEYS_PER_STEP = 16
MAX_KEY_DEPTH = 4

# Bytes of memory on CPython 3.10 to 3.14, those of an item with the growth of its container.
LIST_BYTES = 72
LIST_ITEM_BYTES = 12
TUPLE_BYTES = 48
TUPLE_ITEM_BYTES = 8
DICT_BYTES = 72
DICT_FIRST_ITEMS = 5  # are allocated with the first of them
DICT_FIRST_ITEMS_BYTES = 176
DICT_ITEM_BYTES = 100
SET_BYTES = 232
SET_ITEM_BYTES = 128
OBJECT_BYTES = 160
MEMO_BYTES = 128  # of an entry whose number is not the next one


class WorkBudget:
    """What is left of the memory and the steps that a pickle of ``nbytes`` may cost.

    A step is an item handled. A few bytes can hand the same large list to a constructor again, or add one more key to a
    dictionary whose keys all have one hash. Either would take quadratic time.
    """

    def __init__(self, nbytes: int) -> None:
        self.bytes_left = BASE_BYTES + COUNTED_BYTES_PER_BYTE * nbytes
        self.steps_left = BASE_STEPS + nbytes
        self.odd_keys = 0

    def allocate(self, nbytes: int) -> None:
        """Take ``nbytes`` of memory from the budget; raise BadArguments when none is left."""
        self.bytes_left -= nbytes
        if self.bytes_left < 0:
            raise BadArguments("values that take more memory than a file of its size has use for")

    def allocate_items(self, target: dict[Any, Any], count: int) -> None:
        """Take the memory of ``count`` more items of a dictionary; raise BadArguments when none is left."""
        held = len(target)
        nbytes = DICT_ITEM_BYTES * (max(0, held + count - DICT_FIRST_ITEMS) - max(0, held - DICT_FIRST_ITEMS))
        self.allocate(nbytes if held else nbytes + DICT_FIRST_ITEMS_BYTES)

    def spend(self, steps: int) -> None:
        """Take ``steps`` from the budget; raise BadArguments when none is left."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise BadArguments("values that take more work to build than a file of its size has use for")

    def key(self, value: Any) -> Any:
        """Return ``value``, a dictionary key or an item of a set, if its hash has a bounded cost.

        Python's hashes of text are secret. Those of anything else are not: a file can choose numbers, and tuples of
        them, that collide. So each such key pays for the comparisons with those before it, except plain indices.

        Raises:
            BadArguments: ``value`` cannot be a key, is nested too deep, or the budget is spent.
        """
        kind = type(value)
        if kind is str or kind is bytes:
            if len(value) > 64:
                self.spend(len(value) // 64)
        elif kind is not int or not -SMALL < value < SMALL:
            self._odd_key(value, 0)
        return value

    def _odd_key(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind is str or kind is bytes:
            self.spend(len(value) // 64)
            return
        if kind is tuple or kind is frozenset:
            if depth == MAX_KEY_DEPTH:
                raise BadArguments(f"a dictionary key nested over {MAX_KEY_DEPTH} deep")
            self.spend(len(value))
            for item in value:
                self._odd_key(item, depth + 1)
        elif kind is int or kind is float or kind is TensorRef or (depth and (value is None or kind is bool)):
            self.odd_keys += 1
            self.spend(self.odd_keys // ODD_KEYS_PER_STEP)
        elif value is not None and not isinstance(value, (bool, *KEY_KINDS)) and not callable(value):
            raise BadArguments(f"a {kind.__name__} as a dictionary key")
