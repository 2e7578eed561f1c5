"""``--adapter`` writes what PEFT's own save_pretrained writes, bit for bit, for every method of the installed peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.errors import (
    CheckpointNotFoundError,
    InconsistentCheckpointError,
    MalformedError,
    UnsupportedError,
)
from tests.fixtures import gloo, peft_methods, peft_runs
from tests.trained import load_safetensors, same

CASES = list(peft_runs.CASES)
UNSAVED = {"shira"}  # its indices are in no state dict


def expect_adapter(found: Path, expected: Path) -> None:
    """Assert that both folders hold the same tensors, under the same names and in the same dtypes."""
    ours, theirs = load_safetensors(found), load_safetensors(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert same(ours[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_every_method_and_engine(case: str, tmp_path: Path) -> None:
    folder = gloo.ensure("peft_runs")[case]
    method, _ = peft_runs.CASES[case].options
    name = "default" if method == "lora-two" else None
    if method in UNSAVED:
        with pytest.raises(UnsupportedError, match="shira_indices"):
            merge(folder / "ckpt", tmp_path / "out", folder / "peft")
        return
    report = merge(folder / "ckpt", tmp_path / "out", folder / "peft", adapter_name=name, verify_output=True)
    expect_adapter(tmp_path / "out", folder / "peft")
    assert report.files == ["adapter_model.safetensors"]
    assert report.sidecars == ["adapter_config.json"]
    ours, theirs = ((place / "adapter_config.json").read_text() for place in (tmp_path / "out", folder / "peft"))
    assert json.loads(ours) == json.loads(theirs)
    if (folder / "saved").is_dir():
        merge(folder / "saved", tmp_path / "saved", folder / "peft")
        expect_adapter(tmp_path / "saved", folder / "peft")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for each method, with ``pytorch_model.bin`` and the files that PEFT saves."""
    root = tmp_path_factory.mktemp("built")
    for name in ("lora", "lora-two", "lora-modules", "adalora", "vera", "p-tuning"):
        model = peft_methods.build(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        torch.save(model.state_dict(), root / f"{name}.bin")
        model.save_pretrained(root / name)
    return root


def merge(source: Path, out: Path, config: Path, **options: Any) -> dsconv.MergeReport:
    return dsconv.merge(source, out, adapter=True, config_from=config, fsync=False, **options)


def logits_of(adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the base model with an adapter."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(peft_methods.base_model(peft_methods.METHODS["lora"]), adapter).eval()
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def test_peft_computes_the_same_logits(built: Path, tmp_path: Path) -> None:
    merge(built / "lora.bin", tmp_path / "out", built / "lora")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(logits_of(tmp_path / "out", ids), logits_of(built / "lora", ids))


def test_one_of_several_adapters(built: Path, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=r"2 adapters \(default, reference\).*--adapter-name"):
        merge(built / "lora-two.bin", tmp_path / "none", built / "lora-two")
    with pytest.raises(MalformedError, match="no adapter 'third'; --adapter-name takes one of default, reference"):
        merge(built / "lora-two.bin", tmp_path / "none", built / "lora-two", adapter_name="third")
    merge(built / "lora-two.bin", tmp_path / "second", built / "lora-two", adapter_name="reference")
    expect_adapter(tmp_path / "second", built / "lora-two" / "reference")
    report = merge(built / "lora-two.bin", tmp_path / "first", built / "lora-two", adapter_name="default")
    expect_adapter(tmp_path / "first", built / "lora-two")
    assert "also holds 'reference'" in report.warnings[0]


def test_the_config_of_another_adapter_is_refused(built: Path, tmp_path: Path) -> None:
    config = json.loads((built / "lora" / "adapter_config.json").read_text())
    for change, expected in (
        ({"r": config["r"] + 1}, rf"has rank {config['r']}, and adapter_config.json gives it rank {config['r'] + 1}"),
        ({"target_modules": ["up_proj"]}, "is not among target_modules"),
    ):
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InconsistentCheckpointError, match=expected):
            merge(built / "lora.bin", tmp_path / "out", tmp_path / "config")
        assert not (tmp_path / "out").exists()


def test_the_ranks_that_adalora_pruned_are_left_out(built: Path, tmp_path: Path) -> None:
    """peft's resize_state_dict_by_rank_pattern does the same."""
    config = json.loads((built / "adalora" / "adapter_config.json").read_text())
    layers = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    config["rank_pattern"] = {f"{layer}.lora_E": [True, False, True, True] for layer in layers}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "adapter_config.json").write_text(json.dumps(config))
    merge(built / "adalora.bin", tmp_path / "out", tmp_path / "config", verify_output=True)
    ours, whole = load_safetensors(tmp_path / "out"), load_safetensors(built / "adalora")
    for name, tensor in whole.items():
        kept = tensor[:, [0, 2, 3]] if name.endswith("lora_B") else tensor[[0, 2, 3]]
        assert same(ours[name], kept.contiguous()), name


def test_names_without_pefts_prefix_get_it(built: Path, tmp_path: Path) -> None:
    """A model made by ``model.add_adapter`` has no prefix, but transformers and PEFT save it with one."""
    state = torch.load(built / "lora.bin", weights_only=True)
    torch.save({name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}, tmp_path / "a.bin")
    merge(tmp_path / "a.bin", tmp_path / "out", built / "lora")
    expect_adapter(tmp_path / "out", built / "lora")


def test_a_vocabulary_that_has_grown_takes_its_embeddings_along(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    method = peft_methods.METHODS["lora"]
    peft_methods.base_model(method).save_pretrained(tmp_path / "base")
    base = peft_methods.base_model(method).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(64)
    model = get_peft_model(base, LoraConfig(**peft_methods.CAUSAL, **method.settings))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "model.bin")
    model.save_pretrained(tmp_path / "peft")
    assert any("embed_tokens" in name for name in load_safetensors(tmp_path / "peft"))
    base.config.save_pretrained(tmp_path)
    for config in (tmp_path / "peft", tmp_path):
        shutil.copy(tmp_path / "peft" / "adapter_config.json", tmp_path / "adapter_config.json")
        merge(tmp_path / "model.bin", tmp_path / f"out-{config.name}", config)
        expect_adapter(tmp_path / f"out-{config.name}", tmp_path / "peft")


def test_verls_three_settings_stand_in_for_the_configuration(built: Path, tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    meta = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    (tmp_path / "verl" / "lora_train_meta.json").write_text(json.dumps(meta))
    merge(built / "lora.bin", tmp_path / "out", tmp_path / "verl")
    expect_adapter(tmp_path / "out", built / "lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 8, ["q_proj", "v_proj"])
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(logits_of(tmp_path / "out", ids), logits_of(built / "lora", ids))
    (tmp_path / "verl" / "lora_train_meta.json").write_text(json.dumps({**meta, "r": 4}))
    with pytest.raises(InconsistentCheckpointError, match=r"r is 4, and .*lora_A.* has rank 2"):
        merge(built / "lora.bin", tmp_path / "none", tmp_path / "verl")


def test_missing_parts_are_reported(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"no adapter_config\.json beside the checkpoint"):
        merge(built / "lora.bin", tmp_path / "none", tmp_path / "empty")
    state = torch.load(built / "vera.bin", weights_only=True)
    torch.save(
        {name: tensor for name, tensor in state.items() if name != "base_model.vera_B.default"}, tmp_path / "v.bin"
    )
    with pytest.raises(InconsistentCheckpointError, match=r"VERA needs 'base_model\.vera_B\.default'"):
        merge(tmp_path / "v.bin", tmp_path / "none", built / "vera")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NEW_METHOD"}))
    with pytest.raises(UnsupportedError, match="NEW_METHOD"):
        merge(built / "lora.bin", tmp_path / "none", tmp_path)


def test_a_trained_tensor_that_peft_would_not_save_is_an_error(tmp_path: Path) -> None:
    """ZeRO records what was trained. A configuration that leaves a trained module out would lose it."""
    folder = gloo.ensure("peft_runs")["lora-modules-zero3"]
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    other = gloo.ensure("peft_runs")["lora-bias-all-zero3"]
    with pytest.raises(
        InconsistentCheckpointError, match=r"k_proj\.bias'.* was trained, and an adapter of LORA does not save"
    ):
        merge(other / "ckpt", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_whole_peft_model_is_not_a_model_that_loads(built: Path, tmp_path: Path) -> None:
    report = dsconv.merge(built / "lora.bin", tmp_path / "out", fsync=False)
    assert "--adapter" in report.warnings[0]
    assert "--fold-lora" in report.warnings[0]
