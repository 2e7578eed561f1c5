"""FP8 weights with a scale for each block, as bf16 and fp32: compared with transformers' own dequantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import dsconv
from dsconv.errors import UnsupportedError
from tests.trained import load_safetensors, same

FP8 = torch.float8_e4m3fn
SCHEME = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def model(folder: Path, scheme: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A folder with these tensors, and a config.json that names the scheme."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": scheme or SCHEME}))
    return folder


def merged(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    dsconv.merge(source, out, fsync=False, verify_output=True, **options)
    return load_safetensors(out)


def codes(*shape: int) -> torch.Tensor:
    """All codes of FP8, NaN too, in random order."""
    torch.manual_seed(3)
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_as_transformers_dequantizes(dtype: str, tmp_path: Path) -> None:
    exponents = torch.randint(96, 160, (2, 3), dtype=torch.uint8)
    pairs = {
        "a": (codes(256, 384), torch.rand(2, 3) / 100),
        "stack": (codes(3, 256, 128), torch.rand(3, 2, 1)),
        "half": (codes(128, 128), torch.rand(1, 1).bfloat16()),
        "power": (codes(256, 384), exponents.view(torch.float8_e8m0fnu)),
        "byte": (codes(256, 384), exponents.clone()),
        "whole": (codes(100, 60), torch.tensor(0.37)),
        "blocks of another size": (codes(64, 96), torch.rand(2, 3)),
    }
    tensors = {f"{name}.weight": weight for name, (weight, _) in pairs.items()}
    tensors |= {f"{name}.weight_scale_inv": scale for name, (_, scale) in pairs.items()}
    source = model(tmp_path / "fp8", **tensors, **{"norm.weight": torch.rand(5).bfloat16()})
    found = merged(source, tmp_path / "out", dtype=dtype)
    assert found.keys() == {*(f"{name}.weight" for name in pairs), "norm.weight"}
    for name, (weight, scale) in pairs.items():
        truth = Fp8Dequantize(None)._dequantize_one(weight, scale, getattr(torch, dtype))
        assert same(found[f"{name}.weight"], truth), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": dtype}
    assert dsconv.verify(source, tmp_path / "out", allow_cast=True).equal


def test_edges_are_blocks_too_as_in_deepseek(tmp_path: Path) -> None:
    """A matrix of 576 rows has five rows of blocks of 128, which transformers 5.24 refuses."""
    weight, scale = codes(576, 200), torch.rand(5, 2)
    source = model(tmp_path / "fp8", **{"kv.weight": weight, "kv.weight_scale_inv": scale})
    (found,) = merged(source, tmp_path / "out", dtype="bf16").values()
    rows = scale.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    assert same(found, (weight.float() * rows).bfloat16())


def test_a_model_loads_as_from_pretrained_loads_it(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, architectures=["LlamaForCausalLM"], **sizes)
    weights = LlamaForCausalLM(config).bfloat16().state_dict()
    for name in [name for name in weights if "_proj." in name]:
        rows, columns = weights[name].shape
        weights[name] = codes(rows, columns).float().nan_to_num().to(FP8)
        weights[f"{name}_scale_inv"] = torch.rand(rows // 32, columns // 32)
    source = tmp_path / "fp8"
    source.mkdir()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {**SCHEME, "weight_block_size": [32, 32]}
    config.save_pretrained(source)
    report = dsconv.merge(source, tmp_path / "out", dtype="bf16", fsync=False)
    assert (report.loadable, report.left_out) == (True, {"scales of FP8 weights": 7})
    scheme = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=scheme)
    found = load_safetensors(tmp_path / "out")
    for name, tensor in theirs.state_dict().items():
        assert same(found[name], tensor), name
    kept = merged(source, tmp_path / "kept")  # without --dtype
    assert all(same(kept[name], tensor) for name, tensor in weights.items())


def test_other_schemes_are_refused_by_name(tmp_path: Path) -> None:
    weight, scale = codes(128, 128), torch.rand(1, 1)

    def refused(scheme: dict[str, Any] | None = None, **tensors: torch.Tensor) -> str:
        source = model(tmp_path / "fp8", scheme, **{name.replace("_", ".", 1): each for name, each in tensors.items()})
        with pytest.raises(UnsupportedError) as error:
            dsconv.merge(source, tmp_path / "out", dtype="bf16")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    other = {"quant_method": "compressed-tensors"}
    assert "names the scheme 'compressed-tensors'" in refused(other, a_weight=weight, a_weight_scale=scale)
    assert "'a.weight' is float8_e4m3fn without a scale 'a.weight_scale_inv'" in refused(a_weight=weight)
    assert "'a.weight_scale_inv' is the scale of a weight that is not there" in refused(
        a_weight_scale_inv=scale.clone(), b_weight=weight.clone(), b_weight_scale_inv=scale
    )
    packed = torch.zeros(128, 64, dtype=torch.int8)
    assert "'a.weight' is int8 [128, 64] with scales of float32" in refused(a_weight=packed, a_weight_scale_inv=scale)
    assert "has scales of shape [3, 1]; expected one for each block of 128 × 128" in refused(
        a_weight=weight, a_weight_scale_inv=torch.rand(3, 1)
    )
    assert "weight_block_size is 'big'" in refused(
        {**SCHEME, "weight_block_size": "big"}, a_weight=weight, a_weight_scale_inv=scale
    )


def test_to_dcp_dequantizes_and_refuses_what_it_cannot_rearrange(tmp_path: Path) -> None:
    weight, scale = codes(256, 128), torch.rand(2, 1)
    source = model(tmp_path / "fp8", **{"a.weight": weight, "a.weight_scale_inv": scale})
    dsconv.to_dcp(source, tmp_path / "dcp", dtype="bf16", fsync=False)
    truth = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert same(dsconv.open_checkpoint(tmp_path / "dcp")["a.weight"].read(), truth)
    titan = Path(__file__).parents[1] / "data" / "names" / "torchtitan" / "qwen3-moe"
    tensors = load_safetensors(titan / "truth.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors |= {name: tensors[name].to(FP8), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((titan / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight' is computed, .* merge .* --dtype first"):
        dsconv.to_dcp(tmp_path, tmp_path / "out", dtype="bf16", names="torchtitan")
