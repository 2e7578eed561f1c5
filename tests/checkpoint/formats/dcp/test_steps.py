"""Folders of steps as trainers leave them: the right step is read, or the error lists the choices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

import dsconv
from dsconv.errors import CheckpointNotFoundError, MissingShardError
from tests.cli.running import dsconv as command
from tests.trained import load_safetensors, same


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(6, 5) for name in ("embed.weight", "layers.0.weight", "norm.weight")}


def save(folder: Path, seed: int, key: str = "model") -> dict[str, Tensor]:
    dcp.save({key: weights(seed), "step": 3}, checkpoint_id=folder, no_dist=True)
    return weights(seed)


def save_for_the_hub(folder: Path, seed: int) -> dict[str, Tensor]:
    """Save as torchtitan's last_save_in_hf does: safetensors with an index."""
    folder.mkdir(parents=True)
    file = "model-00001-of-00001.safetensors"
    save_file(weights(seed), folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights(seed), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights(seed)


def holds(path: Path, truth: dict[str, Tensor], **options: Any) -> dsconv.Checkpoint:
    found = dsconv.open_checkpoint(path, **options)
    assert set(found) == set(truth)
    assert all(same(found[name].read(), tensor) for name, tensor in truth.items())
    return found


def test_a_last_step_in_the_hub_s_form_counts(tmp_path: Path) -> None:
    old, new = save(tmp_path / "step-5", 1), save_for_the_hub(tmp_path / "step-10", 2)
    found = holds(tmp_path, new)
    assert (found.step, found.info["tag"], found.warnings) == (10, "step-10", ())
    assert holds(tmp_path, old, tag="step-5").step == 5
    assert holds(tmp_path / "step-10", new).format == "safetensors"


def test_shards_that_do_not_say_where_they_begin_give_way_to_the_consolidated_files(tmp_path: Path) -> None:
    truth = save_for_the_hub(tmp_path / "step-10", 2)
    (tmp_path / "step-10/sharded").mkdir()
    save_file(truth, tmp_path / "step-10/sharded/shard-00001-model-00001-of-00001.safetensors")
    found = holds(tmp_path, truth)
    assert "no DCP_SHARDING_INFO" in found.warnings[0]


def test_files_without_their_metadata_are_an_unfinished_save(tmp_path: Path) -> None:
    save(tmp_path / "run/step-3", 1)
    (tmp_path / "run/step-3/.metadata").unlink()
    for path in (tmp_path / "run/step-3", tmp_path / "run"):
        with pytest.raises(
            MissingShardError, match=r"step-3: no .metadata beside its 1 .distcp files.*did not finish, or"
        ):
            dsconv.open_checkpoint(path)
    old = save(tmp_path / "run/step-2", 2)
    found = holds(tmp_path / "run", old)
    assert "holds step 3 without .metadata: its save did not finish, or the hidden file was not" in found.warnings[0]


def test_megatron_s_tracker_names_the_step(tmp_path: Path) -> None:
    old, new = save(tmp_path / "iter_0000010", 1), save(tmp_path / "iter_0000020", 2)
    assert holds(tmp_path, new).step == 20
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    found = holds(tmp_path, old)
    assert "iter_0000020 is newer than iteration 10" in found.warnings[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("30")
    assert "names iteration 30, which is not whole; took iter_0000020" in holds(tmp_path, new).warnings[0]
    assert holds(tmp_path, old, tag="iter_0000010").step == 10


def test_two_folders_of_the_same_step_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "iter_10", 1)
    save(tmp_path / "iter_0010", 2)
    with pytest.raises(CheckpointNotFoundError, match="iter_0010 and iter_10 are the same step; choose one with --tag"):
        dsconv.open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["dcp", "safetensors", "consolidated"])
def test_nemo_automodel_s_folders(form: str, tmp_path: Path) -> None:
    for step, seed in ((5, 1), (12, 2)):
        folder = tmp_path / f"epoch_0_step_{step}"
        if form == "dcp":
            truth = save(folder / "model", seed)
        else:
            truth = save_for_the_hub(folder / "model" / ("consolidated" if form == "consolidated" else ""), seed)
        save(folder / "optim", 7, "optim")
        (folder / "model/.hf_metadata").mkdir()
        (folder / "model/.hf_metadata/config.json").write_text("{}")
    found = holds(tmp_path, truth)
    assert (found.step, found.info["tag"]) == (12, "epoch_0_step_12")
    alone = holds(tmp_path / "epoch_0_step_12", truth)
    assert alone.folder.name == ".hf_metadata"
    report = dsconv.merge(tmp_path, fsync=False)
    assert (report.output, report.sidecars) == (str(tmp_path / "epoch_0_step_12-merged"), ["config.json"])
    shutil.rmtree(tmp_path / "epoch_0_step_12/model")
    assert holds(tmp_path, weights(1)).step == 5


def test_merge_takes_one_model_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    state = {"model": weights(1), "ema": weights(2), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    refused = command("merge", tmp_path / "ckpt", tmp_path / "out")
    assert refused.code == 3
    assert "holds 2 models: 'model' (3 tensors), 'ema' (3 tensors)" in " ".join(refused.err.split())
    done = command("merge", tmp_path / "ckpt", "--item", "ema", "--json")
    assert done.json["output"] == str(tmp_path / "ckpt-ema-merged")
    assert (done.json["item"], done.json["left_out"]) == ("ema", {"model": 3, "step": 1})
    merged = load_safetensors(tmp_path / "ckpt-ema-merged")
    assert merged.keys() == weights(2).keys()
    assert all(same(merged[name], tensor) for name, tensor in weights(2).items())
    shown = command("merge", tmp_path / "ckpt", tmp_path / "out", "--item", "model")
    assert "left out: 3 ema, 1 step" in shown.out
    other = command("merge", tmp_path / "ckpt-ema-merged", tmp_path / "more", "--item", "ema")
    assert "no model is called 'ema': there is one model, which needs no --item" in " ".join(other.err.split())
