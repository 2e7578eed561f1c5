"""Two runs of different precisions under one tag: the model states decide which complete set of files is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dsconv
from dsconv.errors import InconsistentCheckpointError, MissingShardError
from tests.fixtures import gloo
from tests.fixtures.realistic import CASES, TAG
from tests.trained import Trained, load_safetensors

TWO = [name for name in CASES if name.startswith("two-")]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], tuple[Trained, Path]]:
    """Return ``copied(name)``, which gives a trained case and a copy of its save dir."""
    folders = gloo.ensure("realistic")

    def copy(name: str) -> tuple[Trained, Path]:
        made = Trained(folders[name])
        return made, Path(shutil.copytree(made.checkpoint, tmp_path / "copy"))

    return copy


def model_states(folder: Path) -> Path:
    return next(folder.glob(f"{TAG}/*model_states.pt"))


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("newest", ["bf16_zero", "zero"])
def test_the_run_of_the_model_states_is_taken(
    copied: Callable[[str], tuple[Trained, Path]], name: str, newest: str, tmp_path: Path
) -> None:
    """The files' times do not matter, since copying may change them."""
    made, folder = copied(name)
    for path in (folder / TAG).iterdir():
        os.utime(path, (10**9, 10**9 + path.name.startswith(newest)))
    report = dsconv.merge(folder, tmp_path / "out", fsync=False)
    made.check(load_safetensors(tmp_path / "out"))
    (warning,) = [text for text in report.warnings if "another run saved them" in text]
    assert "bf16_zero_pp_rank_*" in warning


@pytest.mark.parametrize("name", TWO)
def test_an_incomplete_set_is_not_filled_from_another_run(
    copied: Callable[[str], tuple[Trained, Path]], name: str
) -> None:
    _, folder = copied(name)
    prefix = "bf16_" if name.endswith("bf16") else ""
    (folder / TAG / f"{prefix}zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MissingShardError, match=f"{prefix}zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        dsconv.open_checkpoint(folder)


def test_ambiguous_model_states_are_refused(copied: Callable[[str], tuple[Trained, Path]]) -> None:
    _, folder = copied("two-z3-bf16")
    for path in (folder / TAG).glob("*model_states.pt"):
        states = torch.load(path, weights_only=False)
        del states["ds_config"]
        states["module"] = {}
        torch.save(states, path)
    with pytest.raises(
        InconsistentCheckpointError, match=r"zero_pp_rank_\*.*and.*bf16_zero_pp_rank|bf16_.*and.*zero_pp"
    ):
        dsconv.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["two-z1-bf16", "two-z2-bf16", "two-z3-bf16"])
def test_the_only_files_are_those_of_another_run(copied: Callable[[str], tuple[Trained, Path]], name: str) -> None:
    """A bf16 run ended after writing its model states, so the other files are older."""
    _, folder = copied(name)
    for path in (folder / TAG).glob("bf16_*"):
        path.unlink()
    with pytest.raises(InconsistentCheckpointError, match="here are only zero_pp_rank"):
        dsconv.open_checkpoint(folder)


def test_masters_that_are_not_the_weights_are_refused(copied: Callable[[str], tuple[Trained, Path]]) -> None:
    """If the files of two runs are mixed, the weights of stages 1 and 2 prove whose masters they are."""
    _, folder = copied("two-z2-bf16")
    path = model_states(folder)
    states = torch.load(path, weights_only=False)
    states["module"] = {name: value + 1 for name, value in states["module"].items()}
    torch.save(states, path)
    with pytest.raises(InconsistentCheckpointError, match="do not hold its weights"):
        dsconv.open_checkpoint(folder)


def test_two_files_of_one_rank(copied: Callable[[str], tuple[Trained, Path]]) -> None:
    _, folder = copied("two-z2-bf16")
    shutil.copy(model_states(folder), model_states(folder).with_name("mp_rank_0_model_states.pt"))
    with pytest.raises(InconsistentCheckpointError, match="name the same rank"):
        dsconv.open_checkpoint(folder)
