"""Find the bytes of a view: turn its patches into pieces, which the copy reads like those of any tensor.

A box of an entry meets each piece of the entry in smaller boxes. Where such a box lies in the file in the order of the
tensor, it is a plain piece; rows in another order and transposed boxes are pieces with strides, each of them small.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from dsconv.checkpoint.map.patches import Patch, View, single_rows, whole
from dsconv.checkpoint.map.pieces import arranged, row_major
from dsconv.checkpoint.map.regions import Sizes, box, prove_cover, shape_of
from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.errors import MalformedError, UnsupportedError

MAX_KEPT = 8  # entries whose boxes are kept
MAX_STRIDED_BYTES = 4 << 20  # of a piece with strides, which is read whole: larger ones are divided along their rows


@dataclass(frozen=True)
class Held:
    """A box of an entry in a file.

    Element ``i`` of the box lies ``at + sum(i[d] * strides[d])`` elements after the beginning of the piece's extent.
    """

    piece: Piece
    offsets: Sizes
    sizes: Sizes
    at: int
    strides: Sizes

    def within(self, offsets: Sizes, sizes: Sizes) -> Held | None:
        """Return the intersection with another box of the same entry, or None if it is empty."""
        low = tuple(map(max, self.offsets, offsets))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, offsets, sizes, strict=True))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        moved = sum((a - b) * step for a, b, step in zip(low, self.offsets, self.strides, strict=True))
        return Held(
            self.piece, low, tuple(b - a for a, b in zip(low, high, strict=True)), self.at + moved, self.strides
        )


class KeptBoxes:
    """The boxes of the last few entries that were asked for: hundreds of experts are parts of one entry."""

    def __init__(self) -> None:
        self._kept: dict[int, HeldBoxes] = {}  # by the entry's id: the boxes refer to it, so no other entry gets it
        self._lock = threading.Lock()

    def of(self, entry: TensorEntry) -> HeldBoxes:
        """Return the boxes of an entry."""
        with self._lock:
            found = self._kept.pop(id(entry), None) or HeldBoxes(entry)
            while len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[id(entry)] = found
            return found


@dataclass(frozen=True)
class PatchedLayout:
    """The layout of a tensor of ``shape`` that patches make. The layouts of one conversion share ``kept``."""

    shape: Sizes
    patches: tuple[Patch, ...]
    kept: KeptBoxes = field(default_factory=KeptBoxes, compare=False, repr=False)

    def __call__(self) -> tuple[Piece, ...]:
        placed: list[tuple[Sizes, Sizes, Piece]] = []
        for patch in self.patches:
            placed += _placed(patch, self.kept.of(patch.entry))
        return arranged(placed, self.shape)


def patches_of(entry: TensorEntry) -> tuple[Patch, ...]:
    """Return the patches that make an entry: those of the view that it was made of, or the one that takes it whole."""
    return entry.layout.patches if isinstance(entry.layout, PatchedLayout) else (whole(entry),)


class HeldBoxes:
    """The boxes in which an entry lies in its files."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry

    @cached_property
    def _boxes(self) -> list[Held]:
        return sorted(_held(self.entry), key=lambda held: held.offsets[:1])

    @cached_property
    def _ends(self) -> list[int]:
        """The last row that each box, or one before it, reaches."""
        ends: list[int] = []
        for held in self._boxes:
            ends.append(max(ends[-1] if ends else 0, held.offsets[0] + held.sizes[0]))
        return ends

    def meet(self, offsets: Sizes, sizes: Sizes) -> Iterator[Held]:
        """Yield the part of the box of ``sizes`` at ``offsets`` that lies in each piece."""
        first = bisect_left(self._ends, offsets[0] + 1) if offsets else 0
        for number in range(first, len(self._boxes)):
            held = self._boxes[number]
            if offsets and held.offsets[0] >= offsets[0] + sizes[0]:
                break
            if (common := held.within(offsets, sizes)) is not None:
                yield common


def _held(entry: TensorEntry) -> Iterator[Held]:
    pieces = entry.pieces
    if entry.numel and not pieces:
        raise UnsupportedError(
            f"{entry.name!r} is computed, and what is computed cannot be cut up or joined: merge the checkpoint with"
            " --dtype first, and convert the result"
        )
    for piece in pieces:
        if not piece.numel:
            continue
        if piece.strides is not None:
            if piece.region is not None or piece.shape != entry.shape:
                raise UnsupportedError(
                    f"{piece.extent.record.path}: a shard of {entry.name!r} is not contiguous, and its rows cannot be"
                    " renamed or moved"
                )
            yield Held(piece, (0,) * len(entry.shape), entry.shape, 0, piece.strides)
        elif piece.region is None:
            yield from _of_range(piece, entry.shape)
        else:
            strides = row_major(shape_of(piece.region))
            ranks = []
            for intervals in piece.region:
                starts = [sum(b - a for a, b in intervals[:i]) for i in range(len(intervals))]
                ranks.append([(a, b - a, rank) for (a, b), rank in zip(intervals, starts, strict=True)])
            if piece.start or piece.numel != math.prod(shape_of(piece.region)):
                raise UnsupportedError(
                    f"{piece.extent.record.path}: {entry.name!r} lies there in parts of a region, whose rows cannot be"
                    " renamed or moved"
                )
            for part in product(*ranks):
                at = sum(rank * step for (_, _, rank), step in zip(part, strides, strict=True))
                yield Held(piece, tuple(p[0] for p in part), tuple(p[1] for p in part), at, strides)


def _of_range(piece: Piece, shape: Sizes) -> Iterator[Held]:
    """Yield the boxes of a flat range of a tensor of ``shape``: whole rows, and parts of rows at its ends."""
    strides = row_major(shape)

    def boxes(start: int, stop: int, dim: int, index: Sizes) -> Iterator[tuple[Sizes, Sizes]]:
        if start >= stop:
            return
        rest = shape[dim + 1 :]
        if dim == len(shape):
            yield index, (1,) * dim
            return
        step = strides[dim]
        first, last = -(-start // step), stop // step
        if first > last:  # within one row
            row = start // step
            yield from boxes(start - row * step, stop - row * step, dim + 1, (*index, row))
            return
        yield from boxes(start - (first - 1) * step, step, dim + 1, (*index, first - 1)) if start < first * step else ()
        if first < last:
            yield (*index, first, *(0 for _ in rest)), (*(1 for _ in index), last - first, *rest)
        yield from boxes(0, stop - last * step, dim + 1, (*index, last))

    for offsets, sizes in boxes(piece.start, piece.start + piece.numel, 0, ()):
        at = sum(o * s for o, s in zip(offsets, strides, strict=True)) - piece.start
        yield Held(piece, offsets, sizes, at, strides)


def _placed(patch: Patch, boxes: HeldBoxes) -> Iterator[tuple[Sizes, Sizes, Piece]]:
    """Yield (offsets, sizes, piece) of the boxes of the target that the pieces of a patch's entry fill."""
    sizes = [1] * len(patch.source)
    for d, k in enumerate(patch.dims):
        if k is not None:
            sizes[k] = patch.sizes[d]
    found = list(boxes.meet(patch.source, tuple(sizes)))
    if patch.groups is not None:
        own = patch.dims[0]
        if own is None or not all(held.sizes[own] == patch.sizes[0] for held in found):
            for row in single_rows(patch):
                yield from _placed(row, boxes)
            return
    for held in found:
        at = tuple(
            a if k is None else a + held.offsets[k] - patch.source[k] for a, k in zip(patch.at, patch.dims, strict=True)
        )
        extent = tuple(1 if k is None else held.sizes[k] for k in patch.dims)
        steps = tuple(0 if k is None else held.strides[k] for k in patch.dims)
        yield from _pieces(held, patch.entry.dtype.itemsize, at, extent, steps, patch.groups)


def _pieces(
    held: Held, itemsize: int, at: Sizes, sizes: Sizes, steps: Sizes, groups: tuple[int, int] | None
) -> Iterator[tuple[Sizes, Sizes, Piece]]:
    """Yield a box of the target as a piece, or as several where it is large and not in the order of the file."""
    if groups is not None:
        a, b = groups
        shape: Sizes = (b, a, *sizes[1:])
        strides: Sizes = (steps[0], b * steps[0], *steps[1:])
    else:
        shape, strides = sizes, steps
    span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    in_order = all(n == 1 or step == plain for n, step, plain in zip(shape, strides, row_major(shape), strict=True))
    if not in_order and groups is None and span * itemsize > MAX_STRIDED_BYTES:
        yield from _divided(held, itemsize, at, sizes, steps)
        return
    source = held.piece.extent
    extent = Extent(source.record, source.offset_bytes + held.at * itemsize, span * itemsize)
    numel = math.prod(sizes)
    piece = Piece(extent, 0, numel) if in_order else Piece(extent, 0, numel, shape, strides)
    yield at, sizes, piece


def _divided(held: Held, itemsize: int, at: Sizes, sizes: Sizes, steps: Sizes) -> Iterator[tuple[Sizes, Sizes, Piece]]:
    """Divide a box in two along the dimension whose neighbours lie farthest apart in the file."""
    dim = max((d for d, n in enumerate(sizes) if n > 1), key=lambda d: steps[d])
    half = sizes[dim] // 2
    for start, length in ((0, half), (half, sizes[dim] - half)):
        part = replace(held, at=held.at + start * steps[dim])
        moved = (*at[:dim], at[dim] + start, *at[dim + 1 :])
        yield from _pieces(part, itemsize, moved, (*sizes[:dim], length, *sizes[dim + 1 :]), steps, None)


def entry_of(view: View, name: str, kept: KeptBoxes | None = None) -> TensorEntry:
    """Return a view as the entry ``name``.

    Args:
        view: what makes it.
        name: its name.
        kept: what the entries of one conversion share.

    Raises:
        MalformedError: its parts are of different dtypes.
        InconsistentCheckpointError: its parts do not cover it exactly once.
    """
    shape = tuple(view.shape)
    entries = {id(patch.entry): patch.entry for patch in view.patches}
    first = next(iter(entries.values()))
    for other in entries.values():
        if other.dtype != first.dtype:
            raise MalformedError(
                f"{first.name!r} is of {first.dtype} and {other.name!r} of {other.dtype}; both are parts of {name!r}"
            )
    roles = {entry.role for entry in entries.values()}
    role = roles.pop() if len(roles) == 1 else "parameter"
    if view.patches == (whole(first),) and shape == first.shape:
        return replace(first, name=name, aliases=())
    prove_cover([box(patch.at, patch.sizes) for patch in view.patches], shape, name)
    return TensorEntry(name, first.dtype, shape, PatchedLayout(shape, view.patches, kept or KeptBoxes()), role=role)
