"""Tensors that are made of boxes of other tensors: renamed, joined, cut, stacked, with rows in another order.

A ``Patch`` is one box, and a ``View`` is a tensor that patches make. An operation on a view computes its shape and
moves its boxes; no data is read. Conversions of names (``dsconv/names``) and transformers' own
(``loaders/symbolic.py``) are written with these operations, and ``map/patched.py`` says where a view's bytes lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.tensors import TensorEntry

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Patch:
    """A box of ``entry`` that makes a box of a tensor: element ``at[d] + i`` of dimension d is ``source[k] + i`` of
    dimension k of the entry, where k is ``dims[d]``. A dimension of size 1 that the entry lacks has None; of a
    dimension of the entry that no d has, the one index ``source[k]`` is taken.

    With ``groups`` (a, b), the box has a × b rows, in a groups of b, and row i × b + j of the entry's is row
    j × a + i of the tensor's: the groups are interleaved.
    """

    entry: TensorEntry
    source: tuple[int, ...]
    at: tuple[int, ...]
    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]
    groups: tuple[int, int] | None = None


def whole(entry: TensorEntry) -> Patch:
    """Return the patch that takes ``entry`` as it is."""
    zeros = (0,) * len(entry.shape)
    return Patch(entry, zeros, zeros, entry.shape, tuple(range(len(entry.shape))))


class View:
    """An unread tensor of ``shape``, made of patches of a checkpoint's entries.

    Every operation returns a new view, and does what the operation of torch of the same name does.
    """

    shape: Sequence[int]

    def __init__(self, shape: Sequence[int], patches: Iterable[Patch]) -> None:
        self.shape = tuple(shape)
        self.patches = tuple(patches)

    @classmethod
    def of(cls, entry: TensorEntry) -> Self:
        return cls(entry.shape, [whole(entry)])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def narrow(self, dim: int, start: int, length: int) -> Self:
        dim = dim % self.ndim
        shape = [length if d == dim else size for d, size in enumerate(self.shape)]
        return type(self)(shape, self._cut(dim, start, start + length))

    def _cut(self, dim: int, start: int, stop: int) -> Iterator[Patch]:
        for patch in self.patches:
            low, high = max(start, patch.at[dim]), min(stop, patch.at[dim] + patch.sizes[dim])
            if low < high and dim == 0 and patch.groups is not None and high - low < patch.sizes[0]:
                yield from View(self.shape, single_rows(patch))._cut(dim, start, stop)
            elif low < high:
                own = patch.dims[dim]
                source = tuple(s + (low - patch.at[dim]) * (k == own) for k, s in enumerate(patch.source))
                yield replace(
                    patch, source=source, at=_set(patch.at, dim, low - start), sizes=_set(patch.sizes, dim, high - low)
                )

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Self, ...]:
        size = self.shape[dim]
        return self.split(max(1, -(-size // chunks)), dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Self, ...]:
        total = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
        if sum(sizes) != total:
            raise ValueError(f"sizes {list(sizes)} do not add up to {total}")
        starts = [0, *accumulate(sizes)][: len(sizes)]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def squeeze(self, dim: int) -> Self:
        dim = dim % self.ndim
        if self.shape[dim] != 1:
            return self
        patches = [
            replace(p, at=_drop(p.at, dim), sizes=_drop(p.sizes, dim), dims=_drop(p.dims, dim))
            for p in self._ungrouped()
        ]
        return type(self)(_drop(self.shape, dim), patches)

    def unsqueeze(self, dim: int) -> Self:
        dim = dim % (self.ndim + 1)
        patches = [
            replace(p, at=_put(p.at, dim, 0), sizes=_put(p.sizes, dim, 1), dims=_put(p.dims, dim, None))
            for p in self._ungrouped()
        ]
        return type(self)(_put(self.shape, dim, 1), patches)

    def transpose(self, first: int, second: int) -> Self:
        first, second = first % self.ndim, second % self.ndim

        def swap(values: Sequence[Any]) -> tuple[Any, ...]:
            swapped = list(values)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            return tuple(swapped)

        patches = [replace(p, at=swap(p.at), sizes=swap(p.sizes), dims=swap(p.dims)) for p in self._ungrouped()]
        return type(self)(swap(self.shape), patches)

    def interleave(self, groups: int, blocks: int = 1) -> Self:
        """Interleave the rows: as ``view(blocks, groups, n, …).transpose(1, 2).reshape(shape)`` of a tensor does.

        Raises:
            ValueError: the rows cannot be divided so.
        """
        rows = self.shape[0]
        if not self.shape or rows % (groups * blocks):
            raise ValueError(f"{rows} rows cannot be divided into {blocks} blocks of {groups} groups")
        of_block = rows // blocks
        patches: list[Patch] = []
        for block in range(blocks):
            for patch in self.narrow(0, block * of_block, of_block).patches:
                if patch.sizes[0] == of_block and patch.groups is None:
                    patches.append(
                        replace(patch, at=_set(patch.at, 0, block * of_block), groups=(groups, of_block // groups))
                    )
                    continue
                for row in _each_row(patch):
                    i, j = divmod(row.at[0], of_block // groups)
                    patches.append(replace(row, at=_set(row.at, 0, block * of_block + j * groups + i)))
        return type(self)(self.shape, patches)

    def _ungrouped(self) -> Iterator[Patch]:
        return (row for patch in self.patches for row in single_rows(patch))

    @classmethod
    def cat(cls, views: Sequence[Self], dim: int = 0) -> Self:
        dim = dim % views[0].ndim
        patches: list[Patch] = []
        length = 0
        for view in views:
            if _drop(view.shape, dim) != _drop(views[0].shape, dim):
                raise ValueError(f"cannot join shapes {[list(v.shape) for v in views]} along dimension {dim}")
            patches += [replace(patch, at=_set(patch.at, dim, patch.at[dim] + length)) for patch in view.patches]
            length += view.shape[dim]
        return cls(_set(views[0].shape, dim, length), patches)

    @classmethod
    def stack(cls, views: Sequence[Self], dim: int = 0) -> Self:
        return cls.cat([view.unsqueeze(dim) for view in views], dim)


def single_rows(patch: Patch) -> list[Patch]:
    """Return the same as patches whose rows are in order: one for each row of interleaved groups, else ``patch``."""
    if patch.groups is None:
        return [patch]
    return _each_row(patch)


def _each_row(patch: Patch) -> list[Patch]:
    a, b = patch.groups or (1, patch.sizes[0])
    own = patch.dims[0]
    rows = []
    for row in range(patch.sizes[0]):
        i, j = divmod(row, b)
        source = patch.source if own is None else _set(patch.source, own, patch.source[own] + row)
        at = _set(patch.at, 0, patch.at[0] + j * a + i)
        rows.append(replace(patch, source=source, at=at, sizes=_set(patch.sizes, 0, 1), groups=None))
    return rows


def _set(values: Sequence[Any], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _drop(values: Sequence[Any], dim: int) -> tuple[Any, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _put(values: Sequence[Any], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim:])
