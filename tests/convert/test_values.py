"""Compare ``inspect --values``, and what a merge notices on the way, with torch's own counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.transfer.nonfinite import count_nonfinite, sample_nonfinite
from dsconv.convert.values import values_of
from tests.cli.running import dsconv as command
from tests.trained import Trained, raw

CASE = "llama_groups-z2-bf16-w2"


def test_the_values_of_weights_and_states(copied: Callable[[str], Path]) -> None:
    """Two of a ZeRO-2 run's shards hold the same bytes, and one value of a state is NaN."""
    folder = copied(CASE)
    checkpoint = dsconv.open_checkpoint(folder)
    assert checkpoint.training is not None
    state = next(of["exp_avg"] for name, of in checkpoint.training().states.items() if "q_proj" in name)
    pieces = [p for entry in checkpoint.values() if entry.role == "parameter" for p in entry.pieces]
    one, other = next((a, b) for a in pieces for b in pieces if a is not b and a.extent.nbytes == b.extent.nbytes > 200)
    with one.extent.record.path.open("rb") as file:
        file.seek(one.extent.offset_bytes)
        data = file.read(one.extent.nbytes)
    for extent, put in ((other.extent, data), (state.pieces[0].extent, b"\0\0\xc0\x7f")):
        with extent.record.path.open("r+b") as file:
            file.seek(extent.offset_bytes)
            file.write(put)
    report = values_of(folder)
    assert [v.name for v in report.tensors if v.nonfinite] == [state.name]
    assert len(report.repeated) == 1
    assert len(report.repeated[0]) == 2
    entries = {entry.name: entry for entry in dsconv.open_checkpoint(folder).values()}
    assert len(report.tensors) == 3 * len(entries)
    for values in report.tensors[: len(entries)]:
        tensor = entries[values.name].read().double()
        assert (values.numel, values.zeros) == (tensor.numel(), int((tensor == 0).sum()))
        assert values.norm == pytest.approx(float(tensor.norm()))
        assert values.largest == float(tensor.abs().max())
    shown = command("inspect", folder, "--values")
    assert shown.code == 0
    assert f"exp_avg: 1 NaN and 0 infinite values, in 1 of {len(entries)} tensors" in shown.out
    assert "Problem: the same bytes lie in " in shown.out


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_nonfinite_values_are_counted(name: str) -> None:
    dtype = getattr(torch, name)
    size = 8 * torch.finfo(dtype).bits // 64
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (10_000,), dtype=kind)
    bits |= 0x7F00 << (8 * size - 16)  # large exponents make many of these values non-finite
    data = memoryview(raw(bits.view(dtype)))
    assert count_nonfinite(data, BY_NAME[name]) == int((~bits.view(dtype).isfinite()).sum()) > 0
    finite = torch.randn(1_000, dtype=dtype)
    assert count_nonfinite(memoryview(raw(finite)), BY_NAME[name]) == 0
    assert sample_nonfinite(memoryview(raw(finite)), BY_NAME[name]) == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert sample_nonfinite(memoryview(raw(torch.full((777,), bad, dtype=dtype))), BY_NAME[name]) > 0


def test_a_merge_warns_of_values_that_are_not_finite(tmp_path: Path) -> None:
    model = {"good": torch.randn(500, 100), "bad": torch.randn(500, 100)}
    model["bad"][3:400] = float("nan")
    model["bad"][0, 0] = -float("inf")
    (tmp_path / "model").mkdir()
    save_file(model, tmp_path / "model" / "model.safetensors")
    report = dsconv.merge(tmp_path / "model", tmp_path / "cast", dtype="bf16", fsync=False)
    assert report.nonfinite == {"bad": 397 * 100 + 1}  # each value of a tensor that is cast is checked
    assert "NaN or infinite values lie in 1 of 2 tensors, first in 'bad'" in report.warnings[0]
    report = dsconv.merge(tmp_path / "model", tmp_path / "copied", fsync=False)
    assert list(report.nonfinite) == ["bad"]  # only a sample of a copied tensor is checked
    assert dsconv.merge(tmp_path / "model", tmp_path / "some", include=["good"], fsync=False).nonfinite == {}


def test_no_optimizer_and_dtypes_that_are_no_numbers(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    save_file({"a": torch.zeros(70), "b": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    report = values_of(tmp_path)
    assert [(v.name, v.zeros) for v in report.tensors] == [("a", 70)]
    assert report.repeated == []
    assert report.not_read == {"b": "float8_e4m3fn is not read as numbers"}
    assert report.no_optimizer
