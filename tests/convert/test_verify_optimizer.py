"""``verify --optimizer``: equal training states in any two formats, and each kind of difference by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import dsconv
from dsconv.errors import UnsupportedError
from tests.cli.running import dsconv as command
from tests.fixtures import gloo

SOURCES = (
    "llama_groups-z2-bf16-w2",
    "llama_groups-z3-bf16-w2-subgroups",
    "odd-z0-fp32-w2",
    "llama_tied-z1-bf16-w2-amsgrad",
)


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_is_equal_in_every_format(name: str, tmp_path: Path) -> None:
    """ZeRO, universal, DCP of torch's API, and a universal checkpoint of that."""
    source = gloo.ensure("universal")[name] / "ckpt"
    dsconv.to_universal(source, tmp_path / "universal", fsync=False)
    dsconv.to_dcp(source, tmp_path / "dcp", optimizer=True, fsync=False)
    dsconv.to_universal(tmp_path / "dcp", tmp_path / "again", fsync=False)
    training = dsconv.open_checkpoint(source).training
    assert training is not None
    count = sum(1 for of in training().states.values() for entry in of.values() if entry.numel)
    forms = [source, tmp_path / "universal", tmp_path / "dcp", tmp_path / "again"]
    for one, two in ((0, 1), (0, 2), (2, 3), (3, 1), (2, 0)):
        report = dsconv.verify(forms[one], forms[two], optimizer=True)
        assert report.equal, (one, two, report.summary())
        assert report.states == count


def adam() -> dict[str, Any]:
    torch.manual_seed(2)
    weights = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    states = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w)}
        for name, w in weights.items()
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None, "params": [name]} for name in weights]
    return {"model": weights, "optim": {"state": states, "param_groups": groups}}


def states(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = state["optim"]["state"]
    return found


def one_value(state: dict[str, Any]) -> None:
    states(state)["a"]["exp_avg"][1, 2] += 1


def a_step(state: dict[str, Any]) -> None:
    states(state)["b"]["step"] += 1


def a_rate(state: dict[str, Any]) -> None:
    state["optim"]["param_groups"][1]["lr"] = 0.2


def no_betas(state: dict[str, Any]) -> None:
    for group in state["optim"]["param_groups"]:
        del group["betas"]


def a_state_less(state: dict[str, Any]) -> None:
    del states(state)["b"]["exp_avg_sq"]


def swapped(state: dict[str, Any]) -> None:
    kept = states(state)["a"]
    kept["exp_avg"], kept["exp_avg_sq"] = kept["exp_avg_sq"], kept["exp_avg"]


def quantized(state: dict[str, Any]) -> None:
    states(state)["a"]["state1"] = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_value, ["a/exp_avg: first differs at element [1, 2]"]),
        (swapped, ["a/exp_avg: first differs", "a/exp_avg_sq: first differs"]),
        (a_step, ["b/step: 3.0 and 4.0"]),
        (a_rate, ["b: lr: 0.1 and 0.2"]),
        (no_betas, ["a: betas: (0.9, 0.99) and absent"]),
        (a_state_less, ["b/exp_avg_sq: only in"]),
        (quantized, ["state1: not of one value a weight in"]),
    ],
)
def test_each_difference_is_named(
    change: Callable[[dict[str, Any]], None], expected: list[str], tmp_path: Path
) -> None:
    other = copy.deepcopy(adam())
    change(other)
    for name, state in (("one", adam()), ("two", other)):
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    assert dsconv.verify(tmp_path / "one", tmp_path / "two").equal
    report = dsconv.verify(tmp_path / "one", tmp_path / "two", optimizer=True)
    assert len(report.differences) == len(expected), report.summary()
    for difference, text in zip(report.differences, expected, strict=True):
        assert str(difference).startswith(text)


def test_how_a_step_is_computed_is_no_difference(tmp_path: Path) -> None:
    """torchtitan's flat keys have the settings of each parameter; fused and foreach change no result."""
    state = adam()
    optim = state["optim"]
    flat = {f"state.{name}.{key}": value for name, of in states(state).items() for key, value in of.items()}
    flat |= {
        f"param_groups.{group['params'][0]}.{key}": value
        for group in optim["param_groups"]
        for key, value in {**group, "foreach": True, "amsgrad": False}.items()
        if key != "params"
    }
    dcp.save(state, checkpoint_id=tmp_path / "one", no_dist=True)
    dcp.save({"model": state["model"], "optim": flat}, checkpoint_id=tmp_path / "two", no_dist=True)
    shown = command("verify", tmp_path / "one", tmp_path / "two", "--optimizer")
    assert (shown.code, shown.out.split(",")[0]) == (0, "equal: 2 tensors and 4 optimizer states")
    a_step(state)
    dcp.save(state, checkpoint_id=tmp_path / "three", no_dist=True)
    shown = command("verify", tmp_path / "two", tmp_path / "three", "--optimizer")
    assert (shown.code, shown.out.strip()) == (5, "b/step: 3.0 and 4.0")


def test_a_side_without_an_optimizer_is_an_error(tmp_path: Path) -> None:
    dcp.save(adam(), checkpoint_id=tmp_path / "one", no_dist=True)
    dcp.save({"model": adam()["model"]}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(UnsupportedError, match="it holds no optimizer states"):
        dsconv.verify(tmp_path / "one", tmp_path / "two", optimizer=True)
