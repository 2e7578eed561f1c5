"""Compare the conversion of torchtitan's names with torchtitan's own state-dict adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from dsconv import open_checkpoint, to_dcp
from dsconv.checkpoint.map.tensors import prove_tiling
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import DsconvError
from dsconv.names.choosing import with_hf_names
from dsconv.names.naming import recognise
from tests.trained import same

DATA = Path(__file__).parents[1] / "data" / "names" / "torchtitan"
# What the adapters leave out of Hugging Face's names.
LOST = {
    "qwen3-moe": ("layers.0.moe.expert_bias_E", "layers.1.moe.expert_bias_E"),
    "gpt-oss": ("layers.0.moe.expert_bias_E",),
}
FAMILIES = {
    "llama3": "llama3",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3",
    "deepseek-v3": "deepseek_v3",
    "deepseek-v3-lora": "deepseek_v3",
    "gpt-oss": "gpt_oss",
}


def converted(case: str) -> dict[str, torch.Tensor]:
    entries = with_hf_names(open_checkpoint(DATA / case / "step-3"), DATA / case / "config.json").values()
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


@pytest.mark.parametrize("case", FAMILIES)
def test_torchtitans_names_are_given_back(case: str, tmp_path: Path) -> None:
    """From what the adapter made to what the model held; torch's own reader reads it."""
    source = DATA / case / "truth.safetensors"
    if case == "gpt-oss":  # whose adapter loses the experts
        shutil.copy(DATA / case / "config.json", tmp_path)
        source = tmp_path / "model.safetensors"
        save_file(converted(case), source)
    original = open_checkpoint(DATA / case / "step-3")
    truth = load_tensors(entry for entry in original.values() if entry.name not in LOST.get(case, ()))
    to_dcp(source, tmp_path / "out", names="torchtitan", fsync=False)
    if case == "qwen3":  # the adapter drops the tied output layer, and its inverse ties it to the embedding
        truth["lm_head.weight"] = truth["tok_embeddings.weight"]
    found = {name: torch.empty_like(tensor) for name, tensor in truth.items()}
    torch.distributed.checkpoint.load(found, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert {*open_checkpoint(tmp_path / "out")} <= {*truth}
    for name, tensor in truth.items():
        assert same(found[name], tensor), name


def test_a_missing_part_and_an_unknown_tensor_are_refused(tmp_path: Path) -> None:
    tensors = load_file(DATA / "qwen3-moe" / "truth.safetensors")
    shutil.copy(DATA / "qwen3-moe" / "config.json", tmp_path)

    def refused(**changes: torch.Tensor | None) -> str:
        kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(DsconvError) as error:
            to_dcp(tmp_path, tmp_path / "out", names="torchtitan")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert f"'{lost}' is missing, of which 'layers.1.moe.routed" in refused(**{lost: None})
    assert "'model.layers.0.extra' is no tensor of a qwen3_moe" in refused(**{"model.layers.0.extra": torch.zeros(2)})
    assert "cannot join shapes" in refused(**{lost: torch.zeros(3, 2, dtype=torch.bfloat16)})


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
