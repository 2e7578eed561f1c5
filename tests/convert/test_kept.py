"""What other trainers wrote, merged and loaded: small checkpoints that are kept, with the scripts that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from tests.fixtures.kept import DATA, KEPT, PEFT, Kept
from tests.trained import Trained, load_safetensors, same


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: f"{kept.folder}: {kept.saves}")
def test_merged_exactly_and_loads_as_it_says(kept: Kept, tmp_path: Path) -> None:
    made = Trained(kept.path)
    out = tmp_path / "out"
    report = dsconv.merge(kept.source, out, fsync=False, **kept.merge_options())
    merged = load_safetensors(out)
    kept.take_head(merged)
    made.check(merged, kept.cast)
    assert report.loadable is {None: None, "": False}.get(kept.loads, True)
    if kept.loads is None:
        return
    loads_with = report.loads_with.partition(".")[0]
    if kept.loads == PEFT:
        assert loads_with == PEFT
        assert kept.peft_loads(out)
        return
    import transformers

    assert kept.loads in ("", loads_with)
    _, info = getattr(transformers, loads_with).from_pretrained(out, output_loading_info=True)
    assert sorted(info["missing_keys"]) == report.missing
    assert sorted(info["unexpected_keys"]) == report.unexpected
    assert not info["mismatched_keys"]


# Weights that lie beside those that are read --------------------------------------------------------------------------


def test_a_value_head_beside_an_adapter_is_told(tmp_path: Path) -> None:
    report = dsconv.merge(DATA / "trl" / "lora" / "ckpt", tmp_path / "out", fsync=False)
    (warning,) = report.warnings
    assert "pytorch_model.bin was not read: it holds 2 tensors" in warning
    assert "'v_head.summary.weight' of shape [1, 16]" in warning
    dsconv.merge(DATA / "trl" / "lora" / "ckpt" / "pytorch_model.bin", tmp_path / "head", fsync=False)
    head, truth = load_safetensors(tmp_path / "head"), load_safetensors(DATA / "trl" / "lora" / "head.safetensors")
    assert head.keys() == truth.keys()
    assert all(same(head[name], tensor) for name, tensor in truth.items())


def test_two_adapters_of_one_folder_are_told_and_two_forms_of_one_save_are_not(tmp_path: Path) -> None:
    weights = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors")
    old = {**weights, "lm_head.weight": weights["a.weight"], "inv_freq": torch.ones(2), "mask": torch.ones(1, 1, 4, 4)}
    torch.save(old, tmp_path / "pytorch_model.bin")
    torch.save({"state": {0: {"exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}}, "param_groups": []},
               tmp_path / "adam.pt")  # fmt: skip
    torch.save({"lr": 0.1}, tmp_path / "settings.bin")
    save_file({"a.weight": torch.ones(3, 2)}, tmp_path / "consolidated.safetensors")
    assert dsconv.open_checkpoint(tmp_path).warnings == ()
    save_file({"x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    save_file({"summary.bias": torch.ones(1)}, tmp_path / "value_head.safetensors")
    warnings = dsconv.open_checkpoint(tmp_path).warnings
    assert [warning.partition(" was")[0] for warning in warnings] == [
        "adapter_model.safetensors",
        "value_head.safetensors",
    ]
    torch.save({**old, "extra.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert "'extra.weight' of shape [2, 2]" in dsconv.open_checkpoint(tmp_path).warnings[1]


def test_a_critic_is_told_from_a_language_model(tmp_path: Path) -> None:
    report = dsconv.merge(DATA / "verl" / "critic" / "ckpt" / "global_step_2", tmp_path / "out", fsync=False)
    (warning,) = report.warnings
    assert "AutoModelForTokenClassification.from_pretrained(…, num_labels=1)" in warning
    from transformers import AutoModelForTokenClassification

    model, info = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out", num_labels=1, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    truth = load_safetensors(DATA / "verl" / "critic" / "truth.safetensors")
    assert all(same(model.state_dict()[name], tensor) for name, tensor in truth.items())
