"""Test ``dsconv estimate`` as people and programs use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import dsconv

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_the_table_the_picture_and_the_verdict(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    result = dsconv("estimate", config.parent, "--fit", "80GB", "--nproc", "8", "--plot", picture)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert "8,030,261,248 parameters; 1 node × 8 GPUs, bf16" in lines[0]
    assert lines[2].split() == [
        "setting",
        "ideal",
        "DeepSpeed",
        "parameters",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "peak",
        "CPU",
        "a",
        "node",
        "NVMe",
        "a",
        "node",
        "checkpoint",
    ]
    assert sum(line.startswith("ZeRO-") for line in lines) == 16
    assert lines[-1].startswith("Cheapest that fits 80.00 GB: ZeRO-1 (")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_and_what_does_not_fit(config: Path) -> None:
    found = dsconv("estimate", config, "--json", "--fit", "8GB", "--tp", "2", "--tp", "1", "--nodes", "2").json
    assert found["model"]["parameters"] == 8_030_261_248
    assert found["job"]["world"] == 16
    assert found["fit"] is None
    assert {row["tp"] for row in found["settings"]} == {1, 2}
    first = found["settings"][0]
    assert first["gpu"]["parameters"] == 2 * 8_030_261_248
    assert first["ideal_model_states"] == 16 * 8_030_261_248
    assert first["deepspeed_estimator"] is None


def test_bad_input(config: Path, tmp_path: Path) -> None:
    usage = dsconv("estimate", config, "--tp", "3")
    assert (usage.code, "--tp 3 does not divide the 8 ranks of a node" in usage.err) == (2, True)
    absent = dsconv("estimate", tmp_path / "nothing")
    assert (absent.code, "no such file or folder" in absent.err) == (3, True)
    config.write_text('{"model_type": "no-such-kind"}')
    unknown = dsconv("estimate", config)
    assert (unknown.code, "transformers cannot build a model of this configuration" in unknown.err) == (3, True)
    config.unlink()
    empty = dsconv("estimate", tmp_path)
    assert (empty.code, "neither it nor its parent has a config.json" in empty.err) == (3, True)
