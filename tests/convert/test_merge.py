"""What ``merge`` accepts and reports: dtypes, a folder merged into itself, and a target that already holds a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.errors import CheckpointNotFoundError, OutputError
from tests.cli.running import dsconv as command
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w3"
WRONG = ["int8", "float64", "fp8", "float8_e4m3fn", "", "bf-16", 16, b"bf16", torch.int8, torch.float64, float]


@pytest.mark.parametrize("given", WRONG, ids=str)
@pytest.mark.parametrize("convert", [dsconv.merge, dsconv.to_dcp])
def test_unsupported_dtypes(
    convert: Callable[..., Any], given: Any, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"unknown dtype .*: use fp32, bf16 or fp16"):
        convert(trained(CASE).checkpoint, tmp_path / "out", dtype=given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_the_ways_to_name_a_dtype(given: Any, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", dtype=given, fsync=False)
    trained(CASE).check(load_safetensors(tmp_path / "out"), torch.bfloat16)


def test_a_folder_that_is_merged_into_itself_keeps_its_files(
    copied: Callable[[str], Path], trained: Callable[[str], Trained]
) -> None:
    """The config beside the weights now names their dtype. Nothing else changes, and no parent's config is used."""
    save_dir = copied(CASE)
    config = {"model_type": "llama", "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "mine": [1]}
    (save_dir / "config.json").write_text(json.dumps(config))
    (save_dir / "tokenizer.json").write_text("{}")
    (save_dir.parent / "config.json").write_text(json.dumps({"dtype": "float16"}))
    before = {path: path.stat().st_ino for path in save_dir.rglob("*") if path.name != "config.json"}
    report = dsconv.merge(save_dir, save_dir, fsync=False)
    assert report.sidecars == ["config.json"]
    found = json.loads((save_dir / "config.json").read_text())
    assert found == {**config, "dtype": "float32", "text_config": {"torch_dtype": "float32"}}
    assert {path: path.stat().st_ino for path in before} == before
    trained(CASE).check(load_safetensors(save_dir))
    dsconv.merge(save_dir / "global_step2", save_dir, dtype="bf16", force=True, fsync=False)
    assert json.loads((save_dir / "config.json").read_text()) == config


def test_a_different_file_beside_the_weights_is_not_replaced(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=r"already holds a model \(config\.json\); give --force to replace it"):
        dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == '{"mine": 1}'
    shutil.copy(trained(CASE).checkpoint / "config.json", out)
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)  # replacing the same file loses nothing
    (out / "config.json").write_text('{"mine": 1}')
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False, force=True)
    assert (out / "config.json").read_bytes() == (trained(CASE).checkpoint / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["merge", "to-dcp", "to-universal"])
def test_a_dry_run_refuses_what_the_run_refuses(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source, out = trained(CASE).checkpoint, tmp_path / "out"
    assert command(name, source, out, "--dry-run").code == 0
    assert command(name, source, out, "--no-fsync").code == 0
    dry, real = command(name, source, out, "--dry-run"), command(name, source, out)
    assert dry.code == real.code == 3
    assert dry.err == real.err
    assert "already holds" in dry.err
    assert command(name, source, out, "--dry-run", "--force").code == 0
    (tmp_path / "file").touch()
    below = command(name, source, tmp_path / "file" / "out", "--dry-run")
    assert below.code == 3
    assert "is a file" in below.err


def test_a_trainers_output_folder(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """The checkpoint of the largest number is taken, and --tag takes another; what is not clear is refused."""
    made = trained("llama_tied-z3-bf16-w2-trainer")
    run = tmp_path / "run"
    for name in ("checkpoint-10", "checkpoint-9"):
        shutil.copytree(made.checkpoint, run / name)
    report = dsconv.merge(run, tmp_path / "out", fsync=False)
    assert report.source == str(run / "checkpoint-10" / "global_step2")
    assert report.warnings == ["took checkpoint-10, the newest of 2 checkpoints; --tag chooses another"]
    made.check(load_safetensors(tmp_path / "out"))
    report = dsconv.merge(run, tmp_path / "nine", tag="checkpoint-9", fsync=False)
    assert (report.source, report.warnings) == (str(run / "checkpoint-9" / "global_step2"), [])
    with pytest.raises(CheckpointNotFoundError, match=r"choose one with --tag.*: checkpoint-9, checkpoint-10"):
        dsconv.open_checkpoint(run, tag="checkpoint-8")
    (run / "checkpoint-11").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"checkpoint-11 is the newest .* its save did not end"):
        dsconv.open_checkpoint(run)
    (run / "checkpoint-11").rmdir()
    (run / "training_args.bin").touch()
    assert dsconv.open_checkpoint(run).folder == run / "checkpoint-10"
    shutil.copy(made.folder / "truth.safetensors", run / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"such as --tag checkpoint-10, or name the model's file"):
        dsconv.open_checkpoint(run)


def test_zero_to_fp32_of_a_model_without_masters_says_so(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model" / "model.safetensors")
    ran = command("zero-to-fp32", tmp_path / "model", tmp_path / "out")
    assert ran.code == 0
    assert "checkpoint, which holds no fp32 masters: its tensors keep their stored dtype" in ran.err
    shutil.rmtree(tmp_path / "out")
    ran = command("zero-to-fp32", tmp_path / "model", tmp_path / "out", "--dtype", "fp32")
    assert "masters" not in ran.err
    assert load_safetensors(tmp_path / "out")["w"].dtype == torch.float32
