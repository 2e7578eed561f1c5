"""Items beside a model are judged by structure: integers are random states or indices, and floats may be a model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dsconv
from dsconv.errors import SeveralModelsError

MODEL = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8)


BESIDE: dict[str, Any] = {
    "rng": {"torch": torch.get_rng_state(), "cuda": random_bytes(8, 816)},
    "rng_states": [{"torch": torch.get_rng_state(), "cuda": random_bytes(2, 816)} for _ in range(2)],
    "numpy": {"keys": torch.randint(0, 1 << 31, (2, 624)), "python": random.getstate()},
    "dataloader": {"indices": torch.arange(100).view(10, 10), "epoch": 3},
    "masks": {"fc.weight": torch.ones(4, 3, dtype=torch.bool)},
}


def saved(state_dict: dict[str, Any], folder: Path) -> list[Path]:
    torch.save(state_dict, folder / "a.pt")
    dcp.save(state_dict, checkpoint_id=folder / "dcp", no_dist=True)
    return [folder / "a.pt", folder / "dcp"]


@pytest.mark.parametrize("key", BESIDE)
@pytest.mark.parametrize("bare", [False, True], ids=["under-a-key", "bare"])
def test_integers_beside_a_model_are_left_out_by_name(key: str, bare: bool, tmp_path: Path) -> None:
    for path in saved({**(MODEL if bare else {"model": MODEL}), key: BESIDE[key]}, tmp_path):
        checkpoint = dsconv.open_checkpoint(path)
        assert set(checkpoint) == set(MODEL)
        assert any(label.startswith(key) for label in checkpoint.info["left_out"])
        (warning,) = (w for w in checkpoint.warnings if "left out" in w)
        assert f"left out '{key}'" in warning
        assert "and holds integers" in warning


@pytest.mark.parametrize("key", ["rng", "dataloader", "rng_states"])
def test_floats_under_such_a_name_may_be_a_model(key: str, tmp_path: Path) -> None:
    for path in saved({"model": MODEL, key: {"fc.weight": torch.randn(4, 3), "count": random_bytes(2, 2)}}, tmp_path):
        with pytest.raises(SeveralModelsError) as caught:
            dsconv.open_checkpoint(path)
        assert caught.value.models.keys() == {"model", key}
        assert set(dsconv.open_checkpoint(path, item=key)) == {"fc.weight", "count"}


@pytest.mark.parametrize("key", ["rng", "dataloader"])
def test_a_module_of_such_a_name_keeps_its_weights(key: str, tmp_path: Path) -> None:
    bare = {f"{key}.weight": torch.randn(4, 3), f"{key}.index": random_bytes(8, 816), "fc.weight": torch.randn(2, 2)}
    for path in saved(bare, tmp_path):
        assert set(dsconv.open_checkpoint(path)) == set(bare)


def test_integers_of_a_module_that_was_saved_nested_are_not_dropped(tmp_path: Path) -> None:
    nested = {"embed": {"position_ids": torch.arange(8).view(2, 4)}, "fc": {"weight": torch.randn(4, 3)}}
    torch.save(nested, tmp_path / "a.pt")
    with pytest.raises(SeveralModelsError):
        dsconv.open_checkpoint(tmp_path / "a.pt")


def test_a_model_of_integers_alone_is_one(tmp_path: Path) -> None:
    packed = {"fc.qweight": random_bytes(4, 3), "fc.zeros": torch.zeros(4, dtype=torch.int32)}
    for path in saved({"model": packed}, tmp_path):
        assert set(dsconv.open_checkpoint(path)) == set(packed)
