"""An optimizer's states are recognised by their structure: beside weights they are left out, alone they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import dsconv
from dsconv.errors import UnsupportedError

SHAPES = {"fc.weight": (4, 3), "fc.bias": (4,)}
ADAM = ("exp_avg", "exp_avg_sq")


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def states(*slots: str, slot_first: bool = False) -> dict[str, torch.Tensor]:
    """Return the states of each parameter in one dictionary, without ``step``."""
    return {
        f"{slot}.{name}" if slot_first else f"{name}.{slot}": torch.randn(shape)
        for slot in slots
        for name, shape in SHAPES.items()
    }


FLAT: dict[str, dict[str, torch.Tensor]] = {
    "adam": states(*ADAM),
    "adam-slot-first": states(*ADAM, slot_first=True),
    "adam-by-number": {f"state.{i}.{slot}": torch.randn(4, 3) for slot in ADAM for i in range(2)},
    "lion": states("exp_avg"),
    "sgd": states("momentum_buffer"),
    "adagrad": states("sum"),
}  # fmt: skip
NESTED: dict[str, Any] = {
    "by-number": {i: {slot: torch.randn(shape) for slot in ADAM} for i, shape in enumerate(SHAPES.values())},
    "by-name": {name: {slot: torch.randn(shape) for slot in ADAM} for name, shape in SHAPES.items()},
    "by-slot": {slot: weights() for slot in ADAM},
    "adagrad": {name: {"sum": torch.randn(shape)} for name, shape in SHAPES.items()},
    "under-a-key": {"optimizer": states(*ADAM)},
}


@pytest.mark.parametrize("kind", FLAT)
def test_states_alone_are_no_model(kind: str, tmp_path: Path) -> None:
    save_file(FLAT[kind], tmp_path / "a.safetensors")
    torch.save(FLAT[kind], tmp_path / "a.pt")
    dcp.save(FLAT[kind], checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name in ("a.safetensors", "a.pt", "dcp"):
        with pytest.raises(UnsupportedError, match=r"no tensor of a model; it holds .*, all of it an optimizer's"):
            dsconv.merge(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", NESTED)
def test_nested_states_alone_are_no_model(kind: str, tmp_path: Path) -> None:
    torch.save(NESTED[kind], tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="all of it an optimizer's"):
        dsconv.open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["adam", "adam-slot-first", "lion", "sgd", "adagrad"])
def test_states_beside_their_parameters_are_left_out_by_name(kind: str, tmp_path: Path) -> None:
    model = weights()
    save_file({**model, **FLAT[kind]}, tmp_path / "a.safetensors")
    torch.save({**model, **FLAT[kind]}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        report = dsconv.merge(tmp_path / name, tmp_path / "out", force=True)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == model.keys()
        assert all(torch.equal(found[name], model[name]) for name in model)
        assert sum(report.left_out.values()) == len(FLAT[kind])
        assert any("for an optimizer's" in warning for warning in report.warnings)


def smoother() -> nn.Module:
    """Return a module with the names that optimizers use."""
    made = nn.ModuleDict({"fc": nn.Linear(3, 4), "sum": nn.Linear(3, 3), "momentum_buffer": nn.Linear(2, 2)})
    for name in ADAM:
        made.register_buffer(name, torch.randn(7))
    return made


def test_a_module_may_have_such_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": smoother(), "b": smoother()})
    quantized = {"a.fc.weight.absmax": torch.randn(4), "a.fc.weight.quant_map": torch.randn(16)}
    state_dict = {**model.state_dict(), **quantized}
    torch.save(state_dict, tmp_path / "a.pt")
    save_file(state_dict, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert set(dsconv.open_checkpoint(tmp_path / name)) == set(state_dict)
