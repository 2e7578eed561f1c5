"""Runs that resume at stage 0, where DeepSpeed cannot load another layout and the engine does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsconv.engine import Layout, RunOptions, resume
from dsconv.engine.matrix import scenarios
from dsconv.engine.validation import Validation
from dsconv.errors import UnsupportedError


def test_a_run_resumes_without_zero(tiny_llama: Path, tmp_path: Path) -> None:
    options = RunOptions(str(tiny_llama), "", 4, Layout(nproc=2), seq_len=16, batch_size=4, warmup=3)
    (scenario,) = scenarios(2, False, ("zero1-bf16",))
    validation = Validation(tmp_path, options, [scenario])
    validation.check(scenario, "another stage")
    (cell,) = validation.cells
    assert cell.passed, cell
    assert cell.evidence["resumed as"] == "zero0 × 2"
    assert cell.evidence["tensors compared"] == 3 * 20  # masters, exp_avg, exp_avg_sq
    runs = validation.runs
    target = scenario.targets["another stage"]
    assert isinstance(target, Layout)
    assert runs.elsewhere(scenario, target, None).curve("lr") == runs.whole(scenario, target, 0.0).curve("lr")
    run = runs.whole(scenario, scenario.layout, 0.0).run_folder
    with pytest.raises(UnsupportedError, match=r"tp2 zero0 × 2 cannot resume from another layout.*--zero-stage 1"):
        resume(run, layout=replace(target, tp=2), changes={"steps": 6})
