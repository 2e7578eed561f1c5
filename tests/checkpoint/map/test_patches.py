"""Compare views of unread tensors with torch's operations on the same tensors, however these lie in files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from dsconv.checkpoint.map import patched
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.patched import entry_of
from dsconv.checkpoint.map.patches import View
from dsconv.checkpoint.map.pieces import arranged
from dsconv.checkpoint.map.tensors import Extent, Piece, Record, TensorEntry, prove_tiling
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import InconsistentCheckpointError, MalformedError


def cuts(size: int, random: Random) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(random.randrange(size + 1) for _ in range(random.randrange(3)))})
    return list(itertools.pairwise(edges))


def saved(full: torch.Tensor, path: Path, random: Random) -> TensorEntry:
    """Return an entry whose flat ranges, or boxes, follow each other in a file."""
    shape = tuple(full.shape)
    record = Record(path, 0, full.nbytes)
    data, pieces, placed = bytearray(), [], []
    if random.random() < 0.4:
        for start, stop in cuts(full.numel(), random):
            extent = Extent(record, len(data), (stop - start) * 4)
            pieces.append(Piece(extent, start, stop - start))
            data += full.reshape(-1)[start:stop].numpy().tobytes()
        found: tuple[Piece, ...] = tuple(pieces)
    else:
        cut_dims = random.randrange(full.ndim + 1)
        sides = [cuts(size, random) if dim < cut_dims else [(0, size)] for dim, size in enumerate(shape)]
        for box in itertools.product(*sides):
            shard = full[tuple(slice(a, b) for a, b in box)].contiguous()
            piece = Piece(Extent(record, len(data), shard.nbytes), 0, shard.numel())
            placed.append((tuple(a for a, _ in box), tuple(b - a for a, b in box), piece))
            data += shard.numpy().tobytes()
        found = arranged(placed, shape)
    path.write_bytes(data)
    entry = TensorEntry(path.name, BY_NAME["int32"], shape, lambda: found)
    prove_tiling(entry)
    return entry


def divisor(number: int, random: Random) -> int:
    return random.choice([n for n in range(1, number + 1) if number % n == 0])


def step(full: torch.Tensor, view: View, other: tuple[torch.Tensor, View], random: Random) -> tuple[torch.Tensor, View]:
    """Apply one operation to the tensor and to the view."""
    dim, rows = random.randrange(full.ndim), full.shape[0]
    match random.choice(["narrow", "cat", "stack", "transpose", "interleave", "unsqueeze", "squeeze"]):
        case "narrow":
            start = random.randrange(full.shape[dim])
            length = random.randrange(1, full.shape[dim] - start + 1)
            return full.narrow(dim, start, length), view.narrow(dim, start, length)
        case "cat" if full.shape == other[0].shape:
            return torch.cat([full, other[0]], dim), View.cat([view, other[1]], dim)
        case "stack" if full.shape == other[0].shape:
            return torch.stack([full, other[0]], dim), View.stack([view, other[1]], dim)
        case "transpose":
            return full.transpose(0, dim), view.transpose(0, dim)
        case "interleave":
            groups = divisor(rows, random)
            blocks = divisor(rows // groups, random)
            ordered = full.reshape(blocks, groups, -1, *full.shape[1:]).transpose(1, 2).reshape(full.shape)
            return ordered, view.interleave(groups, blocks)
        case "unsqueeze":
            return full.unsqueeze(dim), view.unsqueeze(dim)
        case "squeeze" if full.ndim > 1:
            return full.squeeze(dim), view.squeeze(dim)
    return full, view


@pytest.mark.parametrize("seed", range(4))
def test_views_are_what_torch_makes_of_the_tensors(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patched, "MAX_STRIDED_BYTES", 64)
    random = Random(seed)
    for number in range(60):
        shape = [random.choice([1, 2, 4, 8]), random.choice([4, 8, 12]), random.choice([2, 3, 5])]
        shape = shape[random.randrange(2) :]
        fulls = [torch.randint(1 << 30, shape, dtype=torch.int32) for _ in range(2)]
        views = [View.of(saved(f, tmp_path / f"{number}-{i}", random)) for i, f in enumerate(fulls)]
        full, view = fulls[0], views[0]
        for _ in range(random.randrange(1, 5)):
            full, view = step(full, view, (fulls[1], views[1]), random)
        assert tuple(view.shape) == tuple(full.shape)
        entry = entry_of(view, "made")
        prove_tiling(entry)
        assert torch.equal(load_tensors([entry])["made"], full)
        assert torch.equal(entry.read(), full)


def stored(name: str, dtype: str, shape: Sequence[int]) -> TensorEntry:
    numel = math.prod(shape)
    record = Record(Path(name), 0, numel * BY_NAME[dtype].itemsize)
    piece = Piece(Extent(record, 0, record.nbytes), 0, numel)
    return TensorEntry(name, BY_NAME[dtype], tuple(shape), lambda: (piece,))


def test_what_does_not_fit_together_is_refused() -> None:
    one, other = View.of(stored("a", "float32", (4, 2))), View.of(stored("b", "bfloat16", (4, 2)))
    with pytest.raises(MalformedError, match="'a' is of float32 and 'b' of bfloat16; both are parts of 'c'"):
        entry_of(View.cat([one, other]), "c")
    with pytest.raises(InconsistentCheckpointError, match=r"tensor 'c': a hole at element \[4, 0\]"):
        entry_of(View((6, 2), one.patches), "c")
    with pytest.raises(ValueError, match="4 rows cannot be divided into 1 blocks of 3 groups"):
        one.interleave(3)
    with pytest.raises(ValueError, match="cannot join shapes"):
        View.cat([one, View.of(stored("d", "float32", (4, 3)))])
