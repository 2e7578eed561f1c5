"""Functions and commands that need an optional package name it in one line if it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN = ("torch", "transformers", "deepspeed", "huggingface_hub", "matplotlib", "safetensors", "accelerate", "peft")
# A finder that hides these packages, as if only the core were installed.
HIDE = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code, *arguments], capture_output=True, text=True)


@pytest.fixture
def model(tmp_path: Path) -> str:
    save_file({"w": torch.randn(3, 4)}, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("next(iter(dsconv.open_checkpoint(sys.argv[1]).values())).read()", "torch", "torch"),
        ("dsconv.load_zero3(sys.argv[1])", "torch", "train"),
        ("dsconv.load_tp(sys.argv[1], device_mesh=None)", "transformers", "train"),
        ("dsconv.stream_into(None, sys.argv[1])", "torch", "torch"),
        ("dsconv.push(sys.argv[1].rpartition('/')[0], 'org/model')", "huggingface_hub", "hub"),
    ],
)
def test_a_function_names_the_extra_that_it_needs(model: str, code: str, package: str, extra: str) -> None:
    call = f"import dsconv\ntry:\n    {code}\nexcept dsconv.DsconvError as error:\n    print(error)"
    result = without_extras(call, model)
    assert not result.returncode, result.stderr
    assert package in result.stdout
    assert result.stdout.endswith(f"pip install 'dsconv-toolkit[{extra}]'\n"), result.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["estimate", "{model}", "--nproc", "2"], "train"),
        (["train", "{model}", "--output-dir", "{model}-run", "--steps", "1"], "train"),
        (["validate", "{model}", "--report", "{model}-report"], "train"),
        (["merge", "org/model"], "hub"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(model: str, command: list[str], extra: str) -> None:
    arguments = [part.format(model=model) for part in command]
    result = without_extras("from dsconv.cli import main; sys.exit(main())", *arguments)
    assert result.returncode in (3, 6), result.stderr
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
