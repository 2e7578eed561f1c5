"""Checkpoints that Megatron-core and torchao wrote, kept as data with the scripts that made them."""

from __future__ import annotations

from pathlib import Path

import torch

import dsconv
from tests.trained import load_safetensors, same

DATA = Path(__file__).resolve().parents[3] / "data"


def test_a_directory_of_megatron_core(tmp_path: Path) -> None:
    """Its .metadata names an enumeration, layers are stacked, and tensor-parallel shards are boxes of the tensor."""
    found = dsconv.open_checkpoint(DATA / "megatron_core" / "ckpt")
    assert (found.step, found.info["tag"], found.warnings) == (10, "iter_0000010", ())
    assert found.info["left_out"] == {"_extra_state": 8}
    live = load_safetensors(DATA / "megatron_core" / "live.safetensors")
    ranks = [{name[2:]: value for name, value in live.items() if name[0] == rank} for rank in "01"]
    merged = dsconv.merge(found, tmp_path / "out", fsync=False, verify_output=True)
    out = load_safetensors(tmp_path / "out")
    assert merged.tensors == len(out) == 9

    def joined(name: str, dim: int | None) -> torch.Tensor:
        return ranks[0][name] if dim is None else torch.cat([rank[name] for rank in ranks], dim)

    assert same(out["embedding.word_embeddings.weight"], joined("embedding.word_embeddings.weight", 0))
    assert same(out["output_layer.weight"], joined("output_layer.weight", 0))
    assert same(out["decoder.final_layernorm.weight"], joined("decoder.final_layernorm.weight", None))
    for layer in (0, 1):
        for name, dim in (("self_attention.linear_qkv", 0), ("self_attention.linear_proj", 1), ("mlp.linear_fc2", 1)):
            expected = joined(f"decoder.layers.{layer}.{name}.weight", dim)
            assert same(out[f"decoder.layers.{name}.weight"][layer], expected), name
        gate, up = zip(*(rank[f"decoder.layers.{layer}.mlp.linear_fc1.weight"].chunk(2) for rank in ranks), strict=True)
        assert same(out["decoder.layers.mlp.linear_fc1.weight"][layer], torch.cat([*gate, *up]))


def test_float8_wrappers_hold_full_precision(tmp_path: Path) -> None:
    dsconv.merge(DATA / "float8_fsdp" / "ckpt", tmp_path / "out", fsync=False, verify_output=True)
    out, truth = load_safetensors(tmp_path / "out"), load_safetensors(DATA / "float8_fsdp" / "truth.safetensors")
    assert out.keys() == truth.keys()
    assert all(same(out[name], tensor) for name, tensor in truth.items())
