"""Unread tensors, on which transformers' weight conversions run as on real ones.

A conversion (transformers ``core_model_loading.py``) fuses experts, splits fused projections, stacks and joins.
Operations that only move boxes are carried out on the boxes, so that a rank can still read just its own bytes. Anything
else raises ``NotBoxes``, and the caller repeats the conversion with real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dsconv.checkpoint.map.patches import Patch, View


class NotBoxes(Exception):
    """Raised by an operation that does more than move boxes; the message names it."""


class Unread(View):
    """An unread tensor of ``shape``, made of patches of a checkpoint's entries, on which torch's functions run."""

    shape: torch.Size

    def __init__(self, shape: Sequence[int], patches: Iterable[Patch]) -> None:
        super().__init__(shape, patches)
        self.shape = torch.Size(shape)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = OPERATIONS.get(function)
        if operation is None:
            raise NotBoxes(getattr(function, "__name__", str(function)))
        return operation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise NotBoxes(name)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return int(self.shape.numel())

    def contiguous(self) -> Unread:
        return self

    def transpose(self, first: int, second: int) -> Unread:
        raise NotBoxes("transpose")  # a rank would read it element by element


OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: Unread.cat,
    torch.concat: Unread.cat,
    torch.stack: Unread.stack,
    torch.chunk: Unread.chunk,
    torch.split: Unread.split,
    torch.narrow: Unread.narrow,
    torch.squeeze: Unread.squeeze,
    torch.unsqueeze: Unread.unsqueeze,
}
