"""Regions: which elements of a full tensor a shard holds if they are not one run of it.

A region is, for each dimension, a sorted list of disjoint intervals [start, stop) of indices; it holds the elements
whose every index lies in one of them, in row-major order. A box has one interval per dimension; a tensor-parallel shard
of fused projections, or of a dimension that FSDP and TP both cut, has several. Its order is the full tensor's order
with elements left out, so a run of the full tensor is always one run of the shard: that is what lets a copy read each
byte once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from dsconv.errors import InconsistentCheckpointError
from dsconv.text import count as counted
from dsconv.text import quote

Interval = tuple[int, int]
Region = tuple[tuple[Interval, ...], ...]
Shape = tuple[int, ...]
Sizes = tuple[int, ...]  # the sizes of a box, one per dimension, or its offsets

UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # numpy's types to move elements of so many bytes
MAX_SLABS = 4_000_000  # of a proof; a real mesh of 1,000 × 1,000 ranks needs two million


def box(offsets: Sequence[int], sizes: Sequence[int]) -> Region:
    """Return the region of a box: ``sizes`` elements from ``offsets``, one number a dimension each."""
    return tuple(((offset, offset + size),) if size else () for offset, size in zip(offsets, sizes, strict=True))


def width(intervals: Iterable[Interval]) -> int:
    """Return how many indices the intervals hold."""
    return sum(stop - start for start, stop in intervals)


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the same indices without empty intervals and with neighbours made one."""
    found: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def shape_of(region: Region) -> tuple[int, ...]:
    """Return the shape of the shard that holds the region."""
    return tuple(width(intervals) for intervals in region)


def numel_of(region: Region) -> int:
    """Return how many elements the region holds."""
    return math.prod(shape_of(region))


def is_whole(region: Region, shape: Sequence[int]) -> bool:
    """Return whether the region is all of a tensor of ``shape``."""
    return all(intervals == ((0, size),) for intervals, size in zip(region, shape, strict=True))


def intersect(a: Region, b: Region) -> Region:
    """Return what two regions of one tensor have in common; a dimension without any index is ()."""
    common = []
    for ours, theirs in zip(a, b, strict=True):
        overlaps = ((max(i[0], j[0]), min(i[1], j[1])) for i in ours for j in theirs)
        common.append(tuple((low, high) for low, high in overlaps if low < high))
    return tuple(common)


def check_inside(region: Region, shape: Sequence[int], where: str) -> None:
    """Raise InconsistentCheckpointError unless the region lies within ``shape`` and its intervals are in order."""
    fits = len(region) == len(shape)
    for intervals, size in zip(region, shape, strict=False):
        edges = [edge for interval in intervals for edge in interval]
        fits = fits and all(a <= b for a, b in pairwise(edges)) and all(a < b for a, b in intervals)
        fits = fits and (not edges or (edges[0] >= 0 and edges[-1] <= size))
    if not fits:
        raise InconsistentCheckpointError(f"{where}: the shard {show(region)} does not lie within shape {list(shape)}")


def show(region: Region) -> str:
    """Return a region as a slice is written: ``[0:4, 8:16+24:32]``."""
    return "[" + ", ".join("+".join(f"{a}:{b}" for a, b in intervals) or "none" for intervals in region) + "]"


def count_before(region: Region, shape: Sequence[int], position: int) -> int:
    """Return how many elements of the region come before flat ``position`` of a tensor of ``shape``."""
    inner, held, count = math.prod(shape), numel_of(region), 0
    for intervals, size in zip(region, shape, strict=True):
        if not held:
            return count
        inner //= size
        held //= width(intervals)
        index, position = divmod(position, inner)
        inside = False
        for start, stop in intervals:
            if index < start:
                break
            inside = index < stop
            count += (min(index, stop) - start) * held
        if not inside:
            return count
    return count


def prove_cover(regions: Sequence[Region], shape: tuple[int, ...], name: str) -> None:
    """Raise InconsistentCheckpointError, which says where, unless the regions cover ``shape`` exactly once."""
    budget = [MAX_SLABS]

    def slab(active: tuple[int, ...], dim: int, prefix: tuple[int, ...]) -> None:
        if dim == len(shape):
            if len(active) > 1:
                raise InconsistentCheckpointError(
                    f"tensor {quote(name)}: an overlap of {counted(len(active), 'shard')} at element {list(prefix)}"
                )
            return
        if len(active) == 1 and all(regions[active[0]][d] == ((0, shape[d]),) for d in range(dim, len(shape))):
            return
        events: dict[int, tuple[list[int], list[int]]] = {0: ([], []), shape[dim]: ([], [])}
        for number in active:
            for start, stop in regions[number][dim]:
                events.setdefault(start, ([], []))[0].append(number)
                events.setdefault(stop, ([], []))[1].append(number)
        covering: set[int] = set()
        proven: set[tuple[int, ...]] = set()
        for edge in sorted(events):
            begin, end = events[edge]
            covering.difference_update(end)
            covering.update(begin)
            if edge == shape[dim]:
                break
            now = tuple(sorted(covering))
            budget[0] -= 1 + len(now)
            if budget[0] < 0:
                raise InconsistentCheckpointError(
                    f"tensor {quote(name)}: {counted(len(regions), 'shard')} that fit together in no simple way"
                )
            if not now:
                raise InconsistentCheckpointError(
                    f"tensor {quote(name)}: a hole at element {[*prefix, edge, *[0] * (len(shape) - dim - 1)]}"
                )
            if now not in proven:
                proven.add(now)
                slab(now, dim + 1, (*prefix, edge))

    if math.prod(shape):
        slab(tuple(range(len(regions))), 0, ())


@lru_cache(maxsize=256)
def runs(region: Region, shape: tuple[int, ...]) -> tuple[int, tuple[Any, ...]]:
    """Return how many elements always lie together, and for each outer dimension the positions of its steps (numpy)."""
    import numpy as np

    stride = run = 1
    outer: list[Any] = []
    for intervals, size in zip(reversed(region), reversed(shape), strict=True):
        if outer or intervals != ((0, size),):
            unit = 1 if outer else math.gcd(*(stop - start for start, stop in intervals))
            steps = np.concatenate([np.arange(start, stop, unit, dtype=np.int64) for start, stop in intervals])
            run *= unit
            outer.insert(0, steps * stride)
        else:
            run *= size
        stride *= size
    return run, tuple(outer)


def scatter(
    block: memoryview,
    block_start: int,
    data: memoryview,
    first: int,
    region: Region,
    shape: tuple[int, ...],
    itemsize: int,
) -> None:
    """Put elements of a region where they belong in a block of the full tensor.

    Args:
        block: The full tensor's elements from flat ``block_start`` on; all of ``data`` must fall in it.
        block_start: The flat position of the block's first element.
        data: Elements of the region, from its element ``first`` on.
        first: The number of the first element of ``data`` in the region.
        region: The region.
        shape: The shape of the full tensor.
        itemsize: The bytes of an element.
    """
    import numpy as np

    run, outer = runs(region, shape)
    counts = [len(steps) for steps in outer]
    out, values = np.frombuffer(block, dtype=UNITS[itemsize]), np.frombuffer(data, dtype=UNITS[itemsize])
    low, high = first // run, (first + len(values) - 1) // run
    indices = np.unravel_index(np.arange(low, high + 1), counts) if counts else (np.zeros(1, dtype=np.int64),)
    places = np.zeros(high - low + 1, dtype=np.int64) - block_start
    for index, steps in zip(indices, outer, strict=False):
        places += steps[index]
    head = first - low * run  # the first and the last run may be cut
    done = 0
    if head:
        done = min(run - head, len(values))
        out[places[0] + head : places[0] + head + done] = values[:done]
        places = places[1:]
    tail = (len(values) - done) % run
    if tail:
        out[places[-1] : places[-1] + tail] = values[len(values) - tail :]
        places = places[:-1]
    if len(places):
        put_runs(out, places, values[done : len(values) - tail].reshape(len(places), run))


def put_runs(out: Any, places: Any, rows: Any) -> None:
    """Set ``out[places[i] : places[i] + len(rows[i])] = rows[i]`` for all i; ``places`` ascend."""
    import numpy as np

    step = int(places[1] - places[0]) if len(places) > 1 else 0
    if len(places) == 1:
        out[places[0] : places[0] + rows.shape[1]] = rows[0]
    elif bool((np.diff(places) == step).all()):
        strides = (step * out.itemsize, out.itemsize)
        np.lib.stride_tricks.as_strided(out[places[0] :], rows.shape, strides)[...] = rows
    else:
        out[places[:, None] + np.arange(rows.shape[1])] = rows
