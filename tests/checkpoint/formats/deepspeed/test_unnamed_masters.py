"""Stage 0 in 16 bits at realistic learning rates: each master goes to its own weight, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import MasterSlot, match_masters
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import UnsupportedError
from tests.convert.test_to_universal import edited
from tests.fixtures import gloo
from tests.fixtures.realistic import CASES
from tests.trained import Trained, load_safetensors, same

TOLD = ("full", "full-fp16", "named", "decay", "frozen-last", "frozen-norms", "frozen-middle-fp16", "wrapped-z0")
NOT_TOLD = ("frozen-first", "reversed")


@pytest.fixture(scope="module")
def made() -> Callable[[str], Trained]:
    folders = gloo.ensure("realistic")
    return lambda name: Trained(folders[name])


@pytest.mark.parametrize("name", TOLD)
def test_each_master_goes_to_its_own_weight(made: Callable[[str], Trained], name: str) -> None:
    checkpoint = dsconv.open_checkpoint(made(name).checkpoint)
    made(name).check({name: entry.read() for name, entry in checkpoint.items()})
    norms = [made(name).truth[f"blocks.{number}.norm.weight"] for number in range(3)]
    low = [norm.to(torch.bfloat16) for norm in norms]
    assert same(low[0], low[1]), "the weights should be equal, so that values do not tell them apart"
    frozen = {key for key, entry in checkpoint.items() if entry.role == "frozen"}
    assert frozen == {key for key in made(name).truth if key.startswith(CASES[name].options.frozen or ("nothing",))}


@pytest.mark.parametrize("name", TOLD)
def test_what_was_trained_is_never_left_out(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    dsconv.merge(made(name).checkpoint, tmp_path / "out", exclude_frozen=True, fsync=False)
    frozen = CASES[name].options.frozen or ("nothing",)
    assert set(load_safetensors(tmp_path / "out")) == {key for key in made(name).truth if not key.startswith(frozen)}


@pytest.mark.parametrize("name", NOT_TOLD)
def test_an_ambiguous_assignment_is_refused(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"which master belongs to which weight cannot be determined.*--weights 16bit"
    ):
        dsconv.open_checkpoint(made(name).checkpoint)
    dsconv.merge(made(name).checkpoint, tmp_path / "out", weights="16bit", fsync=False)
    module = load_safetensors(made(name).folder / "truth_module.safetensors")
    found = load_safetensors(tmp_path / "out")
    assert set(found) == set(module)
    assert all(same(found[key], value) for key, value in module.items())


@pytest.mark.parametrize("name", [*TOLD, *NOT_TOLD])
def test_groups_in_one_flat_tensor(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    """FP16_Optimizer, which needs FusedAdam on a GPU, keeps the same masters, one after another."""
    source = next(made(name).checkpoint.glob("*/mp_rank_00_model_states.pt"))
    states = torch.load(source, weights_only=False)
    groups = states["optimizer"].pop("fp32_groups")
    states["optimizer"]["fp32_groups_flat"] = [torch.cat([t.detach().reshape(-1) for t in group]) for group in groups]
    path = tmp_path / "best" / source.name
    path.parent.mkdir()
    torch.save(states, path)
    if name in NOT_TOLD:
        with pytest.raises(UnsupportedError, match="--weights 16bit"):
            dsconv.open_checkpoint(path.parent)
        return
    checkpoint = dsconv.open_checkpoint(path.parent)
    made(name).check({name: entry.read() for name, entry in checkpoint.items()})


@pytest.mark.parametrize("name", TOLD)
def test_optimizer_states_follow_their_masters(made: Callable[[str], Trained], name: str) -> None:
    checkpoint = dsconv.open_checkpoint(made(name).checkpoint)
    assert checkpoint.training is not None
    training = checkpoint.training()
    trained = [key for key, entry in checkpoint.items() if entry.role == "parameter"]
    assert sorted(training.states) == sorted(trained)
    path = next(made(name).checkpoint.glob("*/mp_rank_00_model_states.pt"))
    optimizer = torch.load(path, weights_only=False)["optimizer"]
    masters = [t for group in optimizer["fp32_groups"] for t in group]
    rows = optimizer["optimizer_state_dict"]["state"]
    for key in trained:
        (number,) = [n for n, master in enumerate(masters) if same(master.detach(), checkpoint[key].read())]
        assert same(training.states[key]["exp_avg"].read(), rows[number]["exp_avg"]), key


def test_masters_that_fit_no_weight_are_refused(made: Callable[[str], Trained], tmp_path: Path) -> None:
    """A weight that was changed without the optimizer does not get another weight's master."""
    source = next(made("full").checkpoint.glob("*/mp_rank_00_model_states.pt"))
    states = torch.load(source, weights_only=False)
    states["module"]["blocks.1.mix.weight"] = states["module"]["blocks.1.mix.weight"] + 1
    path = tmp_path / "best" / source.name
    path.parent.mkdir()
    torch.save(states, path)
    with pytest.raises(UnsupportedError, match=r"fp32 masters have no names.*--weights 16bit"):
        dsconv.open_checkpoint(path.parent)


def test_weights_that_differ_only_at_the_end(tmp_path: Path) -> None:
    """The first elements of two weights are equal, and the rest shows which master belongs to which."""
    first = torch.ones(300)
    second = first.clone()
    second[-1] = 2
    torch.save({"optimizer": {"fp32_groups": [[second + 1e-5, first + 1e-5]]}, "module": {}}, tmp_path / "x.pt")
    torch.save({"a": first.bfloat16(), "b": second.bfloat16()}, tmp_path / "w.pt")
    weights = dict(dsconv.open_checkpoint(tmp_path / "w.pt").items())
    file = TorchFile(tmp_path / "x.pt")
    found = match_masters(file, file.root["optimizer"], weights, {})
    assert {name: slot.position for name, slot in found.items()} == {"a": 1, "b": 0}


def norms_apart(path: Path, masters: list[torch.Tensor], frozen: int = 0) -> tuple[TorchFile, dict[str, TensorEntry]]:
    """Write a group of matrices and one of norms of ones, as a Trainer makes them, and the weights."""
    torch.manual_seed(0)
    matrices = [torch.randn(4, 4) for _ in range(2)]
    torch.save({"optimizer": {"fp32_groups": [matrices, masters]}, "module": {}}, path / "x.pt")
    weights = {f"{i}.weight": matrix.bfloat16() for i, matrix in enumerate(matrices)}
    weights |= {f"{i}.norm": torch.ones(4).bfloat16() for i in range(len(masters) + frozen)}
    torch.save(weights, path / "w.pt")
    return TorchFile(path / "x.pt"), dict(dsconv.open_checkpoint(path / "w.pt").items())


def test_equal_masters_of_equal_weights_are_exchangeable(tmp_path: Path) -> None:
    file, weights = norms_apart(tmp_path, [torch.ones(4)] * 2 + [torch.ones(4)])
    found = match_masters(file, file.root["optimizer"], weights, {})
    assert set(found) == set(weights)
    assert {name for name, slot in found.items() if slot.is_any} == {"0.norm", "1.norm", "2.norm"}


@pytest.mark.parametrize(
    ("masters", "frozen"),
    [([torch.ones(4), torch.ones(4) + 1e-5], 0), ([torch.ones(4), torch.ones(4)], 1)],
    ids=["masters-differ", "one-is-frozen"],
)
def test_equal_weights_that_are_not_exchangeable(masters: list[torch.Tensor], frozen: int, tmp_path: Path) -> None:
    file, weights = norms_apart(tmp_path, masters, frozen)
    with pytest.raises(UnsupportedError, match="which master belongs to which weight cannot be determined"):
        match_masters(file, file.root["optimizer"], weights, {})


def test_names_tell_equal_weights_apart(tmp_path: Path) -> None:
    """An optimizer that was made of named parameters says which of its masters is whose; values must agree."""
    _, weights = norms_apart(tmp_path, [torch.ones(4), torch.ones(4) + 1e-5], frozen=1)
    optimizer = torch.load(tmp_path / "x.pt")["optimizer"]
    names = [["0.weight", "1.weight"], ["2.norm", "0.norm"]]

    def matched(names: list[list[str]], stored: dict[str, str]) -> dict[str, MasterSlot]:
        inner = {"state": {}, "param_groups": [{"params": [0, 1], "param_names": group} for group in names]}
        torch.save({"optimizer": {**optimizer, "optimizer_state_dict": inner}, "module": {}}, tmp_path / "named.pt")
        file = TorchFile(tmp_path / "named.pt")
        return match_masters(file, file.root["optimizer"], weights, stored)

    found = matched(names, {})
    assert {name: slot.position for name, slot in found.items() if "norm" in name} == {"2.norm": 0, "0.norm": 1}
    wrapped = [[f"_orig_mod.{name}" for name in group] for group in names]
    assert matched(wrapped, {name: f"_orig_mod.{name}" for name in weights}) == found
    for wrong in ([names[0][::-1], names[1]], [names[0], ["2.norm", "9.norm"]], [names[0], ["2.norm"]]):
        with pytest.raises(UnsupportedError, match="which master belongs to which weight cannot be determined"):
            matched(wrong, {})


def test_states_of_exchangeable_masters_are_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """The weights come out right, whichever of the norms each master is of."""
    source = trained("llama_tied-z0-bf16-w2")
    truth: dict[str, torch.Tensor] = {}

    def apart(value: Any) -> None:
        optimizer, module = value["optimizer"], value["module"]
        masters = [master.detach() for group in optimizer["fp32_groups"] for master in group]
        inner = optimizer["optimizer_state_dict"]
        for name in [name for name, tensor in module.items() if tensor.dim() == 1]:
            module[name] = torch.ones_like(module[name])
        split = [[n for n, m in enumerate(masters) if (m.dim() == 1) == flat] for flat in (False, True)]
        optimizer["fp32_groups"] = [
            [torch.ones_like(masters[n]) if masters[n].dim() == 1 else masters[n] for n in group] for group in split
        ]
        order = [n for group in split for n in group]
        inner["state"] = {new: inner["state"][old] for new, old in enumerate(order)}
        numbers = iter(range(len(order)))
        settings = inner["param_groups"][0]
        inner["param_groups"] = [{**settings, "params": [next(numbers) for _ in group]} for group in split]
        truth.update({name: torch.ones(tensor.shape) for name, tensor in module.items() if tensor.dim() == 1})

    copy = edited(source.checkpoint, tmp_path / "ckpt", "*.pt", apart)
    checkpoint = dsconv.open_checkpoint(copy)
    assert truth
    assert all(same(checkpoint[name].read(), tensor) for name, tensor in truth.items())
    with pytest.raises(UnsupportedError, match="nothing tells which optimizer states belong to it"):
        dsconv.to_universal(copy, tmp_path / "out")
