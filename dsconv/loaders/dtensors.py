"""The region of a DTensor's full tensor that lies on this rank."""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.map.placements import Replicate, Shard, local_region, region_in_order
from dsconv.checkpoint.map.regions import Region, shape_of
from dsconv.errors import UnsupportedError


def region_of(tensor: Any, name: str) -> Region:
    """Return the region of a live DTensor that lies on this rank, without padding.

    FSDP2 shards what tensor parallelism left, which for uneven sizes differs from what its placements say
    (``checkpoint/map/placements.py``). Of the two readings, the one with the local tensor's shape is right.

    Args:
        tensor: The DTensor.
        name: Its name, for messages.

    Raises:
        UnsupportedError: A placement is Partial, so the shards are terms of a sum, or neither reading fits.
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
                f"{name} is placed {placement}: its shards are terms of a sum, which cannot be loaded"
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
        f"{name} has shape {list(shape)} and placements {list(tensor.placements)}, which do not fit its local shape"
        f" {list(local)}"
    )
