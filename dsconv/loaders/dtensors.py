"""What of a DTensor's full tensor lies on this rank."""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.map.placements import Replicate, Shard, local_region, region_in_order
from dsconv.checkpoint.map.regions import Region, shape_of
from dsconv.errors import UnsupportedError


def region_of(tensor: Any, name: str) -> Region:
    """The region of a live DTensor on this rank, its padding aside.

    FSDP2 shares out what tensor parallelism left, which for uneven sizes is not what its placements say
    (``checkpoint/map/placements.py``): of the two readings the one that has the local tensor's shape is taken. Raises
    UnsupportedError for Partial, whose shards are no part of the tensor, and where neither reading fits.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    shape, local = tuple(tensor.shape), tuple(tensor.to_local().shape)
    if coordinate is None:
        return tuple(() for _ in shape)
    placements: list[Shard | Replicate] = []
    for placement in tensor.placements:
        if placement.is_partial():
            raise UnsupportedError(
                f"{name} is placed {placement}: its shards are parts of a sum, which cannot be loaded"
            )
        if placement.is_replicate():
            placements.append(Replicate())
        else:
            placements.append(Shard(placement.dim % len(shape), getattr(placement, "split_factor", 1)))
    sizes = tuple(mesh.shape)
    for rule in (region_in_order, local_region):
        region: Region | None = rule(shape, sizes, tuple(coordinate), tuple(placements))
        if region is not None and shape_of(region) == local:
            return region
    raise UnsupportedError(
        f"{name} of shape {list(shape)} is placed {list(tensor.placements)} and has {list(local)} on this rank, which"
        " does not fit"
    )
