"""Megatron-core's names as Hugging Face's, against what Megatron Bridge's mappings make of the same models."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsconv import open_checkpoint
from dsconv.checkpoint.map.tensors import prove_tiling
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.names.naming import names_of, read_config, to_hf
from tests.trained import same

DATA = Path(__file__).parents[1] / "data" / "names" / "megatron"
CASES = sorted(folder.name for folder in DATA.iterdir())


def converted(source: Path, config: Path) -> dict[str, torch.Tensor]:
    entries = to_hf(open_checkpoint(source), read_config([config])).values()
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
            to_hf(open_checkpoint(DATA / case), read_config([tmp_path]))
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
    (warning,) = to_hf(open_checkpoint(run), read_config([run])).warnings
    assert "does not hold the run's arguments: --names hf assumes rotary_interleaved=False" in warning
    for interleaved in (False, True):
        arguments = argparse.Namespace(rotary_interleaved=interleaved, params_dtype=torch.float32)
        torch.save({"args": arguments, "iteration": 10}, run / "iter_0000010" / "common.pt")
        if not interleaved:
            assert to_hf(open_checkpoint(run), read_config([run])).warnings == ()
            continue
        with pytest.raises(UnsupportedError, match="the run's arguments set rotary_interleaved"):
            to_hf(open_checkpoint(run), read_config([run]))
