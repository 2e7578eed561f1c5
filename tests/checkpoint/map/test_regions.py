"""Compare regions with torch's own indexing: counting, scattering, copying, and the proof that shards tile a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsconv.checkpoint.map.regions import (
    Region,
    box,
    count_before,
    is_whole,
    numel_of,
    prove_cover,
    scatter,
    shape_of,
    show,
)
from dsconv.checkpoint.map.tensors import Piece, TensorEntry, prove_tiling
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer import copy
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import InconsistentCheckpointError
from tests.trained import same


@st.composite
def shapes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    region = []
    for size in shape:
        kept = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        edges = [i for i in range(size + 1) if (i < size and kept[i]) != (i > 0 and kept[i - 1])]
        region.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return shape, tuple(region)


def picked(full: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, intervals in enumerate(region):
        full = full.index_select(dim, torch.cat([torch.arange(a, b) for a, b in intervals]))
    return full.contiguous()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(shapes_and_regions(), st.data())
def test_a_region_counts_and_scatters_as_indexing_does(
    case: tuple[tuple[int, ...], Region], data: st.DataObject
) -> None:
    shape, region = case
    full = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    shard = picked(full, region)
    assert shape_of(region) == tuple(shard.shape)
    assert numel_of(region) == shard.numel()
    assert is_whole(region, shape) == (shard.numel() == full.numel())
    low = data.draw(st.integers(0, full.numel()))
    high = data.draw(st.integers(low, full.numel()))
    first, last = (count_before(region, shape, at) for at in (low, high))
    assert (first, last) == tuple(int((shard < at).sum()) for at in (low, high))
    if first < last:
        block = memoryview(bytearray(b"\xff" * (high - low) * 4))
        raw = memoryview(shard.flatten()[first:last].numpy().tobytes())
        scatter(block, low, raw, first, region, shape, 4)
        found = torch.frombuffer(block, dtype=torch.int32)
        expected = torch.full((high - low,), -1, dtype=torch.int32)
        inside = shard.flatten()[first:last].long()
        expected[inside - low] = inside.int()
        assert torch.equal(found, expected)


def cut(shape: tuple[int, ...], data: st.DataObject) -> list[Region]:
    """Return boxes that tile ``shape``, made by cutting it in two again and again."""
    boxes = [([0] * len(shape), list(shape))]
    for _ in range(data.draw(st.integers(0, 6))):
        number = data.draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[number]
        dim = data.draw(st.integers(0, len(shape) - 1))
        if sizes[dim] > 1:
            at = data.draw(st.integers(1, sizes[dim] - 1))
            left = [at if d == dim else size for d, size in enumerate(sizes)]
            right = [size - at if d == dim else size for d, size in enumerate(sizes)]
            boxes[number : number + 1] = [
                (offsets, left),
                ([o + at * (d == dim) for d, o in enumerate(offsets)], right),
            ]
    return [box(offsets, sizes) for offsets, sizes in boxes]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_boxes_that_tile_are_proven_and_any_other_is_refused(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    regions = data.draw(st.permutations(cut(shape, data)))
    prove_cover(regions, shape, "w")
    lost = data.draw(st.integers(0, len(regions) - 1))
    with pytest.raises(InconsistentCheckpointError, match="tensor 'w': a hole at element"):
        prove_cover(regions[:lost] + regions[lost + 1 :], shape, "w")
    with pytest.raises(InconsistentCheckpointError, match="tensor 'w': an overlap of 2 shards at element"):
        prove_cover([*regions, regions[lost]], shape, "w")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "int64", "uint8"]),
    data=st.data(),
)
def test_shards_are_copied_and_read_whatever_the_block(
    sizes: list[int], dtype: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = tuple(sizes)
    folder = tmp_path_factory.mktemp("shards")
    full = torch.arange(math.prod(shape)).reshape(shape).to(getattr(torch, dtype))
    pieces = []
    for number, region in enumerate(cut(shape, data)):
        torch.save(picked(full, region), folder / f"{number}.pt")
        file = TorchFile(folder / f"{number}.pt")
        split = data.draw(st.integers(0, file.root.numel))
        for low, high in ((0, split), (split, file.root.numel)):  # cut like a tensor-parallel shard in a ZeRO partition
            if low < high:
                pieces.append(Piece(file.extent(file.root, low, high - low), low, high - low, region=region))
    entry = TensorEntry("w", file.root.dtype, shape, lambda: tuple(pieces))
    prove_tiling(entry)
    assert same(entry.read(), full)
    row = data.draw(st.integers(0, shape[0] - 1))
    assert same(entry.read(slice(row, None)), full[row:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "BLOCK_BYTES", data.draw(st.sampled_from([16, 48, 1 << 20])))
        assert same(load_tensors([entry])["w"], full)


def test_a_shard_that_was_saved_as_a_view(tmp_path: Path) -> None:
    full = torch.randn(6, 8)
    pieces = []
    for number, half in enumerate(full.split(4, dim=1)):
        torch.save(half.t().contiguous().t(), tmp_path / f"{number}.pt")
        file = TorchFile(tmp_path / f"{number}.pt")
        (piece,) = file.pieces(file.root)
        pieces.append(Piece(piece.extent, 0, piece.numel, piece.shape, piece.strides, box((0, 4 * number), (6, 4))))
    entry = TensorEntry("w", file.root.dtype, (6, 8), lambda: tuple(pieces))
    prove_tiling(entry)
    assert same(entry.read(), full)
    assert same(load_tensors([entry])["w"], full)


@pytest.fixture
def halves(tmp_path: Path) -> Callable[..., TensorEntry]:
    def make(*regions: Region, numel: int = 4) -> TensorEntry:
        torch.save(torch.arange(numel), tmp_path / "half.pt")
        file = TorchFile(tmp_path / "half.pt")
        return TensorEntry(
            "w",
            file.root.dtype,
            (2, 4),
            lambda: tuple(Piece(file.extent(file.root, 0, numel), 0, numel, region=r) for r in regions),
        )

    return make


def test_what_does_not_tile_is_named(halves: Callable[..., TensorEntry]) -> None:
    left, right = box((0, 0), (2, 2)), box((0, 2), (2, 2))
    prove_tiling(halves(left, right))
    for regions, numel, message in (
        ((left,), 4, r"'w': a hole at element \[0, 2\]"),
        ((left, right, box((1, 0), (1, 4))), 4, r"'w': an overlap of 2 shards at element \[1, 0\]"),
        ((left, box((0, 3), (2, 2))), 4, r"the shard \[0:2, 3:5\] does not lie within shape \[2, 4\]"),
        ((left, right), 3, "a shard has 3 of the elements that it should have"),
        ((left, left), 4, "an overlap at element 0"),
    ):
        with pytest.raises(InconsistentCheckpointError, match=message):
            prove_tiling(halves(*regions, numel=numel))
    assert show((((0, 2), (4, 6)), ())) == "[0:2+4:6, none]"


def test_a_proof_stays_cheap_for_a_thousand_ranks_and_gives_up_on_a_tangle() -> None:
    prove_cover([box((r * 3, 0), (3, 5)) for r in range(2048)], (6144, 5), "rows")
    prove_cover([box((r * 2, c * 2), (2, 2)) for r in range(64) for c in range(64)], (128, 128), "grid")
    splinters = tuple((i, i + 1) for i in range(2500))
    with pytest.raises(InconsistentCheckpointError, match="fit together in no simple way"):
        prove_cover([(splinters, ((i, i + 1),)) for i in range(2500)], (2500, 2500), "tangle")
