"""Walk a nested state dict from a pickle, and return its leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.errors import MalformedError

Parts = tuple[str, ...]
MAX_DEPTH = 32  # of nested dictionaries
# A dictionary with many references is walked many times. In real files each has at most a few.
FREE_ITEMS = 100_000
MAX_REPEATS = 4


@dataclass(frozen=True)
class Leaf:
    """An item of a nested state dict.

    Attributes:
        path: The keys that lead to it.
        shape: Its shape in elements; None if it is not a tensor.
        floating: Whether its elements are floating-point numbers.
    """

    path: Parts
    shape: tuple[int, ...] | None = None
    floating: bool = False

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None

    @property
    def numel(self) -> int:
        """The number of elements; 1 for what is not a tensor."""
        return math.prod(self.shape or ())

    @property
    def is_matrix(self) -> bool:
        return self.shape is not None and len(self.shape) > 1

    @property
    def is_weight(self) -> bool:
        """Return whether it may have been trained: a matrix, or several floating-point numbers."""
        return self.is_matrix or (self.shape is not None and self.floating and self.numel != 1)


def describe_tensor(value: Any) -> tuple[tuple[int, ...], bool] | None:
    """Return the shape of a plain tensor, and whether it is floating; None for anything else."""
    return (value.shape, value.dtype.floating) if isinstance(value, TensorRef) else None


def walk(
    root: dict[Any, Any],
    path: Path,
    describe: Callable[[Any], tuple[tuple[int, ...], bool] | None] = describe_tensor,
) -> dict[Parts, tuple[Leaf, Any, Any]]:
    """Return the leaves of a nested state dict by their paths, each with its value and its own key.

    Dictionaries, and lists that hold tensors or dictionaries, are walked. Anything else is a leaf, an empty dictionary
    too. Keys that are not text become text in the path.

    Args:
        root: The dictionary.
        path: The file, for messages.
        describe: Returns shape and whether it is floating for what counts as a tensor, None for anything else.

    Raises:
        MalformedError: It is nested too deeply, contains itself, or refers to the same dictionaries many times.
    """
    found: dict[Parts, tuple[Leaf, Any, Any]] = {}
    walked: set[int] = set()
    items = once = 0

    def visit(node: dict[Any, Any] | list[Any] | tuple[Any, ...], parts: Parts) -> None:
        nonlocal items, once
        items += len(node)
        if id(node) not in walked:
            walked.add(id(node))
            once += len(node)
        if items > FREE_ITEMS + MAX_REPEATS * once:
            raise MalformedError(f"{path}: the same dictionaries are referred to again and again: not a checkpoint")
        if len(parts) > MAX_DEPTH:
            raise MalformedError(f"{path}: dictionaries are nested over {MAX_DEPTH} deep: not a checkpoint")
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            where = (*parts, key if isinstance(key, str) else str(key)[:80])
            if _is_container(value, describe):
                visit(value, where)
                continue
            described = describe(value)
            found[where] = (Leaf(where) if described is None else Leaf(where, *described), value, key)

    visit(root, ())
    return found


def _is_container(value: Any, describe: Callable[[Any], Any]) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(isinstance(v, dict) or describe(v) is not None for v in value)
