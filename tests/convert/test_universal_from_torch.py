"""Real DeepSpeed goes on from FSDP2 runs that torch saved, with every bit of every state and the next step's loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dsconv
from dsconv.errors import UnsupportedError
from tests.cli.running import dsconv as command
from tests.fixtures import gloo
from tests.fixtures.universal_from_torch import SOURCES, Resume, Source, run
from tests.trained import Trained, load_safetensors, same

PLANS = [(source, world, stage) for source in SOURCES for world, stage in ((1, 1), (2, 2), (1, 3), (2, 3))]
# DeepSpeed sums the gradients of two ranks in another order than FSDP2 does.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Convert every source, resume from it in every planned way, and return the folders of the results."""
    root = tmp_path_factory.mktemp("resumed")
    for name, folder in gloo.ensure("universal_from_torch").items():
        dsconv.to_universal(folder / "ckpt", root / name / "universal", fsync=False, verify_output=True)
    yield run([Resume(source, str(root / source.name), world, stage) for source, world, stage in PLANS], root)
    shutil.rmtree(root)


@pytest.mark.parametrize(("source", "world", "stage"), PLANS, ids=lambda value: getattr(value, "name", str(value)))
def test_an_engine_goes_on_from_torchs_run(source: Source, world: int, stage: int, resumed: dict[str, Path]) -> None:
    origin = gloo.ensure("universal_from_torch")[source.name]
    found = resumed[Resume(source, "", world, stage).name]
    assert not (found / "failed.txt").exists(), (found / "failed.txt").read_text()
    expected, loaded = load_safetensors(origin / "truth.safetensors"), load_safetensors(found / "states.safetensors")
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert same(loaded[name].reshape(tensor.shape), tensor), name
    before, now = (json.loads((folder / "facts.json").read_text()) for folder in (origin, found))
    assert (now["steps"], now["global_steps"]) == (before["steps"], 2)
    if stage < 3:  # DeepSpeed's stage 3 gives every group the hyperparameters of the first one
        assert now["groups"] == before["groups"]
    if world == 2:
        assert now["next"] == pytest.approx(before["next"], rel=1e-6)
        if stage < 3 or source.groups == 1:
            expected, loaded = (load_safetensors(folder / "after.safetensors") for folder in (origin, found))
            for name, tensor in expected.items():
                torch.testing.assert_close(
                    loaded[name].reshape(tensor.shape), tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name
                )


def test_it_reads_back_as_its_source(resumed: dict[str, Path], tmp_path: Path) -> None:
    """The weights, their roles and the states of a universal checkpoint are those of the DCP directory."""
    source = gloo.ensure("universal_from_torch")[SOURCES[0].name] / "ckpt"
    report = dsconv.to_universal(source, tmp_path / "universal", fsync=False, dry_run=True)
    assert [row["file"] for row in report.plan if row["file"].endswith("model_states.pt")] == [
        "mp_rank_00_model_states.pt"
    ]
    assert (report.stage, report.states, report.warnings) == (0, ["fp32", "exp_avg", "exp_avg_sq"], [])
    dsconv.to_universal(source, tmp_path / "universal", fsync=False)
    assert dsconv.verify(source, tmp_path / "universal", optimizer=True).equal
    assert dsconv.open_checkpoint(tmp_path / "universal").step == 2


def test_frozen_weights_and_buffers_keep_their_dtype(tmp_path: Path) -> None:
    state = small(frozen=torch.randn(3, 2).bfloat16(), count=torch.tensor([1, 2]))
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    shown = command("to-universal", tmp_path / "ckpt", "--no-fsync", "--verify")
    assert shown.code == 0, shown.err
    found = dsconv.open_checkpoint(tmp_path / "ckpt_universal")
    assert {name: (str(entry.dtype), entry.role) for name, entry in found.items()} == {
        "a": ("float32", "parameter"),
        "b": ("float32", "parameter"),
        "frozen": ("bfloat16", "frozen"),
        "count": ("int64", "buffer"),
    }
    assert all(same(found[name].read(), tensor) for name, tensor in state["model"].items())


def small(**more: torch.Tensor) -> dict[str, Any]:
    """A model of two weights and its Adam."""
    torch.manual_seed(2)
    weights = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    states = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w)}
        for name, w in weights.items()
    }
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "params": list(weights)}
    return {"model": {**weights, **more}, "optim": {"state": states, "param_groups": [group]}}


def change(state: dict[str, Any], how: str) -> None:
    states, groups = state["optim"]["state"], state["optim"]["param_groups"]
    if how == "steps":
        states["b"]["step"] = torch.tensor(2.0)
    elif how == "idle":
        state["model"]["idle"] = torch.randn(2, 2)
        groups[0]["params"].append("idle")
    elif how == "quantized":
        for of in states.values():
            of["state1"] = torch.zeros(2, dtype=torch.uint8)
    elif how == "reserved":
        for name, of in states.items():
            of["fp32"] = torch.zeros_like(state["model"][name])
    elif how == "groups":
        groups += [{key: value for key, value in groups[0].items() if key != "params"}]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("steps", "has taken 2.0 steps with 'b' and 3.0 with 'a'; DeepSpeed counts steps for all"),
        ("idle", r"keeps 'exp_avg' of 'a' and not of 'idle' \(which may never have had a gradient\)"),
        ("quantized", "keeps 'state1', which is not of one value a weight"),
        ("reserved", "keeps a state called 'fp32'"),
        ("groups", "has 2 parameter groups, and the checkpoint does not say which parameters are in which"),
    ],
)
def test_what_deepspeed_cannot_load_is_refused(how: str, words: str, tmp_path: Path) -> None:
    state = small()
    change(state, how)
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    with pytest.raises(UnsupportedError, match=words):
        dsconv.to_universal(tmp_path / "ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_states_that_stage_3_does_not_load_are_told_of(tmp_path: Path) -> None:
    state = small()
    for of in state["optim"]["state"].values():
        of["max_exp_avg_sq"] = of["exp_avg_sq"].clone()
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    report = dsconv.to_universal(tmp_path / "ckpt", tmp_path / "out", fsync=False)
    assert "max_exp_avg_sq: DeepSpeed loads that at stages 1 and 2 only" in report.warnings[0]


@pytest.mark.parametrize(("case", "warned"), [("llama_tied-z2-bf16-w2", False), ("odd-z2-fp16-w3-static", True)])
def test_a_loss_scale_that_the_new_run_does_not_have_is_told_of(
    case: str, warned: bool, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    dsconv.to_dcp(trained(case).checkpoint, tmp_path / "dcp", optimizer=True, fsync=False)
    report = dsconv.to_universal(tmp_path / "dcp", tmp_path / "out", fsync=False)
    assert any("loss scale" in text for text in report.warnings) == warned
