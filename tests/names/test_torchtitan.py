"""Compare the conversion of torchtitan's names with torchtitan's own state-dict adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsconv import open_checkpoint
from dsconv.checkpoint.map.tensors import prove_tiling
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.names.naming import read_config, recognise, to_hf
from tests.trained import same

DATA = Path(__file__).parents[1] / "data" / "names" / "torchtitan"
FAMILIES = {
    "llama3": "llama3",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3",
    "deepseek-v3": "deepseek_v3",
    "deepseek-v3-lora": "deepseek_v3",
    "gpt-oss": "gpt_oss",
}


def converted(case: str) -> dict[str, torch.Tensor]:
    entries = to_hf(open_checkpoint(DATA / case / "step-3"), read_config([DATA / case])).values()
    for entry in entries:
        prove_tiling(entry)
    return load_tensors(entries)


@pytest.mark.parametrize("case", FAMILIES)
def test_hf_names_are_those_of_torchtitans_own_adapter(case: str) -> None:
    recognised = recognise(open_checkpoint(DATA / case / "step-3"))
    assert recognised is not None
    assert (recognised.family.name, recognised.unknown) == (FAMILIES[case], ())
    found, truth = converted(case), load_file(DATA / case / "truth.safetensors")
    if case == "gpt-oss":  # the adapter loses the experts; see below
        found = {name: tensor for name, tensor in found.items() if ".experts." not in name}
        truth = {name: tensor for name, tensor in truth.items() if name not in ("tokens", "experts")}
    assert sorted(found) == sorted(truth)
    for name, tensor in truth.items():
        assert same(found[name], tensor), name


def test_the_experts_of_gpt_oss_compute_what_torchtitans_do() -> None:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    found, truth = converted("gpt-oss"), load_file(DATA / "gpt-oss" / "truth.safetensors")
    prefix = "model.layers.0.mlp.experts."
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=24, num_local_experts=4)).bfloat16()
    experts.load_state_dict({name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)})
    chosen = torch.arange(4).repeat_interleave(2)[:, None]
    with torch.no_grad():
        output = experts(truth["tokens"], chosen, torch.ones(8, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(output, truth["experts"], rtol=0.02, atol=0.5)
