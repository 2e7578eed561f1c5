"""The part of a tensor that a rank of a device mesh holds: torch's own rule, as regions.

Placements are one for each dimension of the mesh and are applied from the first to the last: each cuts what the ones
before it left. ``Shard`` cuts as torch.chunk does: ceil(n / parts) indices each, so that the last parts are smaller or
empty. With a ``split_factor`` it is torch's ``_StridedShard``: the dimension is first cut in that many parts, and each
of them is shared out (``torch/distributed/tensor/placement_types.py``, ``Shard.local_shard_size_and_offset``
and ``_StridedShard._split_tensor``; ``torch/distributed/tensor/_utils.py``, ``compute_local_shape_and_global_offset``).

FSDP2 shares out what tensor parallelism left of a tensor, and writes that down as ``_StridedShard``. Where sizes are
not even the two can differ: 7 rows on TP 2 and FSDP 3 are cut 4 + 3 and then 2 + 2 + 0 and 1 + 1 + 1, while the
placements say that the last FSDP rank's one row belongs to the first TP rank. ``region_in_order`` is what FSDP2 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dsconv.checkpoint.map.regions import Interval, Region, merged, width

Intervals = tuple[Interval, ...]


@dataclass(frozen=True)
class Shard:
    """Share out dimension ``dim`` of the tensor, in ``split_factor`` rounds, over a dimension of the mesh."""

    dim: int
    split_factor: int = 1

    def __str__(self) -> str:
        return (
            f"Shard({self.dim})"
            if self.split_factor == 1
            else f"_StridedShard({self.dim}, split_factor={self.split_factor})"
        )


@dataclass(frozen=True)
class Replicate:
    """Give every rank of a dimension of the mesh the same."""

    def __str__(self) -> str:
        return "Replicate()"


Placements = tuple[Shard | Replicate, ...]


@lru_cache(maxsize=65536)
def local_region(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Placements
) -> Region:
    """Return what the rank at ``coordinate`` of a mesh of shape ``mesh`` holds of a tensor of ``shape``."""
    region = [_all(size) for size in shape]
    for parts, index, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            whole = region[placement.dim]
            rounds = (
                _chunk(whole, placement.split_factor, i) for i in range(min(placement.split_factor, width(whole)))
            )
            region[placement.dim] = merged([interval for one in rounds for interval in _chunk(one, parts, index)])
    return tuple(region)


@lru_cache(maxsize=65536)
def region_in_order(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Placements
) -> Region | None:
    """Return the same, each dimension cut in the order of the mesh's dimensions that the split factors encode.

    Returns None if they encode no order. It equals ``local_region`` without split factors, and where all sizes are
    even.
    """
    region = [_all(size) for size in shape]
    for dim in {placement.dim for placement in placements if isinstance(placement, Shard)}:
        order = shard_order(mesh, placements, dim)
        if order is None:
            return None
        for mesh_dim in order:
            region[dim] = _chunk(region[dim], mesh[mesh_dim], coordinate[mesh_dim])
    return tuple(region)


def shard_order(mesh: Sequence[int], placements: Placements, dim: int) -> tuple[int, ...] | None:
    """Return the dimensions of the mesh that cut ``dim``, first cut first; None if the split factors encode no order.

    A split factor is the product of the sizes of the later dimensions of the mesh that cut before this one (torch
    ``_dtensor_spec.py``, ``_convert_shard_order_to_StridedShard``).
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(mesh))):
        placement = placements[mesh_dim]
        if not isinstance(placement, Shard) or placement.dim != dim:
            continue
        product, at = 1, 0
        while product != placement.split_factor and at < len(order):
            product *= mesh[order[at]]
            at += 1
        if product != placement.split_factor:
            return None
        order.insert(at, mesh_dim)
    return tuple(order)


def _all(size: int) -> Intervals:
    return ((0, size),) if size else ()


def _chunk(intervals: Intervals, parts: int, index: int) -> Intervals:
    """Return part ``index`` of torch.chunk of the indices in ``intervals``."""
    step = -(-width(intervals) // parts)
    start, stop = index * step, (index + 1) * step
    taken = []
    position = 0
    for low, high in intervals:
        first, last = max(start - position, 0), min(stop - position, high - low)
        if first < last:
            taken.append((low + first, low + last))
        position += high - low
    return tuple(taken)
