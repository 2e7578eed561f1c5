"""Compare the regions of mesh coordinates with what torch puts on each rank, and with the offsets that it reports."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Replicate as TorchReplicate
from torch.distributed.tensor.placement_types import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard

from dsconv.checkpoint.map.placements import Placements, Replicate, Shard, local_region, region_in_order, shard_order
from dsconv.checkpoint.map.regions import Region, check_inside, numel_of, prove_cover, shape_of
from tests.checkpoint.map.spreads import Spread, spreads
from tests.fixtures import gloo


def ours(placements: Any) -> Placements:
    return tuple(Replicate() if dim is None else Shard(dim, factor) for dim, factor in placements)


def theirs(placements: Placements) -> list[Any]:
    kinds: list[Any] = []
    for p in placements:
        if isinstance(p, Replicate):
            kinds.append(TorchReplicate())
        else:
            kinds.append(
                TorchShard(p.dim) if p.split_factor == 1 else _StridedShard(p.dim, split_factor=p.split_factor)
            )
    return kinds


def picked(full: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, intervals in enumerate(region):
        full = full.index_select(dim, torch.tensor([i for a, b in intervals for i in range(a, b)], dtype=torch.int64))
    return full


def tensor_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)


def test_four_gloo_ranks_hold_what_the_regions_say() -> None:
    """distribute_tensor spreads 250 tensors over real meshes; compare every rank's elements, shape and offset."""
    folder = gloo.ensure("rankfiles", ["placements-w4"])["placements-w4"]
    kinds: Counter[str] = Counter()
    for rank in range(4):
        for row in json.loads((folder / f"rank{rank}.json").read_text()):
            shape, mesh, coordinate = tuple(row["shape"]), tuple(row["mesh"]), tuple(row["coordinate"])
            placements = ours(row["placements"])
            if not coordinate:  # the mesh has fewer ranks
                continue
            assert coordinate == tuple(torch.tensor(row["ranks"]).reshape(mesh).eq(rank).nonzero()[0].tolist())
            region = local_region(shape, mesh, coordinate, placements)
            assert list(shape_of(region)) == row["local_shape"] == row["torch_shape"], row
            assert picked(tensor_of(shape), region).flatten().tolist() == row["local"], row
            if numel_of(region):
                assert [intervals[0][0] for intervals in region] == row["offset"], row
            kinds["strided" if any(factor > 1 for _, factor in row["placements"]) else "plain"] += 1
            kinds["empty"] += not row["local"]
            kinds["uneven"] += bool(row["local"]) and math.prod(shape) % 4 > 0
            kinds["nested"] += len({dim for dim, _ in row["placements"] if dim is not None}) < sum(
                d is not None for d, _ in row["placements"]
            )
            kinds[f"{len(mesh)}-d"] += 1
    assert min(kinds[kind] for kind in ("strided", "plain", "empty", "uneven", "nested", "1-d", "2-d", "3-d")) >= 40, (
        kinds
    )


LARGE = ((8,), (3, 5), (7, 2), (2, 3, 4), (5, 1, 3))


@settings(derandomize=True, deadline=None, max_examples=250)
@given(spreads(LARGE), st.data())
def test_larger_meshes_agree_with_torch(spread: Spread, data: st.DataObject) -> None:
    placements = ours(spread.placements)
    coordinate = tuple(data.draw(st.integers(0, size - 1)) for size in spread.mesh)
    region = local_region(spread.shape, spread.mesh, coordinate, placements)
    check_inside(region, spread.shape, "w")
    shape, offset = _compute_local_shape_and_global_offset(
        torch.Size(spread.shape), spread.mesh, list(coordinate), theirs(placements)
    )
    assert shape_of(region) == shape
    if numel_of(region):
        assert tuple(intervals[0][0] for intervals in region) == offset
    expected = tensor_of(spread.shape)
    for size, index, placement in zip(spread.mesh, coordinate, theirs(placements), strict=True):
        if not isinstance(placement, TorchReplicate):
            expected = placement._split_tensor(expected, size, with_padding=False)[0][index]
    assert torch.equal(picked(tensor_of(spread.shape), region), expected)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(spreads((*LARGE, (2, 2))))
def test_all_coordinates_tile_the_tensor_by_either_rule(spread: Spread) -> None:
    placements = ours(spread.placements)
    coordinates = list(product(*map(range, spread.mesh)))
    both = []
    for rule in (local_region, region_in_order):
        regions = [rule(spread.shape, spread.mesh, coordinate, placements) for coordinate in coordinates]
        if None in regions:
            continue
        distinct = list(dict.fromkeys(region for region in regions if region is not None and numel_of(region)))
        prove_cover(distinct, spread.shape, "w")
        both.append(regions)
    if len(both) == 2 and [shape_of(r) for r in both[0] if r] == [shape_of(r) for r in both[1] if r]:
        assert both[0] == both[1], "shapes alone do not tell which rule made the files"


@settings(derandomize=True, deadline=None, max_examples=150)
@given(spreads(LARGE))
def test_the_order_of_shards_is_torchs(spread: Spread) -> None:
    class Grid:  # the only method of a mesh that torch calls here
        def size(self, dim: int) -> int:
            return spread.mesh[dim]

    placements = ours(spread.placements)
    dims = sorted({p.dim for p in placements if isinstance(p, Shard)})
    orders = [shard_order(spread.mesh, placements, dim) for dim in dims]
    expected: Any = DTensorSpec._maybe_convert_StridedShard_to_shard_order(tuple(theirs(placements)), Grid())
    assert (None if None in orders else [(dim, order) for dim, order in zip(dims, orders, strict=True)]) == (
        None if expected is None else [(entry.tensor_dim, entry.mesh_dims) for entry in expected]
    )


def test_fsdp_shares_out_what_tensor_parallelism_left() -> None:
    placements = (Shard(0, 2), Shard(0))
    cut = {c: region_in_order((7,), (3, 2), c, placements) for c in product(range(3), range(2))}
    assert cut[2, 0] == ((),)
    assert cut[2, 1] == (((6, 7),),)
    assert local_region((7,), (3, 2), (2, 0), placements) == (((6, 7),),)
    assert local_region((10,), (2, 2), (0, 0), placements) == (((0, 3),),)
    assert local_region((8, 3), (2,), (1,), (Shard(0, 2),)) == (((2, 4), (6, 8)), ((0, 3),))


def test_placements_have_torchs_names() -> None:
    assert [str(p) for p in (Shard(1), Shard(0, 2), Replicate())] == [
        "Shard(1)",
        "_StridedShard(0, split_factor=2)",
        "Replicate()",
    ]


@pytest.mark.parametrize("size", [0, 1, 1 << 40])
def test_a_large_split_factor_costs_nothing(size: int) -> None:
    region = local_region((size,), (4,), (3,), (Shard(0, 2),))
    assert len(region[0]) <= 2
