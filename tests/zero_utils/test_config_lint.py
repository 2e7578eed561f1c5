"""The lint says what is wrong, where, how serious it is, and what to write. tests/fixtures/config_running.py checks the
same against DeepSpeed.
"""

from __future__ import annotations

import json

import pytest

from dsconv import DSConfig
from dsconv.zero_utils.config_lint import Finding
from dsconv.zero_utils.config_recipes import RECIPES
from tests.fixtures.config_cases import BASE, CASES, Wrong


@pytest.mark.parametrize("wrong", CASES, ids=lambda wrong: f"{wrong.key}-{wrong.severity}")
def test_mistakes_are_found(wrong: Wrong) -> None:
    findings = DSConfig.read(BASE | wrong.config).lint()
    found = [finding for finding in findings if finding.key == wrong.key and wrong.fix in finding.fix]
    assert [finding.severity for finding in found] == [wrong.severity], findings
    assert all(finding.message.endswith(".") for finding in found)


def test_nothing_else_is_found() -> None:
    """A mistake is reported once, without its consequences."""
    for wrong in CASES:
        others = [f for f in DSConfig.read(BASE | wrong.config).lint() if f.key != wrong.key and f.severity == "error"]
        assert not others, (wrong, others)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_clean(name: str) -> None:
    assert DSConfig.read(RECIPES[name].config).lint(world_size=8) == []
    assert all(why and not why.endswith(".") for why in RECIPES[name].comments.values())


def test_an_everyday_config_is_clean() -> None:
    config = {
        "_comment": "for the small model",
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {"type": "adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "adam_w_mode": True}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": None,
            "stage3_prefetch_bucket_size": 5e7,
            "sub_group_size": 1e9,
        },
        "tensor_parallel": {"autotp_size": 2, "partition_config": {"layer_specs": []}},
        "data_types": {"keep_in_fp32_modules": "auto"},
    }
    assert DSConfig.read(config).lint(world_size=16) == []  # 16 processes, 2 of them for each shard of tensors


def test_batch_sizes_and_ranks() -> None:
    config = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert not DSConfig.read(config).lint()
    assert not DSConfig.read(config).lint(world_size=8)
    [finding] = DSConfig.read(config).lint(world_size=4)
    assert finding == Finding(
        "error",
        "train_batch_size",
        "32 is not micro-batch 2 × accumulation steps 2 × ranks 4 = 16.",
        "Set it to 16, or remove it: DeepSpeed multiplies.",
    )
    assert not DSConfig.read(config | {"sequence_parallel_size": 2}).lint(world_size=16)
    assert not DSConfig.read({"train_batch_size": 32}).lint(world_size=8)
    assert [f.key for f in DSConfig.read({"train_batch_size": 30}).lint(world_size=8)] == ["train_batch_size"]
    assert not DSConfig.read({"train_batch_size": 32.0, "train_micro_batch_size_per_gpu": 8}).lint(world_size=4)
    assert [f.key for f in DSConfig.read({}).lint()] == ["train_micro_batch_size_per_gpu"]
    assert not DSConfig.read({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}).lint(world_size=8)


def test_mistakes_in_the_text_itself() -> None:
    twice = DSConfig.read('{"train_batch_size": 8, "bf16": {"enabled": true, "enabled": false}}')
    assert [(f.severity, f.key) for f in twice.lint()] == [("error", "enabled")]
    commented = DSConfig.read("{\n  # what memory allows\n  train_batch_size: 8,\n}")
    assert commented.to_dict() == {"train_batch_size": 8}
    [finding] = commented.lint()
    assert (finding.severity, finding.key) == ("warning", "")
    assert "transformers" in finding.message


def test_errors_come_first() -> None:
    config = {
        "train_batch_size": 1,
        "unheard_of": 1,
        "amp": {},
        "zero_optimization": {"stage": 3, "round_robin_gradients": True},
    }
    assert [f.severity for f in DSConfig.read(json.dumps(config)).lint()] == ["error", "warning", "info"]
