"""If a checkpoint holds several models, each command and loader can choose one, or names a command that can."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import dsconv
from dsconv import compat
from dsconv.cli.commands import cli, command_of
from dsconv.errors import CheckpointNotFoundError, SeveralModelsError


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Save a model and its moving average in one file."""
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"model": {"fc.weight": weight, "fc.bias": weight[:, 0]},
                "ema": {"fc.weight": weight + 1, "fc.bias": weight[:, 0]}}, tmp_path / "two.pt")  # fmt: skip
    return tmp_path / "two.pt"


def test_both_merging_commands_choose(two: Path, tmp_path: Path) -> None:
    for command in ("merge", "zero-to-fp32"):
        out = tmp_path / command
        assert CliRunner().invoke(cli, [command, str(two), str(out), "--item", "ema"]).exit_code == 0
        assert load_file(out / "model.safetensors")["fc.weight"].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_two_models_of_one_checkpoint_are_compared(two: Path) -> None:
    report = dsconv.diff(two, two, item="model", item_b="ema")
    assert {d.name: d.changed for d in report.tensors} == {"fc.weight": 6, "fc.bias": 0}
    assert [d.name for d in dsconv.verify(two, two, item="model", item_b="ema").differences] == ["fc.weight"]


def test_the_choice_holds_for_each_side_that_has_several(two: Path, tmp_path: Path) -> None:
    dsconv.merge(two, tmp_path / "ema", item="ema")
    for sides in ((two, tmp_path / "ema"), (tmp_path / "ema", two), (two, two)):
        assert dsconv.verify(*sides, item="ema").equal
        assert not any(d.changed for d in dsconv.diff(*sides, item="ema").tensors)
    assert not dsconv.verify(two, tmp_path / "ema", item="model").equal
    with pytest.raises(CheckpointNotFoundError, match="no model is called 'other'"):
        dsconv.verify(two, tmp_path / "ema", item="other")
    save_file({"fc.weight": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="there is one model, which needs no --item"):
        dsconv.diff(tmp_path / "one.safetensors", tmp_path / "ema", item="ema")


def test_a_loader_takes_the_chosen_one(two: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    with pytest.raises(SeveralModelsError, match="--item 'model'"):
        dsconv.stream_into(model, two)
    dsconv.stream_into(model, two, item="ema")
    assert model["fc"].weight.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    "command", ["zero-to-fp32", "merge", "diff", "verify", "to-dcp", "to-universal", "inspect", "watch"]
)
def test_every_command_that_reads_a_checkpoint_can_choose(command: str) -> None:
    """The error advises --item, so every command must have it."""
    assert any("--item" in parameter.opts for parameter in command_of(command).params)


def test_what_cannot_choose_says_what_can(two: Path, tmp_path: Path) -> None:
    with pytest.raises(SeveralModelsError, match=re.escape("dsconv.merge(CKPT, OUT, item='model')")) as caught:
        compat.get_fp32_state_dict_from_zero_checkpoint(two)
    assert "--item" not in str(caught.value)
    save_file({"base_model.model.fc.lora_A.weight": torch.ones(1, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SeveralModelsError, match="merge the base with dsconv merge and --item, and give"):
        dsconv.merge(tmp_path, tmp_path / "out", fold_lora=True, base=two)
