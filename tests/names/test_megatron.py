"""Megatron-core's names as Hugging Face's, against what Megatron Bridge's mappings make of the same models."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from dsconv import open_checkpoint, to_dcp
from dsconv.checkpoint.map.tensors import prove_tiling
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import InconsistentCheckpointError, OutputError, UnsupportedError, UsageError
from dsconv.names.choosing import names_of, with_hf_names
from tests.trained import same

DATA = Path(__file__).parents[1] / "data" / "names" / "megatron"
CASES = sorted(folder.name for folder in DATA.iterdir())


def converted(source: Path, config: Path) -> dict[str, torch.Tensor]:
    entries = with_hf_names(open_checkpoint(source), config / "config.json").values()
    for entry in entries:
        prove_tiling(entry)
    return load_tensors(entries)


@pytest.mark.parametrize("case", CASES)
def test_hf_names_are_those_of_megatron_bridge(case: str) -> None:
    found, truth = converted(DATA / case, DATA / case), load_file(DATA / case / "truth.safetensors")
    assert sorted(found) == sorted(truth)
    for name, tensor in truth.items():
        assert same(found[name], tensor), name


def test_the_family_is_named() -> None:
    assert names_of(open_checkpoint(DATA / "llama")) == "Megatron-core, GPTModel"
    assert names_of(open_checkpoint(DATA / "qwen3-moe")) == "Megatron-core, GPTModel with experts"


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    def refused(case: str, **changes: object) -> str:
        config = json.loads((DATA / case / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises((InconsistentCheckpointError, UnsupportedError)) as error:
            with_hf_names(open_checkpoint(DATA / case), tmp_path / "config.json")
        return str(error.value)

    assert "not that of 'decoder.layers.self_attention.linear_qkv.bias'" in refused("qwen2", model_type="llama")
    assert "is llama or qwen2 or qwen3" in refused("llama", model_type="gpt2")
    assert "expected 96 rows (4 groups of 1 query heads" in refused("llama", num_key_value_heads=4)
    assert "expected 64 rows (2 × intermediate_size)" in refused("llama", intermediate_size=32)
    assert "expected 32 rows (2 × moe_intermediate_size)" not in refused("qwen3-moe", moe_intermediate_size=32)
    assert "expected at least 100 rows (vocab_size)" in refused("llama", vocab_size=100)


def test_a_run_folder_gives_the_iteration_that_it_names(tmp_path: Path) -> None:
    run = shutil.copytree(DATA / "llama", tmp_path / "run")
    assert open_checkpoint(run).step == 10
    truth = load_file(DATA / "llama" / "truth.safetensors")
    assert same(converted(run / "iter_0000010", run)["lm_head.weight"], truth["lm_head.weight"])


def test_a_run_that_rotates_neighbours_is_refused(tmp_path: Path) -> None:
    run = shutil.copytree(DATA / "llama", tmp_path / "run")
    (warning,) = with_hf_names(open_checkpoint(run), run / "config.json").warnings
    assert "does not hold the run's arguments: --names hf assumes rotary_interleaved=False" in warning
    for interleaved in (False, True):
        arguments = argparse.Namespace(rotary_interleaved=interleaved, params_dtype=torch.float32)
        torch.save({"args": arguments, "iteration": 10}, run / "iter_0000010" / "common.pt")
        if not interleaved:
            assert with_hf_names(open_checkpoint(run), run / "config.json").warnings == ()
            continue
        with pytest.raises(UnsupportedError, match="the run's arguments set rotary_interleaved"):
            with_hf_names(open_checkpoint(run), run / "config.json")


def metadata_of(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


@pytest.mark.parametrize("case", CASES)
def test_the_way_back(case: str, tmp_path: Path) -> None:
    """torch reads what Megatron's models ask for, and finds the bytes that Megatron saved.

    make_megatron.py `back` does the same with megatron-core's own dist_checkpointing.load.
    """
    to_dcp(DATA / case / "truth.safetensors", tmp_path / "run", names="megatron", fsync=False)
    folder, original = tmp_path / "run" / "iter_0000000", DATA / case / "iter_0000010"
    ours, theirs = metadata_of(folder).state_dict_metadata, metadata_of(original).state_dict_metadata
    assert ours.keys() >= theirs.keys()
    assert all(isinstance(ours[key], type(each)) for key, each in theirs.items())
    truth = {
        name: tensor[:60] if name in ("embedding.word_embeddings.weight", "output_layer.weight") else tensor
        for name, tensor in load_tensors(open_checkpoint(original).values()).items()  # without the padding
    }
    found = {name: torch.empty_like(tensor) for name, tensor in truth.items()}
    objects = {key: io.BytesIO() for key, each in theirs.items() if isinstance(each, BytesStorageMetadata)}
    asked = {**found, **objects}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    torch.distributed.checkpoint.load(asked, checkpoint_id=folder, planner=planner, no_dist=True)
    for name, tensor in truth.items():
        assert same(found[name], tensor), name
    assert objects
    assert all(asked[key] == [None] for key in objects)
    assert torch.load(folder / "common.pt", weights_only=True) == {"iteration": 0, "checkpoint_version": 3.0}
    assert json.loads((folder / "metadata.json").read_text()) == json.loads((original / "metadata.json").read_text())
    assert open_checkpoint(tmp_path / "run").step == 0
    again, given = converted(tmp_path / "run", DATA / case), load_file(DATA / case / "truth.safetensors")
    assert sorted(again) == sorted(given)
    assert all(same(again[name], tensor) for name, tensor in given.items())


def test_from_torchtitan_to_megatron_and_back(tmp_path: Path) -> None:
    titan = DATA.parent / "torchtitan"
    for case in ("llama3", "qwen3-moe"):
        run, config = tmp_path / case, json.loads((titan / case / "config.json").read_text())
        shutil.copytree(titan / case / "step-3", run / "step-3")
        sizes = {"vocab_size": 64, "intermediate_size": 48, "moe_intermediate_size": 24}
        (run / "config.json").write_text(json.dumps({**config, **sizes}))
        to_dcp(run / "step-3", tmp_path / f"{case}-megatron", names="megatron", fsync=False)
        found, truth = converted(tmp_path / f"{case}-megatron", run), load_file(titan / case / "truth.safetensors")
        assert sorted(found) == sorted(truth)
        assert all(same(found[name], tensor) for name, tensor in truth.items())


def test_a_run_of_others_is_not_replaced(tmp_path: Path) -> None:
    source, run = DATA / "llama" / "truth.safetensors", tmp_path / "run"
    to_dcp(source, run, names="megatron", fsync=False)
    with pytest.raises(OutputError, match="already holds a Megatron-core checkpoint"):
        to_dcp(source, run, names="megatron", fsync=False)
    (run / "iter_0000000" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt belongs to no Megatron-core checkpoint"):
        to_dcp(source, run, names="megatron", fsync=False, force=True)
    (run / "iter_0000000" / "notes.txt").unlink()
    (run / "iter_0000005").mkdir()
    with pytest.raises(OutputError, match=r"holds another checkpoint \(iter_0000005\)"):
        to_dcp(source, run, names="megatron", fsync=False, force=True)
    (run / "iter_0000005").rmdir()
    to_dcp(source, run, names="megatron", fsync=False, force=True)
    with pytest.raises(UsageError, match="--prefix cannot be combined"):
        to_dcp(source, tmp_path / "other", names="megatron", prefix="model.")
