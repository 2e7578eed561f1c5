"""The example scripts run as their first lines say, on two CPU ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trained import Trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("zero3_finetune", "step 3: loss "),
        ("tp_generate", "generated: [1, 2, 3, 4, 5, 6, 7, 8, "),
        ("resume_on_fewer_ranks", "resumed: loss "),
    ],
)
def test_example(script: str, says: str, trained: Callable[[str], Trained]) -> None:
    source = trained("llama_tied-z3-bf16-w3").checkpoint
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29411"]
    arguments = [
        str(ROOT / "tests" / "loaders" / "run_example.py"),
        str(ROOT / "examples" / f"{script}.py"),
        str(source),
    ]
    result = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert says in result.stdout
    assert "dsconv" not in result.stdout
