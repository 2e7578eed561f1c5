"""``--fold-lora`` against PEFT's own ``merge_and_unload``, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dsconv
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, MalformedError, UnsupportedError
from tests.fixtures import gloo, peft_methods, peft_runs
from tests.trained import load_safetensors, same

LORAS = [name for name in peft_methods.METHODS if name.startswith("lora")]


def expect_model(found: Path, expected: dict[str, torch.Tensor], tied: bool = False) -> None:
    """Assert that a folder holds the model's state dict, with a tied lm_head once."""
    ours = load_safetensors(found)
    assert set(ours) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name, tensor in ours.items():
        assert same(tensor, expected[name]), f"{name}: {tensor.dtype}, expected {expected[name].dtype}"


def unloaded(base: nn.Module, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return state


def fold(source: Path, out: Path, config: Path, **options: Any) -> dsconv.MergeReport:
    return dsconv.merge(source, out, fold_lora=True, config_from=config, fsync=False, verify_output=True, **options)


@pytest.mark.parametrize("case", [case for case in peft_runs.CASES if case.startswith("lora")])
def test_every_lora_out_of_every_engine(case: str, tmp_path: Path) -> None:
    folder = gloo.ensure("peft_runs")[case]
    method, _ = peft_runs.CASES[case].options
    name = "default" if method == "lora-two" else None
    fold(folder / "ckpt", tmp_path / "out", folder / "peft", adapter_name=name)
    base = peft_methods.base_model(peft_methods.METHODS[method])
    expect_model(tmp_path / "out", unloaded(base, folder / "peft"), tied="tied" in method)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("method", LORAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_and_its_base(method: str, dtype: str, tmp_path: Path) -> None:
    """The base has the requested dtype, or is cast to it first, as from_pretrained(dtype=…) does."""
    made = peft_methods.METHODS[method]
    model = shaken(peft_methods.build(method))
    model.save_pretrained(tmp_path / "peft")
    base = peft_methods.base_model(made)
    base.save_pretrained(tmp_path / "base")
    expected = unloaded(base.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]), tmp_path / "peft")
    report = dsconv.merge(
        tmp_path / "peft", tmp_path / "out", fold_lora=True, base=tmp_path / "base", dtype=dtype, fsync=False
    )
    expect_model(tmp_path / "out", expected, tied="tied" in method)
    assert report.loadable is True


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def whole(model: nn.Module, settings: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Save a PEFT model's state dict and configuration, and return the model that PEFT merges it to."""
    from peft import LoraConfig, get_peft_model

    model.config.save_pretrained(folder)
    adapted = shaken(get_peft_model(model, LoraConfig(**settings)))
    torch.save(adapted.state_dict(), folder / "pytorch_model.bin")
    adapted.save_pretrained(folder / "peft")
    state: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return state


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_of_gpt2_is_stored_transposed(dora: bool, tmp_path: Path) -> None:
    """c_proj of the attention is square, so its shape does not show whether it is transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61))
    settings = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": dora}
    expected = whole(model, settings, tmp_path)
    fold(tmp_path / "pytorch_model.bin", tmp_path / "out", tmp_path / "peft")
    expect_model(tmp_path / "out", expected, tied=True)


@pytest.mark.parametrize("square", [False, True])
def test_experts_by_target_parameters(square: bool, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16 if square else 24, "num_hidden_layers": 1, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, tie_word_embeddings=False))
    settings = {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.gate_up_proj": 4},
    }
    expected = whole(model, settings, tmp_path)
    fold(tmp_path / "pytorch_model.bin", tmp_path / "out", tmp_path / "peft")
    expect_model(tmp_path / "out", expected)


def test_convolutions(tmp_path: Path) -> None:
    """A vision model embeds patches with a convolution whose kernel is as wide as its stride."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4))
    expected = whole(model, {"r": 2, "target_modules": ["projection"]}, tmp_path)
    fold(tmp_path / "pytorch_model.bin", tmp_path / "out", tmp_path / "peft")
    expect_model(tmp_path / "out", expected)


def test_an_untied_head_is_recorded_in_the_configuration(tmp_path: Path) -> None:
    """lm_head was trained separately, so tying it to the embeddings again would lose it."""
    made = peft_methods.lora(peft_methods.TIED, modules_to_save=["lm_head"])
    base = peft_methods.base_model(made)
    base.save_pretrained(tmp_path / "base")
    settings = {**peft_methods.CAUSAL, **made.settings}
    expected = whole(base, settings, tmp_path)
    dsconv.merge(tmp_path / "peft", tmp_path / "out", fold_lora=True, base=tmp_path / "base", fsync=False)
    ours = load_safetensors(tmp_path / "out")
    assert same(ours["lm_head.weight"], expected["lm_head.weight"])
    assert not same(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


GROWN: dict[str, dict[str, Any]] = {
    "saved-by-peft": {},
    "trained-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained-input": {"modules_to_save": ["embed_tokens"]},
    "lora-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-input": {"target_modules": ["q_proj", "embed_tokens"]},
}


def grown(settings: dict[str, Any], tied: bool, folder: Path) -> dict[str, torch.Tensor]:
    """Adapt a base to which tokens were added; save the base as it was and the adapter. What PEFT merges it to."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = peft_methods.base_model(peft_methods.lora({"tie_word_embeddings": tied}))
    base.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(model.config.vocab_size + 7)
    adapted = shaken(get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **settings})))
    adapted.save_pretrained(folder / "peft")
    state: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return state


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", GROWN)
def test_a_vocabulary_that_has_grown(kind: str, tied: bool, tmp_path: Path) -> None:
    """PEFT saves the resized embeddings, but of a layer with a LoRA only its own: the other's new rows are lost."""
    expected = grown(GROWN[kind], tied, tmp_path)
    if kind.startswith("lora"):
        with pytest.raises(InconsistentCheckpointError, match="is not in the adapter, so its new rows are lost here"):
            dsconv.merge(tmp_path / "peft", tmp_path / "out", fold_lora=True, base=tmp_path / "base")
        assert not (tmp_path / "out").exists()
        return
    report = dsconv.merge(tmp_path / "peft", tmp_path / "out", fold_lora=True, base=tmp_path / "base", fsync=False)
    expect_model(tmp_path / "out", expected)
    old, new = (json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] for name in ("base", "out"))
    assert (report.loadable, new) == (True, old + 7)


def test_a_head_of_another_size_is_no_vocabulary(tmp_path: Path) -> None:
    grown(GROWN["saved-by-peft"], False, tmp_path)
    saved = load_safetensors(tmp_path / "peft")
    hidden = saved["base_model.model.lm_head.weight"].shape[1]
    base = load_safetensors(tmp_path / "base") | {"score.weight": torch.ones(2, hidden)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    score = {"base_model.model.score.weight": torch.ones(3, hidden)}
    loras = {name: tensor for name, tensor in saved.items() if "lora_" in name}
    for tensors, expected in ((saved | score, "and 'score.weight' of"), (loras | score, "no vocab_size here is 2")):
        save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
        with pytest.raises(InconsistentCheckpointError, match=expected):
            dsconv.merge(tmp_path / "peft", tmp_path / "out", fold_lora=True, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["vera", "loha", "ia3", "adalora", "prompt-tuning"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    model = peft_methods.build(method)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    model.save_pretrained(tmp_path / "peft")
    kind = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"]
    with pytest.raises(UnsupportedError, match=f"of {kind}; --fold-lora folds LoRA"):
        fold(tmp_path / "model.bin", tmp_path / "out", tmp_path / "peft")


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    model = shaken(peft_methods.build("lora"))
    model.save_pretrained(tmp_path / "peft")
    torch.save(model.state_dict(), tmp_path / "model.bin")
    peft_methods.base_model(peft_methods.METHODS["lora"]).save_pretrained(tmp_path / "base")
    with pytest.raises(MalformedError, match="Name it with --base"):
        fold(tmp_path / "peft", tmp_path / "out", tmp_path / "peft")
    with pytest.raises(MalformedError, match="leave out --base"):
        fold(tmp_path / "model.bin", tmp_path / "out", tmp_path / "peft", base=tmp_path / "base")
    other = peft_methods.lora({"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1})
    peft_methods.base_model(other).save_pretrained(tmp_path / "small")
    with pytest.raises(InconsistentCheckpointError, match="belongs to another base"):
        fold(tmp_path / "peft", tmp_path / "out", tmp_path / "peft", base=tmp_path / "small")
    whole = load_safetensors(tmp_path / "peft") | {"base_model.model.lm_head.weight": torch.ones(4, 7)}
    (tmp_path / "head").mkdir()
    save_file(whole, tmp_path / "head" / "adapter_model.safetensors")
    with pytest.raises(InconsistentCheckpointError, match=r"does not fit 'lm_head\.weight'.*belongs to another base"):
        fold(tmp_path / "head", tmp_path / "out", tmp_path / "peft", base=tmp_path / "base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for change, expected in (
        ({"r": 8}, "gives it rank 8"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"a_new_setting": True}, "sets a_new_setting"),
        ({"init_lora_weights": "pissa"}, "changed the base's weights"),
    ):
        (tmp_path / "changed").mkdir(exist_ok=True)
        (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises((InconsistentCheckpointError, UnsupportedError), match=expected):
            fold(tmp_path / "peft", tmp_path / "out", tmp_path / "changed", base=tmp_path / "base")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="adapter_config"):
        fold(tmp_path / "model.bin", tmp_path / "out", tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_damaged_factor_is_noticed(tmp_path: Path) -> None:
    """The factors of a product are checked against their CRC-32s, just like copied tensors."""
    model = shaken(peft_methods.build("lora"))
    model.save_pretrained(tmp_path / "peft")
    path = tmp_path / "model.bin"
    torch.save(model.state_dict(), path)
    factor = next(tensor for name, tensor in model.state_dict().items() if "lora_B" in name)
    data = bytearray(path.read_bytes())
    at = data.find(factor.numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(MalformedError, match="CRC-32"):
        fold(path, tmp_path / "out", tmp_path / "peft")


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    for options in ({"adapter": True, "fold_lora": True}, {"adapter_name": "a"}, {"base": tmp_path}):
        with pytest.raises(ValueError, match="--"):
            dsconv.merge(tmp_path, tmp_path / "out", **options)
