"""DSConfig: what it reads, what it reports, and that it does not change its input."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsconv import DSConfig
from dsconv.errors import CheckpointNotFoundError, ConfigMismatchError, MalformedError, UnsupportedError
from dsconv.loaders.zero3 import load_zero3
from dsconv.zero_utils.config_auto import AUTO_KEYS, TrainingValues, hidden_size_of
from dsconv.zero_utils.config_keys import lookup
from dsconv.zero_utils.config_recipes import RECIPES

CONFIG = {
    "train_batch_size": "auto",
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
}
JSON = json.dumps(CONFIG)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
names = st.sampled_from(sorted({part for key in AUTO_KEYS for part in key.split(".")})) | st.text(max_size=8)
configs = st.dictionaries(
    names, values | st.dictionaries(names, values | st.dictionaries(names, values, max_size=4), max_size=4), max_size=8
)


def path(folder: Path, text: str) -> Path:
    (folder / "ds.json").write_text(text, encoding="utf-8")
    return folder / "ds.json"


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: CONFIG,
        lambda folder: path(folder, JSON),
        lambda folder: str(path(folder, JSON)),
        lambda folder: JSON,
        lambda folder: f"\n {JSON}",
        lambda folder: base64.urlsafe_b64encode(JSON.encode()).decode(),
        lambda folder: DSConfig.read(CONFIG),
    ],
    ids=["dict", "Path", "str", "JSON", "JSON with space", "base64", "DSConfig"],
)
def test_every_form(form: Callable[[Path], Any], tmp_path: Path) -> None:
    config = DSConfig.read(form(tmp_path))
    assert config.to_dict() == CONFIG
    assert (config.stage, config.is_zero1, config.is_zero2, config.is_zero3) == (3, False, False, True)
    assert config.is_offload
    assert config.dtype == "bfloat16"
    assert config.get("zero_optimization.offload_optimizer.device") == "cpu"
    assert config.get("zero_optimization.offload_param.device", "none") == "none"
    assert config.get("bf16.enabled.deeper") is None
    assert config.auto_keys == ["train_batch_size"]


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("no/such.json", CheckpointNotFoundError, r"no/such\.json: no such file, and neither JSON nor base64"),
        ("bm90IGpzb24=", CheckpointNotFoundError, "neither JSON nor base64"),
        ("x" * 5000, CheckpointNotFoundError, "x…: no such file"),
        ("a\0b", CheckpointNotFoundError, "no such file"),
        ("", CheckpointNotFoundError, "expected a DeepSpeed config"),
        ('{"a": ', MalformedError, "ds_config: the DeepSpeed config is not JSON"),
        (b"[1, 2]", MalformedError, "is list; expected an object"),
        (b"\xff\xfe\x00", MalformedError, "not text in UTF-8"),
        (b"{" * 100_000, MalformedError, "not JSON"),
        (b"", MalformedError, "expected an object"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, MalformedError, "nested more than 64 deep"),
        (b" " * ((16 << 20) + 1), MalformedError, "a small text file"),
        (None, CheckpointNotFoundError, "cannot be read: Is a directory"),
    ],
)
def test_invalid_configs(source: str | bytes | None, error: type[Exception], says: str, tmp_path: Path) -> None:
    given: Any = tmp_path if source is None else source
    if isinstance(source, bytes):
        given = tmp_path / "ds.json"
        given.write_bytes(source)
    with pytest.raises(error, match=says):
        DSConfig.read(given)


def test_stage_and_dtype() -> None:
    def of(**config: Any) -> DSConfig:
        return DSConfig.read(config)

    assert of().stage == 0
    assert of(zero_optimization={}).stage == 0
    assert of(zero_optimization=True).stage == 1
    assert of(zero_optimization={"stage": 2.0}).is_zero2
    for bad in ("3", 4, -1, None, True, [3], 2.5):
        with pytest.raises(MalformedError, match=r"zero_optimization\.stage is .*; expected 0, 1, 2 or 3"):
            _ = of(zero_optimization={"stage": bad}).stage
    assert not of(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}).is_offload
    assert not of(zero_optimization={"stage": 3, "offload_optimizer": {"device": "none"}}).is_offload
    assert of(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}}).is_offload
    assert of().dtype == "float32"
    assert of(bf16={"enabled": False}, fp16={"enabled": True}).dtype == "float16"
    assert of(bfloat16={"enabled": True}).dtype == "bfloat16"
    with pytest.raises(MalformedError, match='enabled is "auto"; resolve'):
        _ = of(bf16={"enabled": "auto"}).dtype
    assert of(bf16={"enabled": "auto"}).resolved(TrainingValues(bf16=False)).dtype == "float32"


def test_it_is_frozen_and_a_copy() -> None:
    source: dict[str, Any] = json.loads(JSON)
    config = DSConfig.read(source)
    source["zero_optimization"]["stage"] = 1
    config.to_dict()["zero_optimization"]["stage"] = 2
    config.get("zero_optimization")["stage"] = 0
    assert config.stage == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.source = "other"  # type: ignore[misc]
    config.resolved(TrainingValues(world_size=2, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert config.to_dict() == CONFIG


def test_mismatches_are_reported_together() -> None:
    config = DSConfig.read(
        {"train_batch_size": 32, "gradient_clipping": 1, "optimizer": {"params": {"lr": 0.1, "eps": "auto"}}}
    )
    given = TrainingValues(
        world_size=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        learning_rate=0.2,
        adam_epsilon=1e-6,
    )
    with pytest.raises(ConfigMismatchError) as caught:
        config.resolved(given)
    assert (
        str(caught.value) == "ds_config: train_batch_size is 32, but world_size × per_device_train_batch_size ×"
        " gradient_accumulation_steps is 8; optimizer.params.lr is 0.1, but learning_rate is 0.2. Make them equal,"
        ' or write "auto" in the config'
    )
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 5
    searching = dataclasses.replace(given, auto_find_batch_size=True, learning_rate=None)
    assert config.resolved(searching).get("optimizer.params.eps") == 1e-6


def test_unknown_values_stay_auto() -> None:
    recipe = DSConfig.read(RECIPES["zero3"].config)
    untouched = recipe.resolved(TrainingValues())
    assert untouched.to_dict() == recipe.to_dict() == RECIPES["zero3"].config
    assert (
        DSConfig.read({"scheduler": {"params": {"warmup_min_lr": "auto"}}}).resolved(TrainingValues()).auto_keys == []
    )
    assert set(untouched.auto_keys) == set(AUTO_KEYS) - {"fp16.enabled", "scheduler.params.warmup_min_lr"}
    assert recipe.resolved(TrainingValues(warmup_steps=0.1)).get("scheduler.params.warmup_num_steps") == "auto"
    assert recipe.resolved(TrainingValues(warmup_steps=0)).get("scheduler.params.warmup_num_steps") == 1
    assert (
        recipe.resolved(TrainingValues(warmup_steps=0.1, num_training_steps=95)).get(
            "scheduler.params.warmup_num_steps"
        )
        == 10
    )
    sizes = recipe.resolved(TrainingValues(hidden_size=1001)).get("zero_optimization")
    assert sizes["reduce_bucket_size"] == 1_002_001
    assert sizes["stage3_prefetch_bucket_size"] == 901_800
    assert sizes["stage3_param_persistence_threshold"] == 10_010


def test_hidden_sizes() -> None:
    assert hidden_size_of({"hidden_size": 8}) == 8
    assert hidden_size_of({"hidden_sizes": [4, 16, 8], "text_config": {"hidden_size": 2}}) == 16
    assert hidden_size_of({"text_config": {"hidden_size": 12}}) == 12
    assert hidden_size_of({"text_config": {"hidden_sizes": [3, 5]}}) == 5
    assert hidden_size_of({"n_embd": 8}) is None
    assert hidden_size_of(None) is None


@settings(max_examples=60)
@given(configs)
def test_any_config_is_read_linted_and_resolved(config: dict[str, Any]) -> None:
    """Any values give findings or dsconv's own errors, and never change the input."""
    before = json.dumps(config)
    read = DSConfig.read(config)
    read.lint()
    read.lint(world_size=4)
    given = TrainingValues(4, 2, 1, 1.0, 1e-3, 0.9, 0.95, 1e-8, 0.1, False, True, 0.1, 100, 64, True)
    filled, mismatches = read.filled(given)
    for key in AUTO_KEYS:
        if lookup(config, key) == "auto" and not key.startswith("zero_optimization.stage3"):
            assert filled.get(key) != "auto"
    assert not {mismatch.key for mismatch in mismatches} & set(read.auto_keys)
    assert json.dumps(config) == before


def test_load_zero3_reads_its_config_here(tmp_path: Path) -> None:
    for source, says in (
        ({"zero_optimization": {"stage": 2}}, "ds_config has ZeRO stage 2"),
        ({}, "ds_config has ZeRO stage 0"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            load_zero3(tmp_path, source)
    with pytest.raises(CheckpointNotFoundError, match="no such file, and neither JSON"):
        load_zero3(tmp_path, "gone.json")


def test_deepspeed_is_not_needed() -> None:
    code = """
import sys
for name in ("torch", "deepspeed", "transformers", "accelerate", "numpy", "hjson"):
    sys.modules[name] = None
from dsconv.zero_utils.config import DSConfig
from dsconv.zero_utils.config_auto import TrainingValues
config = DSConfig.read('{"train_batch_size": "auto", "zero_optimizations": {"stage": 2}}')
resolved = config.resolved(TrainingValues(2, 2, 2)).to_dict()
print([finding.fix for finding in config.lint()], resolved["train_batch_size"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "['Write zero_optimization.'] 8\n"


def test_the_page_has_every_recipe_and_every_auto_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        assert f"### {recipe.name}\n{recipe.summary}\n" in page
        for key, value, why in recipe.rows:
            assert f"| `{key}` | `{json.dumps(value)}` | {why} |\n" in page
    for key, argument in AUTO_KEYS.items():
        assert f"| `{key}` | {argument}" in page
