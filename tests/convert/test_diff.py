"""``diff`` measures the same as numpy on the whole tensors, in any format, and reports what it could not compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from tests.cli.running import dsconv as command
from tests.trained import Trained


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def test_distances_are_those_of_the_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv.convert.diff.BLOCK_BYTES", 4096)  # many blocks
    torch.manual_seed(0)
    a = {f"layers.{i}.{name}.weight": torch.randn(70, 31) for i in range(2) for name in ("up", "down")}
    a["norm.weight"] = torch.ones(31)
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["layers.0.up.weight"] += 0.25 * torch.randn(70, 31)
    b["layers.1.down.weight"][3, 5] = 9.0
    report = dsconv.diff(folder(tmp_path / "a", a), folder(tmp_path / "b", b))
    assert [distance.name for distance in report.tensors][:2] == ["layers.0.up.weight", "layers.1.down.weight"]
    found = {distance.name: distance for distance in report.tensors}
    for name, distance in found.items():
        one, two = a[name].double(), b[name].double()
        change = two - one
        assert distance.numel == one.numel()
        assert distance.changed == int((change != 0).sum())
        assert distance.max_abs == change.abs().max()
        assert distance.max_relative == pytest.approx((change / one).abs().max().item(), rel=1e-12)
        assert distance.l2 == pytest.approx(change.norm().item(), rel=1e-12)
        assert distance.relative_l2 == pytest.approx((change.norm() / one.norm()).item(), rel=1e-12)
        cosine = torch.dot(one.flatten(), two.flatten()) / (one.norm() * two.norm())
        assert distance.cosine == pytest.approx(cosine.item(), rel=1e-12)
    layers = {distance.name: distance for distance in report.layers}
    assert set(layers) == {"layers.0", "layers.1", "norm.weight"}
    assert (layers["layers.1"].changed, layers["layers.1"].numel) == (1, 2 * 70 * 31)
    assert layers["norm.weight"].relative_l2 == 0
    assert not report.equal
    assert dsconv.diff(tmp_path / "a", tmp_path / "a").equal


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    nan = float("nan")
    a = {"w": torch.tensor([1.0, nan, 0.0, 2.0]), "s": torch.zeros(2, 3), "gone": torch.zeros(1), "n": torch.arange(4)}
    b = {"w": torch.tensor([1.0, nan, 0.0, nan]), "s": torch.zeros(3, 2), "new": torch.zeros(1), "n": torch.arange(4)}
    b["n"][3] = 7
    report = dsconv.diff(folder(tmp_path / "a", a), folder(tmp_path / "b", b))
    assert (report.only_in_a, report.only_in_b) == (["gone"], ["new"])
    assert report.not_compared == {"s": "shape [2, 3] and [3, 2]"}
    found = {distance.name: distance for distance in report.tensors}
    assert found["w"].changed == 1, "a NaN that stays is no change"
    assert found["w"].max_abs == float("inf")
    assert (found["n"].changed, found["n"].max_abs, found["n"].max_relative) == (1, 4, 4 / 3)
    shown = command("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert not shown.code
    data = json.loads(shown.out)
    assert [row["max_abs"] for row in data["tensors"] if row["name"] == "w"] == [None], "JSON has no infinity"
    assert data["not_compared"] == report.not_compared


def test_a_trained_checkpoint_and_its_cast(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source = trained("gpt2-z3-bf16-w2").checkpoint
    dsconv.merge(source, tmp_path / "out", dtype="bf16", fsync=False)
    report = dsconv.diff(source, tmp_path / "out")
    assert report.tensors
    assert all(distance.max_relative <= 2**-8 for distance in report.tensors), "half a unit of bfloat16's last place"
    shown = command("diff", source, tmp_path / "out")
    assert not shown.code
    assert "rel L2" in shown.out
    assert report.tensors[0].name in shown.out
