"""FSDP2 models go on from what ``to-dcp --optimizer`` wrote of a DeepSpeed run, with every bit of every state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dsconv
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training
from dsconv.convert.torch_optimizer import SETTINGS, torch_optimizer
from dsconv.errors import CheckpointNotFoundError, UnsupportedError, UsageError
from tests.fixtures import gloo, universal, universal_mp
from tests.fixtures.torch_resume import Resume, run
from tests.trained import Trained, load_safetensors, same

# For each source, the numbers of ranks that load it. With True the ranks also train on, as the original would have.
PLANS: dict[str, list[tuple[int, bool]]] = {
    "llama_groups-z0-bf16-w2": [(2, False)],
    "odd-z0-fp32-w2": [(1, False)],
    "llama_groups-z2-bf16-w2-roundrobin": [(1, False)],
    "gpt2-z2-fp32-w2-aligned": [(1, False), (2, True)],
    "llama_groups-z3-bf16-w2-subgroups": [(2, False)],
    "llama_frozen-z3-bf16-w2": [(2, False)],
    "llama_tied-z1-bf16-w2-lion": [(2, False)],
    "llama_tied-z2-fp32-w2-momentum": [(2, True)],
    "llama_tied-z1-bf16-w2-amsgrad": [(2, False)],
    "gpt2-z3-fp32-w1": [(1, True), (2, False)],
    "mixtral-z3-bf16-w3": [(2, False)],
}
BY_ACCELERATE = [("gpt2-z2-fp32-w2-aligned", 2, True), ("llama_groups-z3-bf16-w2-subgroups", 2, False)]
IDS = [
    *((source, *plan, "torch") for source, plans in PLANS.items() for plan in plans),
    *((*plan, "accelerate") for plan in BY_ACCELERATE),
]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Convert every source, resume from it in every planned way, and return the folders of the results."""
    root = tmp_path_factory.mktemp("resumed")
    resumes = []
    for source, folder in gloo.ensure("universal", list(PLANS)).items():
        dsconv.to_dcp(folder / "ckpt", root / source, optimizer=True, fsync=False)
        resumes += [Resume(source, str(root / source), world, goes_on) for world, goes_on in PLANS[source]]
    for source, world, goes_on in BY_ACCELERATE:
        out, checkpoint = root / f"{source}-accelerate", gloo.ensure("universal")[source] / "ckpt"
        dsconv.to_dcp(checkpoint, out, optimizer=True, layout="accelerate", fsync=False)
        resumes.append(Resume(source, str(out), world, goes_on, "accelerate"))
    found = run(resumes, root / "ranks")
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize(("source", "world", "goes_on", "engine"), IDS, ids=str)
def test_ranks_have_every_bit_after_loading(
    source: str, world: int, goes_on: bool, engine: str, resumed: dict[str, Path]
) -> None:
    origin = gloo.ensure("universal")[source]
    found = resumed[Resume(source, "", world, engine=engine).name]
    assert not (found / "failed.txt").exists(), (found / "failed.txt").read_text()
    expected, loaded = load_safetensors(origin / "truth.safetensors"), load_safetensors(found / "states.safetensors")
    trained = {name for name in expected if expected[name].numel()}
    assert {name for name in loaded if loaded[name].numel()} == trained
    for name in trained:
        assert same(loaded[name].reshape(expected[name].shape), expected[name]), name
    before, now = (json.loads((folder / "facts.json").read_text()) for folder in (origin, found))
    assert now["steps"] == before["steps"]
    assert now["global_steps"] == before["global_steps"]
    for of_torch, of_deepspeed in zip(now["groups"], before["groups"], strict=True):
        assert of_torch.items() >= of_deepspeed.items()
    if goes_on:
        assert now["loss"] == before["loss"]
        expected, loaded = load_safetensors(origin / "after.safetensors"), load_safetensors(found / "after.safetensors")
        for name, tensor in expected.items():
            assert same(loaded[name].reshape(tensor.shape), tensor), f"{name} after one more step"


def whole(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Return all that a DCP directory holds, read by torch."""
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    found: dict[str, Any] = torch.load(tmp_path / "whole.pt", weights_only=False)
    return found


def check(state: dict[str, Any], truth: dict[str, torch.Tensor], steps: list[float]) -> None:
    """Assert that a state dict of torch's holds each master and state of the truth, and no more of them."""
    kept = state["optim"]["state"]
    found = {f"{name}/{key}": tensor for name, of in kept.items() for key, tensor in of.items() if key != "step"}
    found = {key: tensor for key, tensor in found.items() if tensor.numel()}
    assert set(found) == {key for key in truth if not key.endswith("/fp32") and truth[key].numel()}
    masters = {key: state["model"][key.removesuffix("/fp32")] for key in truth if key.endswith("/fp32")}
    for key, tensor in (found | masters).items():
        assert same(tensor.reshape(truth[key].shape), truth[key]), key
    for of in kept.values():
        assert [of["step"]] if "step" in of else steps == []
        assert "step" not in of or same(of["step"], torch.tensor(steps[0]))
    listed = [name for group in state["optim"]["param_groups"] for name in group["params"]]
    assert len(listed) == len({*listed})
    assert {key.rpartition("/")[0] for key in found} <= {*listed}


EVERY = [
    *(("universal", name) for name in universal.CASES if not name.endswith(("-elastic", "-sgd"))),
    *(("universal_mp", name) for name in universal_mp.TRAINED),
]
# Those that are also converted by way of a universal checkpoint.
AGAIN = ("llama_groups-z0-bf16-w2", "odd-z2-fp32-w2", "llama_groups-z3-bf16-w2-subgroups", "fused-tp3-z2", "pp2-dp2-z1")


@pytest.mark.parametrize(("maker", "name"), EVERY, ids=lambda value: str(value))
def test_every_state_is_the_truth(maker: str, name: str, tmp_path: Path) -> None:
    """Stages 0 to 3, AutoTP, pipelines and their universal checkpoints give one output."""
    made = gloo.ensure(maker)[name]
    report = dsconv.to_dcp(made / "ckpt", tmp_path / "out", optimizer=True, fsync=False)
    state = whole(tmp_path / "out", tmp_path)
    truth, facts = load_safetensors(made / "truth.safetensors"), json.loads((made / "facts.json").read_text())
    steps = facts.get("steps", [2.0])
    check(state, truth, steps)
    assert state["counters"]["global_steps"] == report.step
    assert ("loss_scale" in state["counters"]) == ("fp16" in name.split("-"))
    assert (report.layout, report.parameter_groups) == ("torch", len(state["optim"]["param_groups"]))
    if "-z3" not in name:  # DeepSpeed gives every group of stage 3 the hyperparameters of the first one
        for group, expected in zip(state["optim"]["param_groups"], facts.get("groups", []), strict=False):
            assert {**expected, **json.loads(json.dumps(group))} == json.loads(json.dumps(group)) | expected
    if name in AGAIN:
        dsconv.to_universal(made / "ckpt", tmp_path / "universal", fsync=False)
        dsconv.to_dcp(tmp_path / "universal", tmp_path / "again", optimizer=True, fsync=False)
        check(whole(tmp_path / "again", tmp_path), truth, steps)


@pytest.mark.parametrize("name", ["llama_groups-z2-fp16-w2", "odd-z3-fp32-w2"])
def test_the_official_tools_universal_checkpoints(name: str, tmp_path: Path) -> None:
    made = gloo.ensure("universal")[name]
    tag = next(iter((made / "official").glob("global_step*_universal")))
    dsconv.to_dcp(tag, tmp_path / "out", optimizer=True, fsync=False)
    truth = load_safetensors(made / "truth.safetensors")
    check(whole(tmp_path / "out", tmp_path), truth, json.loads((made / "facts.json").read_text())["steps"])


def test_a_state_that_the_official_tool_dropped_is_missed(tmp_path: Path) -> None:
    made = gloo.ensure("universal")["llama_tied-z1-bf16-w2-amsgrad"]
    tag = next(iter((made / "official").glob("global_step*_universal")))
    with pytest.raises(UnsupportedError, match="amsgrad on, and the checkpoint holds no 'max_exp_avg_sq'"):
        dsconv.to_dcp(tag, tmp_path / "out", optimizer=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama_tied-z1-fp32-w2-sgd", "keeps no state of any parameter"),
        ("llama_groups-z2-bf16-w2-elastic", "saved without its hyperparameters"),
    ],
)
def test_what_torch_cannot_go_on_with_is_refused(name: str, words: str, tmp_path: Path) -> None:
    source = gloo.ensure("universal")[name] / "ckpt"
    with pytest.raises(UnsupportedError, match=words):
        dsconv.to_dcp(source, tmp_path / "out", optimizer=True)
    assert not (tmp_path / "out").exists()


def test_a_source_without_an_optimizer_and_options_that_do_not_fit(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a DCP checkpoint with an optimizer is made from"):
        dsconv.to_dcp(zoo, tmp_path / "out", optimizer=True)
    with pytest.raises(UsageError, match="--dtype"):
        dsconv.to_dcp(zoo, tmp_path / "out", optimizer=True, dtype="bf16")
    with pytest.raises(UsageError, match="add --optimizer"):
        dsconv.to_dcp(zoo, tmp_path / "out", layout="accelerate")
    with pytest.raises(UsageError, match="--prefix"):
        dsconv.to_dcp(zoo, tmp_path / "out", optimizer=True, layout="accelerate", prefix="app.")
    with pytest.raises(UsageError, match="layout is 'titan'"):
        dsconv.to_dcp(zoo, tmp_path / "out", optimizer=True, layout="titan")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "zoo").mkdir()
    save_file({"weight": torch.randn(3, 2)}, tmp_path / "zoo" / "model.safetensors")
    return tmp_path / "zoo"


def adam(optimizer: dict[str, Any], **group: Any) -> Training:
    """A training of one parameter by an Adam that is not torch's, which keeps the settings of ``group``."""
    entry = TensorEntry("w/exp_avg", BY_NAME["float32"], (2,), tuple)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True, **group}
    return Training(
        stage=1,
        states={"w": {"exp_avg": entry, "exp_avg_sq": entry}},
        steps={"w": 3},
        param_groups=[{**settings, "params": [0]}],
        settings={},
        module={},
        model_files=(),
        counters=dict,
        members=(("w",),),
        optimizer=optimizer,
    )


@pytest.mark.parametrize(
    ("config", "decoupled", "warned"),
    [
        ({"type": "AdamW", "params": {}}, True, False),
        ({"type": "Adam", "params": {}}, True, False),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, False, False),
        ({}, False, True),
    ],
)
def test_the_settings_of_deepspeeds_own_adam_are_completed(
    config: dict[str, Any], decoupled: bool, warned: bool
) -> None:
    """torch's loader wants each setting that its AdamW has."""
    found = torch_optimizer(adam(config), Path("ckpt"))
    (group,) = found.groups
    own = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
    assert set(own) <= set(group)
    assert {key: group[key] for key in SETTINGS} == {key: own[key] for key in SETTINGS}
    assert (group["decoupled_weight_decay"], group["params"]) == (decoupled, ["w"])
    assert any("decoupled" in text for text in found.warnings) == warned
    assert found.steps["w"].number == 3.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"left_out": ("mu_product",)}, "'mu_product', which is not of one value a weight"),
        ({"members": ()}, "which parameters are in which"),
        ({"steps": {}}, "no step count of 'w'"),
        ({"steps": {"w": (1 << 24) + 1}}, "cannot hold"),
        ({"param_groups": [{"lr": 0.1, "params": [0]}]}, "has no betas"),
    ],
)
def test_what_the_checkpoint_does_not_say_is_not_guessed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        torch_optimizer(replace(adam({}), **changes), Path("ckpt"))


def test_an_adam_without_bias_correction_and_what_is_no_adam() -> None:
    with pytest.raises(UnsupportedError, match="bias_correction off"):
        torch_optimizer(adam({}, bias_correction=False), Path("ckpt"))
    for training in (adam({}, max_coeff=10.0), adam({"type": "Lamb"})):
        found = torch_optimizer(training, Path("ckpt"))
        assert "only an optimizer that has the same takes them" in found.warnings[0]
        assert "amsgrad" not in found.groups[0]


def test_torchtitans_layout(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """It has all keys of a checkpoint that torchtitan's own Trainer saved, and each state is arranged as its weight is:
    under torchtitan's names (which tests/names compares with its adapters), with query, key and value fused as
    ``FusedQKVLinear`` fuses them.
    """
    made = trained("llama_groups-z3-fp32-w2")
    report = dsconv.to_dcp(made.checkpoint, tmp_path / "titan", optimizer=True, layout="torchtitan", fsync=False)
    assert any("has 3 parameter groups" in text for text in report.warnings)
    found = whole(tmp_path / "titan", tmp_path)
    dsconv.to_dcp(made.checkpoint, tmp_path / "torch", optimizer=True, fsync=False)
    of_torch = whole(tmp_path / "torch", tmp_path)["optim"]

    real = gloo.DATA / "torchtitan" / "llama3-full" / "ckpt" / "step-2"
    paths = dcp.FileSystemReader(real).read_metadata().planner_data.values()
    ours = dcp.FileSystemReader(tmp_path / "titan").read_metadata().planner_data.values()
    assert {path for path in paths if path[0] != "dataloader"} <= set(ours)
    assert found["train_state"] == {"step": 2, "ntokens_seen": 0}
    assert found["lr_scheduler"] == {"last_epoch": 2}

    config = next(made.checkpoint.glob("config.json"))
    for state in ("exp_avg", "exp_avg_sq"):
        folder = tmp_path / state
        folder.mkdir()
        shutil.copy(config, folder)
        save_file({name: kept[state] for name, kept in of_torch["state"].items()}, folder / "model.safetensors")
        dsconv.to_dcp(folder, folder / "titan", names="torchtitan", fsync=False)
        expected = whole(folder / "titan", tmp_path)
        for layer in ("layers.0.", "layers.1."):
            parts = [expected.pop(f"{layer}attention.qkv_linear.w{part}.weight") for part in "qkv"]
            q, k, v = (part.reshape(2, -1, 4, 16) for part in parts)  # 2 key-value heads of 4 rows
            fused = torch.cat([q, k, v], dim=1).reshape(-1, 16)
            expected[f"{layer}attention.qkv_linear.wqkv.weight"] = fused
        for name, tensor in expected.items():
            assert same(found["optimizer"][f"state.{name}.{state}"], tensor), name
            assert found["optimizer"][f"state.{name}.step"] == 2
    decay = {name: found["optimizer"][f"param_groups.{name}.weight_decay"] for name in expected}
    assert {name for name, value in decay.items() if not value} == {name for name in decay if "norm" in name}


def test_torchtitans_layout_needs_a_model_that_it_has(tmp_path: Path) -> None:
    source = gloo.ensure("universal")["gpt2-z3-fp32-w1"] / "ckpt"
    with pytest.raises(CheckpointNotFoundError, match=r"--layout torchtitan needs the model's config\.json"):
        dsconv.to_dcp(source, tmp_path / "out", optimizer=True, layout="torchtitan")
