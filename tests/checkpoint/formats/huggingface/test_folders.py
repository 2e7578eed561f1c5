"""Folders with the files of several models, or with shards but no index, in safetensors and in ``.bin``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dsconv
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    MissingShardError,
    SeveralModelsError,
)
from tests.trained import same

FORMS = {"safetensors": "model", "bin": "pytorch_model"}


def save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("suffix", "stem"), FORMS.items())
def test_accelerate_s_second_model_is_not_passed_over(suffix: str, stem: str, tmp_path: Path) -> None:
    """save_state numbers the prepared models: model.safetensors, model_1.safetensors."""
    states = [{"w": torch.randn(3, 2)}, {"w": torch.randn(3, 2), "v": torch.randn(2)}]
    save(states[0], tmp_path / f"{stem}.{suffix}")
    save(states[1], tmp_path / f"{stem}_1.{suffix}")
    with pytest.raises(SeveralModelsError, match=rf"holds 2 models: '{stem}' \(1 tensor\), '{stem}_1' \(2 tensors\)"):
        dsconv.open_checkpoint(tmp_path)
    for item, state in zip((stem, f"{stem}_1"), states, strict=True):
        found = dsconv.open_checkpoint(tmp_path, item=item)
        assert found.info["item"] == item
        assert all(same(found[name].read(), tensor) for name, tensor in state.items())
    with pytest.raises(CheckpointNotFoundError, match="no model is called 'x'"):
        dsconv.open_checkpoint(tmp_path, item="x")
    assert len(dsconv.open_checkpoint(tmp_path / f"{stem}_1.{suffix}")) == 2


@pytest.mark.parametrize(("suffix", "stem"), FORMS.items())
def test_shards_without_an_index(suffix: str, stem: str, tmp_path: Path) -> None:
    names = [f"{stem}-{number:05d}-of-00003.{suffix}" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save({f"w{number}": torch.full((2, 2), float(number))}, tmp_path / name)
    found = dsconv.open_checkpoint(tmp_path)
    assert sorted(found) == ["w0", "w1", "w2"]
    assert "took 3 files by name" in found.warnings[0]
    one = dsconv.open_checkpoint(tmp_path / names[1])
    assert list(one) == ["w1"]
    assert f"{names[1]} is one of 3 files of a model, but was read alone" in one.warnings[0]
    for write in (dsconv.merge, dsconv.to_dcp):
        with pytest.raises(MissingShardError, match="is one of 3 files of a model, and was given alone"):
            write(tmp_path / names[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refusals: list[tuple[type[DsconvError], str]] = [
        (MissingShardError, f"lacks 2 of 3 files, such as {names[0]}"),
        (InconsistentCheckpointError, "are not from one save"),
    ]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[2]).unlink()
    for error, words in refusals:
        with pytest.raises(error, match=words):
            dsconv.open_checkpoint(tmp_path)
        save({"w": torch.ones(1, 2)}, tmp_path / f"{stem}-00001-of-00004.{suffix}")


@pytest.mark.parametrize(("suffix", "stem"), FORMS.items())
def test_a_checkpoint_of_one_model_has_no_items(suffix: str, stem: str, tmp_path: Path) -> None:
    save({"w": torch.ones(2, 2)}, tmp_path / f"{stem}.{suffix}")
    with pytest.raises(CheckpointNotFoundError, match="no model is called 'ema'"):
        dsconv.open_checkpoint(tmp_path, item="ema")
