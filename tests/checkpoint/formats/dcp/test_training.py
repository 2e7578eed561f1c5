"""The optimizers of real DCP directories: every state as torch's own reader gives it, and what is refused by name."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dsconv
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.errors import InconsistentCheckpointError, MissingShardError, UnsupportedError
from tests.fixtures.dcp import STEP
from tests.fixtures.gloo import DATA, ensure
from tests.trained import same

TITAN = DATA / "torchtitan" / "llama3-full" / "ckpt" / "step-2"
# Where the optimizer of each case lies, and the keys that lead to it.
CASES = {
    "fsdp2-w3": (".", ("optim",)),
    "fsdp2-w4": (".", ("optim",)),
    "hsdp-w4": (".", ("app", "optim")),
    "titan-w3": ("step-10", ("optimizer",)),
    "accelerate-w3": (f"checkpoint-{STEP}/optimizer_0", ("optimizer",)),
    "trainer-w2": ("checkpoint-1/optimizer_0", ("optimizer",)),
}


def opened(path: Path) -> Training:
    """The optimizer of a checkpoint."""
    checkpoint = dsconv.open_checkpoint(path)
    assert checkpoint.training is not None, checkpoint.no_training
    return checkpoint.training()


@functools.cache
def by_torch(folder: Path) -> dict[str, Any]:
    """All that a DCP directory holds, read by torch."""
    target = folder.parent / f"{folder.name}-{ensure.__name__}.pt"
    try:
        dcp_to_torch_save(folder, target)
        found: dict[str, Any] = torch.load(target, weights_only=False)
    finally:
        target.unlink(missing_ok=True)
    return found


def expected(folder: Path, keys: tuple[str, ...]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The states by parameter, and the groups with their parameters, as torch reads them."""
    found = by_torch(folder)
    for key in keys:
        found = found[key]
    if "state" in found:
        return found["state"], found["param_groups"]
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        kind, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        (states if kind == "state" else groups).setdefault(name, {})[last] = value
    first = next(iter(groups.values()))
    assert all(group == first for group in groups.values())
    return states, [{**first, "params": list(groups)}]


def number(value: Any) -> Any:
    return value.number if isinstance(value, SmallTensor) else value


@pytest.mark.parametrize("name", CASES)
def test_every_state_step_and_group_is_as_torch_reads_it(name: str) -> None:
    where, keys = CASES[name]
    folder = ensure("dcp")[name] / "ckpt"
    training = opened(folder)
    states, groups = expected(folder / where, keys)
    assert set(training.states) == set(states)
    for parameter, kept in states.items():
        assert set(training.states[parameter]) == set(kept) - {"step"}
        for state, entry in training.states[parameter].items():
            assert entry.name == f"{parameter}/{state}"
            assert same(entry.read(), kept[state]), entry.name
        step = training.steps[parameter]
        assert isinstance(step, SmallTensor)
        assert same(torch.frombuffer(bytearray(step.data), dtype=torch.float32).reshape(()), kept["step"])
    assert len(training.param_groups) == len(groups)
    for mine, theirs, members in zip(training.param_groups, groups, training.members, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        assert list(members) == theirs["params"]
    assert (training.left_out, training.model_files, training.deepspeed_version) == ((), (), None)
    assert set(training.module) == set(dsconv.open_checkpoint(folder)) - set(states)


def test_counters_and_schedules_come_along() -> None:
    folders = ensure("dcp")
    found = opened(folders["fsdp2-w3"] / "ckpt").counters()
    state = by_torch(folders["fsdp2-w3"] / "ckpt")["lr_scheduler"]
    assert found == {
        "global_steps": STEP,
        "skipped_steps": 0,
        "lr_scheduler": {**state, "last_batch_iteration": state["last_epoch"] - 1},
    }
    assert opened(folders["titan-w3"] / "ckpt").counters()["global_steps"] == 10
    assert opened(folders["accelerate-w3"] / "ckpt").counters() == {"global_steps": STEP, "skipped_steps": 0}
    of_trainer = opened(folders["trainer-w2"] / "ckpt").counters()
    assert (of_trainer["global_steps"], of_trainer["lr_scheduler"]["last_batch_iteration"]) == (1, 0)


def fused(states: dict[str, Any], name: str) -> dict[str, Tensor]:
    """A state of torchtitan's fused weight, cut as ``FusedQKVLinear._split_qkv_on_save`` cuts the weight: 2 key-value
    heads of 4 rows, with 2 query heads each.
    """
    cut = states[name].reshape(2, 4, 4, -1)
    parts = {"wq": cut[:, :2], "wk": cut[:, 2], "wv": cut[:, 3]}
    return {key: part.reshape(-1, cut.shape[-1]) for key, part in parts.items()}


def test_torchtitans_fused_states_are_cut_as_its_weights_are(tmp_path: Path) -> None:
    folder = shutil.copytree(TITAN, tmp_path / "step-2")
    with pytest.raises(UnsupportedError, match=r"wqkv.weight' are those .* no config.json .* num_attention_heads"):
        opened(folder)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    training = opened(folder)
    states, _ = expected(TITAN, ("optimizer",))
    checkpoint = dsconv.open_checkpoint(folder)
    assert set(training.states) == set(checkpoint)
    name = "layers.0.attention.qkv_linear."
    for state in ("exp_avg", "exp_avg_sq"):
        for part, tensor in fused(states[f"{name}wqkv.weight"], state).items():
            assert same(training.states[f"{name}{part}.weight"][state].read(), tensor)
    assert same(training.states["norm.weight"]["exp_avg"].read(), states["norm.weight"]["exp_avg"])
    assert {number(step) for step in training.steps.values()} == {2.0}
    assert sorted(parameter for group in training.members for parameter in group) == sorted(checkpoint)
    assert training.counters()["global_steps"] == 2
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 1}))
    with pytest.raises(InconsistentCheckpointError, match="no heads of 16 rows"):
        opened(folder)


def model() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"a.weight": torch.randn(4, 3), "b.state.weight": torch.randn(2, 5), "scale": torch.randn(1)}


def adam(weights: dict[str, Tensor], steps: float = 3.0, **more: Any) -> dict[str, Any]:
    """What Adam keeps of some weights; ``more`` are further states, made of each weight."""
    return {
        name: {
            "step": torch.tensor(steps),
            "exp_avg": torch.randn_like(weight),
            "exp_avg_sq": torch.rand_like(weight),
            **{key: make(weight) for key, make in more.items()},
        }
        for name, weight in weights.items()
    }


def saved(folder: Path, **state: Any) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def listed(*groups: list[str]) -> list[dict[str, Any]]:
    return [{"lr": 0.1 * (n + 1), "betas": (0.9, 0.99), "params": names} for n, names in enumerate(groups)]


def flat(states: dict[str, Any], settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``flatten_optimizer_state_dict``."""
    found = {f"state.{name}.{key}": value for name, of in states.items() for key, value in of.items()}
    return found | {f"param_groups.{name}.{key}": value for name, of in settings.items() for key, value in of.items()}


def test_groups_of_parameters_that_share_their_settings(tmp_path: Path) -> None:
    weights = model()
    states = adam(weights)
    settings = {name: {"lr": 0.1, "weight_decay": 0.0 if name == "scale" else 0.5} for name in weights}
    training = opened(saved(tmp_path / "ckpt", model=weights, optim=flat(states, settings)))
    assert training.members == (("a.weight", "b.state.weight"), ("scale",))
    assert [group["weight_decay"] for group in training.param_groups] == [0.5, 0.0]
    assert "2 parameter groups were made" in training.warnings[0]
    for name, kept in states.items():
        assert all(same(training.states[name][key].read(), kept[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_weights_that_were_not_trained_are_told_from_those_without_states(tmp_path: Path) -> None:
    """A frozen weight is in no group, one that never had a gradient is in one; integers are buffers."""
    weights = model() | {"frozen": torch.randn(2, 2), "idle": torch.randn(2, 2), "count": torch.tensor([1, 2])}
    optim = {"state": adam(model()), "param_groups": listed(["a.weight", "idle"], ["b.state.weight", "scale"])}
    training = opened(saved(tmp_path / "ckpt", model=weights, optim=optim))
    assert training.members == (("a.weight", "idle"), ("b.state.weight", "scale"))
    assert training.states["idle"] == {}
    assert {name: entry.role for name, entry in training.module.items()} == {"frozen": "frozen", "count": "buffer"}


def test_states_that_are_not_of_one_value_a_weight_are_named(tmp_path: Path) -> None:
    states = adam(model(), mu_product=lambda _: torch.tensor(0.5))
    optim = {"state": states, "param_groups": listed(list(states))}
    training = opened(saved(tmp_path / "ckpt", model=model(), optim=optim))
    assert training.left_out == ("mu_product",)
    assert "'mu_product' is not of one value a weight" in training.warnings[0]
    assert set(training.states["scale"]) == {"exp_avg", "exp_avg_sq"}


def test_an_optimizer_without_settings(tmp_path: Path) -> None:
    """dsconv's engine keeps them among the options of the run."""
    states = adam(model())
    training = opened(saved(tmp_path / "ckpt", model=model(), optimizer=flat(states, {})))
    assert (training.param_groups, training.members) == ([{}], (tuple(model()),))
    assert "saved without its hyperparameters" in training.warnings[0]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"ema": model()}, "nothing tells whether 'optim' trained the model 'actor' or 'ema'"),
        ({"optim2": {"state": adam(model()), "param_groups": listed(list(model()))}}, "several optimizers"),
    ],
)
def test_an_optimizer_that_may_be_anothers_is_refused(state: dict[str, Any], words: str, tmp_path: Path) -> None:
    optim = {"state": adam(model()), "param_groups": listed(list(model()))}
    saved(tmp_path / "ckpt", actor=model(), optim=optim, **state)
    item = "actor" if "ema" in state else None
    checkpoint = dsconv.open_checkpoint(tmp_path / "ckpt", item=item)
    assert checkpoint.training is not None
    with pytest.raises(UnsupportedError, match=words):
        checkpoint.training()


def test_the_optimizer_beside_the_model_is_its_own(tmp_path: Path) -> None:
    def side(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return {"model": model(), "optim": {"state": adam(model(), seed), "param_groups": listed(list(model()))}}

    saved(tmp_path / "ckpt", actor=side(4), critic=side(5))
    checkpoint = dsconv.open_checkpoint(tmp_path / "ckpt", item="critic.model")
    assert checkpoint.training is not None
    assert {number(step) for step in checkpoint.training().steps.values()} == {5.0}


def test_states_of_unknown_parameters_and_lost_files_are_named(tmp_path: Path) -> None:
    other = adam({"c.weight": torch.randn(2, 2)})
    optim = {"state": adam(model()) | other, "param_groups": listed([*model(), "c.weight"])}
    saved(tmp_path / "ckpt", model=model(), optim=optim)
    with pytest.raises(UnsupportedError, match=r"'optim' holds states of 'c.weight', and the model has no such"):
        opened(tmp_path / "ckpt")
    folder = shutil.copytree(ensure("dcp")["accelerate-w3"] / "ckpt", tmp_path / "run")
    (folder / f"checkpoint-{STEP}" / "optimizer_0" / "__2_0.distcp").unlink()
    with pytest.raises(MissingShardError, match=r"optimizer_0 lacks 1 file .* '__2_0.distcp'"):
        opened(folder)


def test_why_there_is_no_optimizer(tmp_path: Path) -> None:
    assert dsconv.open_checkpoint(saved(tmp_path / "a", model=model())).no_training == "it holds no optimizer states"
    pair = {f"exp_avg.{k}": torch.rand(4, 3) for k in ("x", "y")} | {f"exp_avg_sq.{k}": torch.rand(4, 3) for k in "xy"}
    pair |= {"step": torch.tensor(1.0)}
    checkpoint = dsconv.open_checkpoint(saved(tmp_path / "b", model=model(), optimizer=pair))
    assert checkpoint.training is None
    assert "in a form that dsconv does not read" in checkpoint.no_training
