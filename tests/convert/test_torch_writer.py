"""torch, the standard library and dsconv's own strict reader read the same from the .pt files that dsconv writes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsconv.checkpoint.map.dtypes import BY_NAME, STORAGE_CLASSES
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import Instance, TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.convert.pickling import MAX_DEPTH
from dsconv.convert.torch_writer import FULL32, Streamed, TorchArchive
from dsconv.errors import UnsupportedError
from tests.trained import raw, same


def write(path: Path, value: Any, streams: tuple[bytes, ...] = ()) -> Path:
    archive = TorchArchive(path.stem, value)
    with open(path, "wb") as file:
        file.truncate(archive.nbytes)
        for offset, data in zip(archive.streamed, streams, strict=True):
            file.seek(offset)
            file.write(data)
        for offset, data in archive.fixed([crc32(data) for data in streams]):
            file.seek(offset)
            file.write(data)
    assert path.stat().st_size == archive.nbytes
    return path


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (5,), (1, 7, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", sorted(STORAGE_CLASSES.values()))
def test_a_streamed_tensor_of_each_dtype(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
    path = write(tmp_path / "fp32.pt", {"cat_dim": 0, "param": Streamed(BY_NAME[dtype], shape)}, (raw(tensor),))
    for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
        found = torch.load(path, **options)
        assert found["cat_dim"] == 0
        assert same(found["param"], tensor)
        assert found["param"].is_contiguous()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    opened = TorchFile(path)
    assert opened.archive.root == "fp32"
    assert all(record.offset_bytes % 64 == 0 for record in opened.archive.records.values())
    ref = opened.root["param"]
    assert isinstance(ref, TensorRef)
    assert ref.shape == shape
    assert ref.dtype.name == dtype
    assert (opened.value(ref) if ref.numel else b"") == raw(tensor)


def test_several_tensors_of_both_kinds(tmp_path: Path) -> None:
    float32, int64 = BY_NAME["float32"], BY_NAME["int64"]
    value = [
        Streamed(float32, (2,)),
        SmallTensor(int64, (), struct.pack("<q", -3)),
        (Streamed(float32, (1,)), Streamed(float32, (1,))),
    ]
    path = write(tmp_path / "x.pt", value, tuple(struct.pack(f"<{n}f", *range(n)) for n in (2, 1, 1)))
    first, step, rest = torch.load(path, weights_only=True)
    assert first.tolist() == [0.0, 1.0]
    assert step.item() == -3
    assert [t.tolist() for t in rest] == [[0.0], [0.0]]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**300), 2**300) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(-5, 300), inner)
    ),
    max_leaves=20,
)


@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=PLAIN)
def test_plain_values(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.pt"
    path.write_bytes(TorchArchive("settings", value).whole())
    assert torch.load(path, weights_only=False) == value
    assert TorchFile(path).root == value


def test_objects_of_classes_and_dtypes(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    real = DynamicLossScaler(
        2**7, scale_window=5, min_scale=1, delayed_shift=1, consecutive_hysteresis=False, dtype=torch.float16
    )
    state = {k: v for k, v in vars(real).items() if k != "dtype"} | {"dtype": BY_NAME["float16"]}
    value = {"scaler": Instance("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", (), state)}
    path = tmp_path / "x.pt"
    path.write_bytes(TorchArchive("x", value).whole())
    found = torch.load(path, weights_only=False)["scaler"]
    assert type(found) is DynamicLossScaler
    assert vars(found) == vars(real)
    again = TorchFile(path).root["scaler"]
    assert again.get("cur_scale") == 2**7


@pytest.mark.parametrize("numel", [FULL32 // 4, FULL32 // 4 + 1, FULL32 // 4 + 100], ids=["below", "at", "above"])
def test_records_over_4_gib_are_zip64(numel: int, tmp_path: Path) -> None:
    """The file is sparse, and only the last elements are written."""
    archive = TorchArchive("big", {"param": Streamed(BY_NAME["float32"], (numel,))})
    path = tmp_path / "big.pt"
    with open(path, "wb") as file:
        file.truncate(archive.nbytes)
        file.seek(archive.streamed[0] + (numel - 2) * 4)
        file.write(struct.pack("<2f", 3.5, -1.0))
        for offset, data in archive.fixed([12345]):
            file.seek(offset)
            file.write(data)
    tensor = torch.load(path, mmap=True, weights_only=True)["param"]
    assert tensor.numel() == numel
    assert tensor[-2:].tolist() == [3.5, -1.0]
    with zipfile.ZipFile(path) as zipped:
        info = zipped.getinfo("big/data/0")
        assert (info.file_size, info.CRC) == (numel * 4, 12345)
    record = TorchFile(path).archive.records["data/0"]
    assert (record.offset_bytes, record.nbytes, record.crc32) == (archive.streamed[0], numel * 4, 12345)


def test_a_record_after_4_gib(tmp_path: Path) -> None:
    float32 = BY_NAME["float32"]
    archive = TorchArchive("two", [Streamed(float32, (FULL32 // 4 + 7,)), Streamed(float32, (2,))])
    path = tmp_path / "two.pt"
    with open(path, "wb") as file:
        file.truncate(archive.nbytes)
        file.seek(archive.streamed[1])
        file.write(struct.pack("<2f", 1.0, 2.0))
        for offset, data in archive.fixed([1, crc32(struct.pack("<2f", 1.0, 2.0))]):
            file.seek(offset)
            file.write(data)
    assert torch.load(path, mmap=True, weights_only=True)[1].tolist() == [1.0, 2.0]
    opened = TorchFile(path)
    assert opened.archive.records["data/1"].offset_bytes == archive.streamed[1]
    with zipfile.ZipFile(path) as zipped:
        assert zipped.read("two/data/1") == struct.pack("<2f", 1.0, 2.0)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def wide(levels: int) -> Any:
    """Return a value that is small in memory, but doubles with each level when it is written."""
    value: Any = "x" * 100
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        deep(MAX_DEPTH + 1),
        wide(40),
        1 << 3000,
        SmallTensor(BY_NAME["float8_e4m3fn"], (1,), b"x"),
    ],
    ids=["object", "set", "bytes", "deep", "wide", "integer", "fp8"],
)
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be written"):
        TorchArchive("x", {"value": value})
