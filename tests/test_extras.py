"""Functions and commands that need an optional package name it in one line if it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN = (
    "torch", "transformers", "deepspeed", "huggingface_hub", "matplotlib", "safetensors", "accelerate", "peft",
    "fsspec", "plotly", "zstandard",
)  # fmt: skip
# A finder that hides these packages, as if only the core were installed.
HIDE = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""


def without_extras(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return the path of a model, in a folder with a run whose only checkpoint holds another one."""
    save_file({"w": torch.randn(3, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    save_file({"w": torch.randn(3, 4)}, tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("next(iter(dsconv.open_checkpoint(sys.argv[1]).values())).read()", "torch", "torch"),
        ("dsconv.load_zero3(sys.argv[1])", "torch", "train"),
        ("dsconv.load_tp(sys.argv[1], device_mesh=None)", "transformers", "train"),
        ("dsconv.stream_into(None, sys.argv[1])", "torch", "torch"),
        ("dsconv.push(sys.argv[1].rpartition('/')[0], 'org/model')", "huggingface_hub", "hub"),
        ("dsconv.merge(sys.argv[1], 'out', push_to_hub='org/model')", "huggingface_hub", "hub"),
        ("from dsconv.convert.watch import watch; watch('run', 'org/model', once=True)", "huggingface_hub", "hub"),
        ("dsconv.open_checkpoint('hf://org/model')", "hf://", "hub"),
        ("dsconv.open_checkpoint('s3://bucket/run')", "s3://", "s3"),
        ("dsconv.merge(sys.argv[1], 's3://bucket/run')", "s3://", "s3"),
    ],
)
def test_a_function_names_the_extra_that_it_needs(model: str, code: str, package: str, extra: str) -> None:
    call = f"import dsconv\ntry:\n    {code}\nexcept dsconv.errors.MissingPackageError as error:\n    print(error)"
    result = without_extras(call, model, cwd=Path(model).parent)
    assert not result.returncode, result.stderr
    assert package in result.stdout
    assert result.stdout.endswith(f"pip install 'dsconv-toolkit[{extra}]'\n"), result.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["estimate", "{model}", "--nproc", "2"], "train"),
        (["train", "{model}", "--output-dir", "{model}-run", "--steps", "1"], "train"),
        (["validate", "{model}", "--report", "{model}-report"], "train"),
        (["estimate", "{model}", "--nproc", "2", "--plot", "x.png"], "train"),
        (["inspect", "{model}", "--html", "x.html"], "html"),
        (["merge", "org/model"], "hub"),
        (["push", ".", "org/model"], "hub"),
        (["merge", "{model}", "out", "--push-to-hub", "org/model"], "hub"),
        (["zero-to-fp32", "{model}", "out", "--push-to-hub", "org/model"], "hub"),
        (["watch", "run", "--push-to-hub", "org/model"], "hub"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(model: str, command: list[str], extra: str) -> None:
    arguments = [part.format(model=model) for part in command]
    result = without_extras("from dsconv.cli import main; sys.exit(main())", *arguments, cwd=Path(model).parent)
    assert result.returncode == 3, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (Path(model).parent / "out").exists()
    assert "Traceback" not in result.stderr
    assert "bug in dsconv" not in result.stderr
    assert f"pip install 'dsconv-toolkit[{extra}]'" in result.stderr


def test_the_core_merges_and_verifies_without_any_extra(model: str, tmp_path: Path) -> None:
    for command in (
        ["inspect", model],
        ["merge", model, str(tmp_path / "out"), "--dtype", "bf16", "--verify"],
        ["verify", model, str(tmp_path / "out"), "--allow-cast"],
        ["to-dcp", model, str(tmp_path / "dcp")],
        ["doctor"],
    ):
        result = without_extras("from dsconv.cli import main; sys.exit(main())", *command)
        assert not result.returncode, (command, result.stderr)
