"""Unread tensors, on which transformers' weight conversions run as on real ones.

A conversion (transformers ``core_model_loading.py``) fuses experts, splits fused projections, stacks and joins.
Operations that only move boxes are carried out on the boxes, so that a rank can still read just its own bytes. Anything
else raises ``NotBoxes``, and the caller repeats the conversion with real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.fill import Patch, whole


class NotBoxes(Exception):
    """Raised by an operation that does more than move boxes; the message names it."""


class Unread:
    """An unread tensor of ``shape``, made of patches of a checkpoint's entries."""

    def __init__(self, shape: Sequence[int], patches: Sequence[Patch]) -> None:
        self.shape = torch.Size(shape)
        self.patches = tuple(patches)

    @classmethod
    def of(cls, entry: TensorEntry) -> Unread:
        return cls(entry.shape, [whole(entry)])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = OPERATIONS.get(function)
        if operation is None:
            raise NotBoxes(getattr(function, "__name__", str(function)))
        return operation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise NotBoxes(name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return int(self.shape.numel())

    def contiguous(self) -> Unread:
        return self

    def narrow(self, dim: int, start: int, length: int) -> Unread:
        dim = dim % self.ndim
        shape = [length if d == dim else size for d, size in enumerate(self.shape)]
        return Unread(shape, list(self._cut(dim, start, start + length)))

    def _cut(self, dim: int, start: int, stop: int) -> Iterator[Patch]:
        for patch in self.patches:
            low, high = max(start, patch.at[dim]), min(stop, patch.at[dim] + patch.sizes[dim])
            if low < high:
                own = patch.dims[dim]
                source = tuple(s + (low - patch.at[dim]) * (k == own) for k, s in enumerate(patch.source))
                yield replace(
                    patch, source=source, at=_set(patch.at, dim, low - start), sizes=_set(patch.sizes, dim, high - low)
                )

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Unread, ...]:
        size = self.shape[dim]
        return self.split(max(1, -(-size // chunks)), dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Unread, ...]:
        total = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
        if sum(sizes) != total:
            raise ValueError(f"sizes {list(sizes)} do not add up to {total}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def squeeze(self, dim: int) -> Unread:
        dim = dim % self.ndim
        if self.shape[dim] != 1:
            return self
        patches = [
            replace(p, at=_drop(p.at, dim), sizes=_drop(p.sizes, dim), dims=_drop(p.dims, dim)) for p in self.patches
        ]
        return Unread(_drop(self.shape, dim), patches)

    def unsqueeze(self, dim: int) -> Unread:
        dim = dim % (self.ndim + 1)
        patches = [
            replace(p, at=_put(p.at, dim, 0), sizes=_put(p.sizes, dim, 1), dims=_put(p.dims, dim, None))
            for p in self.patches
        ]
        return Unread(_put(self.shape, dim, 1), patches)


def _set(values: Sequence[Any], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _drop(values: Sequence[Any], dim: int) -> tuple[Any, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _put(values: Sequence[Any], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim:])


def join(tensors: Sequence[Unread], dim: int = 0) -> Unread:
    """Do what ``torch.cat`` does."""
    dim = dim % tensors[0].ndim
    patches: list[Patch] = []
    length = 0
    for tensor in tensors:
        if _drop(tensor.shape, dim) != _drop(tensors[0].shape, dim):
            raise ValueError(f"cannot join shapes {[list(t.shape) for t in tensors]} along dimension {dim}")
        patches += [replace(patch, at=_set(patch.at, dim, patch.at[dim] + length)) for patch in tensor.patches]
        length += tensor.shape[dim]
    return Unread(_set(tensors[0].shape, dim, length), patches)


def stack(tensors: Sequence[Unread], dim: int = 0) -> Unread:
    return join([tensor.unsqueeze(dim) for tensor in tensors], dim)


OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: join,
    torch.concat: join,
    torch.stack: stack,
    torch.chunk: Unread.chunk,
    torch.split: Unread.split,
    torch.narrow: Unread.narrow,
    torch.squeeze: Unread.squeeze,
    torch.unsqueeze: Unread.unsqueeze,
}
