"""The drop-ins against DeepSpeed's own functions, on the checkpoints that those can read; and where those fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv import DsconvError, compat
from tests.trained import Trained, load_safetensors, same

NAMES = [
    "get_fp32_state_dict_from_zero_checkpoint",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "load_state_dict_from_zero_checkpoint",
]
# What the official functions read: no 0-d or frozen weights at stage 1, no stage 0.
READABLE = [
    "llama_tied-z3-bf16-w3",
    "llama_groups-z2-bf16-w4",
    "llama_frozen-z3-bf16-w2",
    "llama_frozen-z2-fp32-w3",
    "t5-z2-bf16-w2",
    "gpt2-z3-fp32-w3",
    "mixtral-z3-bf16-w2",
    "llama_lora-z2-bf16-w2",
    "odd-z3-bf16-w2",
]


def official() -> Any:
    from deepspeed.utils import zero_to_fp32

    zero_to_fp32.debug = False
    zero_to_fp32.device = torch.device("cpu")
    return zero_to_fp32


@pytest.mark.parametrize("name", NAMES)
def test_the_signatures_are_the_official_ones(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (compat, official()))
    assert list(ours.parameters) == list(theirs.parameters)
    assert [p.default for p in ours.parameters.values()] == [p.default for p in theirs.parameters.values()]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert same(ours[name], tensor), name


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("case", READABLE)
def test_get_state_dict(case: str, lazy: bool, trained: Callable[[str], Trained]) -> None:
    made = trained(case)
    for exclude in (False, True):
        theirs = official().get_fp32_state_dict_from_zero_checkpoint(
            str(made.checkpoint), exclude_frozen_parameters=exclude
        )
        ours = compat.get_fp32_state_dict_from_zero_checkpoint(
            made.checkpoint, exclude_frozen_parameters=exclude, lazy_mode=lazy
        )
        if lazy:
            assert all(t.shape == theirs[name].shape and t.dtype == theirs[name].dtype for name, t in ours.items())
            ours = {name: tensor.contiguous() for name, tensor in ours.items()}
        if case.startswith("odd"):  # the official one leaves out parameters without elements
            ours = {name: tensor for name, tensor in ours.items() if name in theirs or tensor.numel()}
        equal(ours, theirs)


def test_tied_names_share_one_tensor(trained: Callable[[str], Trained]) -> None:
    found = compat.get_fp32_state_dict_from_zero_checkpoint(trained("llama_tied-z3-bf16-w3").checkpoint)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]


def load_bin(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("size", [None, "5GB", "8KB"])
@pytest.mark.parametrize("case", ["llama_tied-z3-bf16-w3", "llama_frozen-z2-bf16-w2"])
def test_convert_to_bin(case: str, size: str | None, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(case)
    for module, out in ((official(), "theirs"), (compat, "ours")):
        module.convert_zero_checkpoint_to_fp32_state_dict(
            str(made.checkpoint), str(tmp_path / out), max_shard_size=size
        )
    equal(load_bin(tmp_path / "ours"), load_bin(tmp_path / "theirs"))
    sharded = (tmp_path / "ours" / "pytorch_model.bin.index.json").exists()
    assert sharded == (tmp_path / "theirs" / "pytorch_model.bin.index.json").exists() == (size == "8KB")
    if not sharded:
        assert [path.name for path in (tmp_path / "ours").iterdir()] == ["pytorch_model.bin"]


def test_convert_to_safetensors_replaces_an_earlier_output(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("llama_frozen-z3-bf16-w2")
    for _ in range(2):
        compat.convert_zero_checkpoint_to_fp32_state_dict(made.checkpoint, tmp_path / "out", safe_serialization=True)
    made.check(load_safetensors(tmp_path / "out"), torch.float32)


@pytest.mark.parametrize("case", ["llama_tied-z3-bf16-w3", "odd-z1-bf16-w2", "llama_groups-z0-bf16-w2"])
def test_load_into_a_model(case: str, trained: Callable[[str], Trained]) -> None:
    from tests.fixtures import models

    made = trained(case)
    model = models.build(case.split("-")[0], frozen=False, stage=made.facts["case"]["stage"])
    assert compat.load_state_dict_from_zero_checkpoint(model, made.checkpoint) is model
    state = model.state_dict()
    for name, expected in made.truth.items():
        assert same(state[name], expected.to(state[name].dtype)), name


def test_errors_are_ours(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    with pytest.raises(DsconvError, match="no checkpoint of tag 'nope'"):
        compat.get_fp32_state_dict_from_zero_checkpoint(trained("llama_tied-z3-bf16-w3").checkpoint, tag="nope")
    with pytest.raises(FileNotFoundError):
        compat.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(DsconvError):
        compat.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_flipped_bit_does(copied: Callable[[str], Path], trained: Callable[[str], Trained]) -> None:
    """The official function returns a wrong model in silence; ours names the file."""
    save_dir = copied("gpt2-z3-fp32-w3")
    from dsconv import open_checkpoint

    extent = open_checkpoint(save_dir)["transformer.wte.weight"].pieces[0].extent
    data = bytearray(extent.record.path.read_bytes())
    data[extent.offset_bytes + 3] ^= 0x40
    extent.record.path.write_bytes(bytes(data))
    wrong = official().get_fp32_state_dict_from_zero_checkpoint(str(save_dir))
    assert not same(wrong["transformer.wte.weight"], trained("gpt2-z3-fp32-w3").truth["transformer.wte.weight"])
    with pytest.raises(DsconvError, match="CRC-32"):
        compat.get_fp32_state_dict_from_zero_checkpoint(save_dir)
