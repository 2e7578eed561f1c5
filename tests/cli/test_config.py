"""``dsconv config`` as people and scripts use it: findings, the resolved config, recipes, and exit codes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from dsconv.zero_utils.config_recipes import RECIPES
from tests.cli.running import dsconv

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
}
VALUES = (
    "--world",
    "4",
    "--micro-batch",
    "2",
    "--grad-accum",
    "1",
    "--lr",
    "1e-4",
    "--betas",
    "0.9",
    "0.95",
    "--dtype",
    "bf16",
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 100}')
    return tmp_path / "ds.json"


def test_every_value_is_resolved(written: Path) -> None:
    found = dsconv("config", written, *VALUES, "--model", written.parent, "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json == {
        "source": str(written),
        "stage": 3,
        "offload": False,
        "dtype": "bfloat16",
        "findings": [],
        "mismatches": [],
        "auto": [],
        "resolved": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": 10_000},
        },
    }
    assert json.loads(written.read_text()) == CONFIG


def test_findings_and_mismatches_for_people(written: Path) -> None:
    config = CONFIG | {"gradient_cliping": 1.0, "communication_timeout": 60}
    written.write_text(json.dumps(config))
    wrong = dsconv("config", written)
    assert wrong.code == 3
    assert wrong.out.startswith(
        f"{written}: ZeRO-3, precision not known yet\n"
        "error    gradient_cliping\n"
        "         DeepSpeed reads no such key at the top level, and silently ignores it. Write gradient_clipping.\n"
        "warning  communication_timeout\n"
        "         Nothing reads it, so the timeout is not changed. Remove it."
    )
    assert "  optimizer.params.lr: learning_rate\n" in wrong.out
    assert json.loads(wrong.out[wrong.out.index("\n{\n") :]) == config
    assert wrong.err == f"Error: 1 error in {written}\n"
    both = dsconv("config", json.dumps(config | {"train_batch_size": 9}), *VALUES, "--quiet")
    assert (both.code, both.out, both.err) == (5, "", "Error: 2 errors and 1 mismatch in ds_config\n")
    told = dsconv("config", json.dumps({"train_batch_size": 9}), *VALUES, "--json")
    assert told.code == 5
    assert told.json["mismatches"] == [
        {
            "key": "train_batch_size",
            "found": 9,
            "expected": 8,
            "argument": "world_size × per_device_train_batch_size × gradient_accumulation_steps",
        }
    ]


def test_a_warning_is_not_a_failure() -> None:
    encoded = base64.urlsafe_b64encode(b'{"train_batch_size": 8, "communication_timeout": 7200}').decode()
    found = dsconv("config", encoded, "--json")
    assert found.code == 0
    assert [(row["severity"], row["key"]) for row in found.json["findings"]] == [("warning", "communication_timeout")]


def test_recipes() -> None:
    listed = dsconv("config", "--list-recipes")
    assert [line.split()[0] for line in listed.out.splitlines()] == list(RECIPES)
    recipe = dsconv("config", "--recipe", "zero3-offload-cpu")
    assert recipe.json == RECIPES["zero3-offload-cpu"].config
    for key in RECIPES["zero3-offload-cpu"].comments:
        assert f"  {key} " in recipe.err
    filled = dsconv("config", "--recipe", "zero2", "--lr", "0.001", "--quiet")
    assert filled.err == ""
    assert filled.json["optimizer"]["params"]["lr"] == filled.json["scheduler"]["params"]["warmup_max_lr"] == 0.001
    whole = dsconv("config", "--recipe", "zero1", "--json").json
    assert whole["config"] == RECIPES["zero1"].config
    assert whole["comments"] == RECIPES["zero1"].comments


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Give either DS_JSON or --recipe"),
        (["ds.json", "--recipe", "zero2"], 2, "Give either DS_JSON or --recipe"),
        (["--recipe", "zero4"], 2, "There is no recipe 'zero4'. The recipes are zero1, zero2"),
        (["gone.json"], 3, "gone.json: no such file"),
        (["{"], 3, "not JSON"),
        (['{"train_batch_size": 1}', "--model", "gone/"], 3, "no such file; --model is a folder with config.json"),
        (
            ['{"train_batch_size": 1}', "--model", "nobody/nothing"],
            6,
            "the cache holds no config.json of nobody/nothing",
        ),
    ],
)
def test_bad_input(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    found = dsconv("config", *arguments, cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[2]), HF_HUB_OFFLINE="1")
    assert (found.code, found.out) == (code, "")
    assert says in found.err
