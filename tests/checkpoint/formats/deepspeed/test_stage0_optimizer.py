"""Assign unnamed optimizer states to parameters at stage 0. Ambiguous cases are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.errors import MalformedError, UnsupportedError
from tests.convert.test_to_universal import edited, load
from tests.fixtures import gloo
from tests.trained import Trained, load_safetensors, same

SOURCE = "llama_tied-z0-fp32-w2"


def states_of(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    checkpoint = dsconv.open_checkpoint(path)
    assert checkpoint.training is not None
    states = checkpoint.training().states
    return {name: {state: entry.read() for state, entry in of.items()} for name, of in states.items()}


def regroup(*groups: list[int]) -> Callable[[Any], None]:
    """Rewrite the optimizer as if it had been made with these groups of parameters (by number in the module)."""

    def edit(value: Any) -> None:
        optimizer = value["optimizer"]
        old, (settings,) = optimizer["state"], optimizer["param_groups"]
        order = [number for group in groups for number in group]
        optimizer["state"] = {new: old[number] for new, number in enumerate(order) if number in old}
        numbers = iter(range(len(order)))
        optimizer["param_groups"] = [{**settings, "params": [next(numbers) for _ in group]} for group in groups]

    return edit


def test_groups_that_fit_in_one_way_are_told_apart(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source = trained(SOURCE).checkpoint
    expected = states_of(source)
    norms = [number for number, of in enumerate(expected.values()) if of["exp_avg"].dim() == 1]
    matrices = [number for number in range(len(expected)) if number not in norms]
    found = states_of(edited(source, tmp_path / "ckpt", "*.pt", regroup(norms, matrices)))
    assert {name: set(of) for name, of in found.items()} == {name: {"exp_avg", "exp_avg_sq"} for name in expected}
    assert all(same(found[name][state], tensor) for name, of in expected.items() for state, tensor in of.items())


def test_parameters_that_are_frozen_and_fit_in_one_way_are_told_apart(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source = trained(SOURCE).checkpoint
    expected = states_of(source)
    kept = [number for number in range(len(expected)) if number != 0]  # no other parameter has the embedding's shape
    copy = edited(source, tmp_path / "ckpt", "*.pt", regroup(kept))
    found = states_of(copy)
    assert list(found) == [name for name in expected if name != "model.embed_tokens.weight"]
    assert all(same(found[name]["exp_avg"], expected[name]["exp_avg"]) for name in found)
    report = dsconv.to_universal(copy, tmp_path / "out", fsync=False, verify_output=True)
    assert any("have no names" in warning for warning in report.warnings)
    assert {path.name for path in (tmp_path / "out" / "zero" / "model.embed_tokens.weight").iterdir()} == {"fp32.pt"}
    assert dsconv.open_checkpoint(tmp_path / "out")["lm_head.weight"].role == "frozen"


def test_names_that_the_optimizer_keeps_are_used(tmp_path: Path) -> None:
    """A layer was frozen, and the order is not the module's; shapes alone would fit in several ways."""
    folder = gloo.ensure("realistic", ["named-fp32"])["named-fp32"]
    moments = load_safetensors(folder / "moments.safetensors")
    found = states_of(folder / "ckpt")
    assert found.keys() == moments.keys()
    assert not any(name.startswith("blocks.1.") for name in found)
    assert all(same(found[name]["exp_avg"], tensor) for name, tensor in moments.items())
    report = dsconv.to_universal(folder / "ckpt", tmp_path / "out", fsync=False, verify_output=True)
    assert not any("have no names" in warning for warning in report.warnings)

    def swap(value: Any) -> None:
        names = value["optimizer"]["param_groups"][0]["param_names"]
        names[0], names[1] = names[1], names[0]

    with pytest.raises(MalformedError, match="param_names do not fit its states"):
        states_of(edited(folder / "ckpt", tmp_path / "swapped", "*.pt", swap))


def _later(value: Any) -> None:
    value["optimizer"]["state"][3]["step"] += 1


def _without(value: Any) -> None:
    value["optimizer"] = None


def _stateless(value: Any) -> None:
    value["optimizer"]["state"] = {}


def _factored(value: Any) -> None:
    for state in value["optimizer"]["state"].values():
        state["exp_avg_sq_row"] = torch.zeros(5)


def _unlisted(value: Any) -> None:
    value["optimizer"]["param_groups"][0]["params"] = None


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (regroup([n for n in range(20) if n != 11], [11]), UnsupportedError, "fit the parameters in several ways"),
        (regroup([n for n in range(20) if n != 8]), UnsupportedError, "fit the parameters in several ways"),
        (regroup([1, 0, *range(2, 20)]), UnsupportedError, "do not fit the module's parameters in their order"),
        (_factored, UnsupportedError, "do not fit the module's parameters"),
        (_later, UnsupportedError, "v_proj.weight' has not taken as many steps as 'model.embed_tokens.weight'"),
        (_stateless, UnsupportedError, "keeps no state of any parameter"),
        (_without, UnsupportedError, "saved no optimizer states"),
        (_unlisted, MalformedError, "does not list its parameters by number"),
    ],
)
def test_ambiguous_states_are_refused(
    edit: Callable[[Any], None], error: type[Exception], words: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source = edited(trained(SOURCE).checkpoint, tmp_path / "ckpt", "*.pt", edit)
    with pytest.raises(error, match=words):
        dsconv.to_universal(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert dsconv.open_checkpoint(source)["model.norm.weight"].read().numel() == 16  # its weights can still be read


def test_frozen_layers_of_equal_shapes_are_refused_in_fp32_and_told_apart_in_bf16(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="some were frozen"):
        dsconv.to_universal(trained("llama_frozen-z0-fp32-w2").checkpoint, tmp_path / "out")
    assert len(states_of(trained("llama_frozen-z0-bf16-w2").checkpoint)) == 11  # identified by the masters' values


def test_states_of_the_fused_optimizer_are_parts_of_flat_ones(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """This is DeepSpeed's FP16_Optimizer, which it uses with its FusedAdam on GPUs."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    truth: dict[str, dict[str, torch.Tensor]] = {}

    def fuse(value: Any) -> None:
        torch.manual_seed(0)
        module = value["module"]
        del module["lm_head.weight"]  # tied
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in module.items()}
        split = [[n for n, p in parameters.items() if (p.dim() == 1) == flat] for flat in (True, False)]
        inner = torch.optim.AdamW([{"params": [parameters[name] for name in names]} for names in split])
        optimizer = FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16)
        for flat in optimizer.fp32_groups_flat:
            flat.grad = torch.randn_like(flat)
        inner.step()
        for names, flat in zip(split, optimizer.fp32_groups_flat, strict=True):
            state = {"fp32": flat.detach(), **{key: inner.state[flat][key] for key in ("exp_avg", "exp_avg_sq")}}
            for key, whole in state.items():
                parts = whole.split([parameters[name].numel() for name in names])
                for name, part in zip(names, parts, strict=True):
                    truth.setdefault(name, {})[key] = part.reshape(parameters[name].shape).clone()
        value["module"] = {name: truth[name]["fp32"].bfloat16() for name in parameters}
        value["optimizer"] = optimizer.state_dict()

    source = edited(trained("llama_tied-z0-bf16-w2").checkpoint, tmp_path / "ckpt", "*.pt", fuse)
    dsconv.to_universal(source, tmp_path / "out", fsync=False, verify_output=True)
    for name, states in truth.items():
        for state, tensor in states.items():
            assert same(load(tmp_path / "out" / "zero" / name / f"{state}.pt")["param"], tensor), (name, state)
        # DeepSpeed takes a step without gradients to make the states.
        assert float(load(tmp_path / "out" / "zero" / name / "step.pt")) == 2


def joined(shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return every way to join the shards of two ranks: as copies, or along the only dimension in which they may
    differ.
    """
    one, two = (shard.detach() for shard in shards)
    cuts = [
        dim
        for dim in range(one.dim())
        if all(a == b for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if i != dim)
    ]
    return [one, *(torch.cat([one, two], dim) for dim in cuts)]


def test_states_of_tensor_parallel_ranks_are_joined_as_their_masters_are(tmp_path: Path) -> None:
    folder = gloo.ensure("autotp", ["llama-tp2-z0-bf16"])["llama-tp2-z0-bf16"]
    truth = load_safetensors(folder / "truth.safetensors")
    found = states_of(folder / "ckpt")
    optimizers = [load(path)["optimizer"] for path in sorted((folder / "ckpt").glob("*/mp_rank_*.pt"))]
    masters = [[master for group in optimizer["fp32_groups"] for master in group] for optimizer in optimizers]
    checked = set()
    for number, shards in enumerate(zip(*masters, strict=True)):
        states = [optimizer["optimizer_state_dict"]["state"][number] for optimizer in optimizers]
        for way, whole in enumerate(joined(shards)):
            for name in [name for name in found if same(whole, truth[name])]:
                for state in ("exp_avg", "exp_avg_sq"):
                    assert same(found[name][state], joined([mine[state] for mine in states])[way]), (name, state)
                checked.add(name)
    assert checked == set(found)
    dsconv.to_universal(folder / "ckpt", tmp_path / "out", fsync=False, verify_output=True)
    assert dsconv.verify(folder / "ckpt", tmp_path / "out").equal
