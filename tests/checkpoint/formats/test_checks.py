"""Hollow files are refused, and the names of wrappers are removed, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

import dsconv
from dsconv.errors import MalformedError

HOLLOW = {f"layers.{i}.{name}": torch.empty(0) for i in range(3) for name in ("q.weight", "k.weight")}
FORMS = ["bin", "nested pt", "safetensors", "dcp", "rank files"]


def write(form: str, folder: Path, state: dict[str, Tensor]) -> Path:
    """Save ``state`` in one of the forms, and return the path that a user would name."""
    folder.mkdir(exist_ok=True)
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "nested pt":
        torch.save({"model": state, "epoch": 3}, folder / "last.pt")
        return folder / "last.pt"
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form == "dcp":
        dcp.save({"model": state}, checkpoint_id=folder / "dcp", no_dist=True)
        return folder / "dcp"
    else:
        for rank in (0, 1):
            torch.save(state, folder / f"rank_{rank}.pt")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_file_without_its_weights_is_refused(form: str, tmp_path: Path) -> None:
    """Under ZeRO-3 ``state_dict()`` has empty tensors, except for norms below the persistence threshold."""
    kept: dict[str, Any] = {f"layers.{i}.norm.{name}": torch.ones(4) for i in range(3) for name in ("weight", "bias")}
    path = write(form, tmp_path / "out", HOLLOW | kept)
    with pytest.raises(MalformedError, match=r"6 of 12 tensors are empty \(shape \[0\]\).*ZeRO-3 .*without gathering"):
        dsconv.open_checkpoint(path)
    real = (path.parent if form in ("dcp", "nested pt") else tmp_path) / "checkpoint-7"
    (real / "global_step7").mkdir(parents=True)
    (real / "latest").write_text("global_step7")
    with pytest.raises(MalformedError, match=f"DeepSpeed checkpoint beside it: give {real}$"):
        dsconv.open_checkpoint(path)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_tensor_among_many_is_only_a_warning(form: str, tmp_path: Path) -> None:
    state = {f"w{i}": torch.ones(3, 2) * i for i in range(9)} | {"none": torch.empty(0), "rows": torch.empty(0, 3)}
    found = dsconv.open_checkpoint(write(form, tmp_path / "out", state))
    assert len(found) == len(state)
    assert any("1 of 11 tensors are empty (shape [0]), the first 'none'" in warning for warning in found.warnings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("prefix", "removed"), [("_orig_mod.", ["_orig_mod."]), ("module._orig_mod.", ["_orig_mod.", "module."])]
)
def test_wrappers_names_are_taken_out(prefix: str, removed: list[str], form: str, tmp_path: Path) -> None:
    state = {f"{prefix}layers.{i}.weight": torch.ones(3, 2) * i for i in range(2)}
    found = dsconv.open_checkpoint(write(form, tmp_path / "out", state))
    assert set(found) == {"layers.0.weight", "layers.1.weight"}
    assert all(bool((found[f"layers.{i}.weight"].read() == i).all()) for i in range(2))
    assert [part for part in found.info["removed_prefixes"] if part != "model."] == removed
