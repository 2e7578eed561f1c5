"""Compare filling slots with torch's own indexing: any pieces, patches and parts of the tensor, with each byte read
once.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.patches import Patch, whole
from dsconv.checkpoint.map.regions import Region
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer import fill as filling
from dsconv.checkpoint.transfer.fill import Filling, Slot, reads_of
from dsconv.checkpoint.transfer.reading import tensor_bytes
from tests.checkpoint.map.test_regions import cut, picked, shapes_and_regions
from tests.trained import same


def saved(full: torch.Tensor, name: str, data: st.DataObject, folder: pytest.TempPathFactory) -> TensorEntry:
    """Return an entry whose pieces, made by cutting boxes in two, lie in separate files."""
    where = folder.mktemp("fill")
    pieces = []
    for number, region in enumerate(cut(tuple(full.shape), data)):
        torch.save(picked(full, region), where / f"{number}.pt")
        file = TorchFile(where / f"{number}.pt")
        split = data.draw(st.integers(0, file.root.numel))
        for low, high in ((0, split), (split, file.root.numel)):
            if low < high:
                pieces.append(Piece(file.extent(file.root, low, high - low), low, high - low, region=region))
    return TensorEntry(name, file.root.dtype, tuple(full.shape), lambda: tuple(pieces))


def fill(
    patches: list[Patch], shape: tuple[int, ...], region: Region | None, expected: torch.Tensor, data: st.DataObject
) -> Filling:
    """Fill a random range of the region, directly or through write(), and compare it with the same range of
    ``expected``.
    """
    start = data.draw(st.integers(0, expected.numel()))
    numel = data.draw(st.integers(0, expected.numel() - start))
    out = torch.zeros(numel, dtype=expected.dtype)
    memory = tensor_bytes(out) if numel else memoryview(bytearray())

    def write(view: memoryview, part: memoryview, offset: int) -> None:
        view[offset : offset + len(part)] = part

    direct = data.draw(st.booleans())
    slot = Slot(
        shape,
        BY_NAME[str(expected.dtype)[6:]],
        start,
        numel,
        partial(write, memory),
        memory if direct else None,
        region,
    )
    run = Filling(workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "BLOCK_BYTES", data.draw(st.sampled_from([16, 64, 1 << 20])))
        patch.setattr(filling, "SHORT_RUN_BYTES", data.draw(st.sampled_from([0, 16, 512])))
        run.run(reads_of(patches, slot))
    assert same(out, expected.flatten()[start : start + numel])
    return run


@settings(derandomize=True, deadline=None, max_examples=80)
@given(case=shapes_and_regions(), cast=st.booleans(), data=st.data())
def test_any_part_of_a_tensor(
    case: tuple[tuple[int, ...], Region], cast: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, region = case
    full = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    entry = saved(full, "w", data, tmp_path_factory)
    expected = picked(full, region) if data.draw(st.booleans()) else full
    fill(
        [whole(entry)], shape, region if expected is not full else None, expected.bfloat16() if cast else expected, data
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_tensors_joined_stacked_and_cut(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three experts with two projections each become one tensor, as transformers fuses them, and one tensor becomes
    two.
    """
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    tensors = [torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns) + 100 * i for i in range(6)]
    entries = [saved(tensor, str(i), data, tmp_path_factory) for i, tensor in enumerate(tensors)]
    fused = torch.cat([torch.stack(tensors[:3]), torch.stack(tensors[3:])], dim=1)
    patches = [
        Patch(entry, (0, 0), (i % 3, rows * (i // 3), 0), (1, rows, columns), (None, 0, 1))
        for i, entry in enumerate(entries)
    ]  # fmt: skip
    fill(patches, tuple(fused.shape), None, fused, data)
    half = rows // 2
    if half:
        part = [Patch(entries[0], (half, 0), (0, 0), (rows - half, columns), (0, 1))]
        fill(part, (rows - half, columns), None, tensors[0][half:].contiguous(), data)


def test_each_byte_is_read_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    full = torch.randn(64, 2048)
    folder = tmp_path_factory.mktemp("once")
    torch.save(full, folder / "w.pt")
    file = TorchFile(folder / "w.pt")
    entry = TensorEntry("w", file.root.dtype, (64, 2048), lambda: file.pieces(file.root))
    for region, expected in (
        (((16, 32),), full[16:32]),
        (((0, 64),), full[:, 1024:]),
        (None, full),
    ):
        columns = ((1024, 2048),) if expected.shape[1] == 1024 else ((0, 2048),)
        out = torch.empty(expected.shape)
        slot = Slot(
            (64, 2048),
            entry.dtype,
            0,
            out.numel(),
            partial(_never, 0),
            tensor_bytes(out),
            None if region is None else (region, columns),
        )
        run = Filling(workers=2)
        run.run(reads_of([whole(entry)], slot))
        assert same(out, expected.contiguous())
        assert run.bytes_read == out.numel() * 4


def _never(_: int, data: memoryview, offset: int) -> None:
    raise AssertionError("what needs no cast is read straight into its place")
