"""Validation of real runs passes, and fails for each deliberate sabotage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsconv.engine.matrix import COLUMNS, FAULTS, Scenario, scenarios
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.validation import Validation, validate
from dsconv.errors import UsageError
from tests.loaders.rank_checks_zero3 import async_io_is_built


def test_zero3_resumes_reshapes_and_converts(tiny_llama: Path, tmp_path: Path) -> None:
    report = validate(str(tiny_llama), tmp_path, nproc=2, cells=("zero3-bf16",))
    assert [(cell.column, cell.passed) for cell in report.cells] == [(column, True) for column in COLUMNS], report.cells
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"]
    assert [cell["name"] for cell in written["cells"]] == [f"zero3-bf16: {column}" for column in COLUMNS]
    assert written["cells"][0]["evidence"]["states compared"] > 100
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text()
    assert "| zero3-bf16 (zero3 × 2) | ✓ | ✓ | ✓ | ✓ | ✓ |" in page


def test_each_sabotage_is_caught(tiny_llama: Path, tmp_path: Path) -> None:
    options = RunOptions(str(tiny_llama), "", 4, Layout(nproc=2), seq_len=16, batch_size=4)
    (scenario,) = scenarios(2, False, ("zero1-fp32",))
    validation = Validation(tmp_path, options, [scenario])
    validation.check(scenario, "in place")
    for fault in FAULTS:
        validation.fault = fault
        validation.check(scenario, "in place")
    passed = [cell.passed for cell in validation.cells]
    assert passed == [True] + [False] * len(FAULTS), validation.cells
    found = dict(zip(FAULTS, validation.cells[1:], strict=True))
    assert found["drop-exp-avg"].evidence["states saved and loaded that differ"][0].startswith("rank 0: exp_avg of ")
    for name in ("reset-rng", "skip-batch"):  # the loaded states equal the saved ones, but the following steps differ
        assert not found[name].evidence["states saved and loaded that differ"]
        assert found[name].evidence["steps whose loss differs"] == [3, 4]


def test_parameters_on_nvme_resume_in_place(tiny_llama: Path, tmp_path: Path) -> None:
    if not async_io_is_built():
        pytest.skip(
            "DeepSpeed's async_io op is not built here, which takes minutes: install libaio-dev, then `make aio`"
        )
    layout = Layout(nproc=2, zero_stage=3)
    scenario = Scenario("nvme", layout, "bf16", {"offload": "nvme", "nvme_path": str(tmp_path / "nvme")})
    validation = Validation(tmp_path, RunOptions(str(tiny_llama), "", 4, layout, seq_len=16, batch_size=4), [scenario])
    validation.check(scenario, "in place")
    assert [cell.passed for cell in validation.cells] == [True], validation.cells


@pytest.mark.parametrize("name", ["tp2-fp32", "sp2-fp32"])
def test_model_parallel_runs_resume_in_place_and_elsewhere(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    options = RunOptions(str(tiny_llama), "", 4, Layout(nproc=2), seq_len=16, batch_size=4)
    (scenario,) = scenarios(2, False, (name,))
    validation = Validation(tmp_path, options, [scenario])
    for column in ("in place", "another stage", "convert", "load back"):
        validation.check(scenario, column)
    assert [cell.passed for cell in validation.cells] == [True] * 4, validation.cells


def test_unknown_rows_and_sabotages_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="zero3-bf16"):
        validate(str(tiny_llama), tmp_path, nproc=2, cells=("zero9",))
    with pytest.raises(UsageError, match="even number"):
        validate(str(tiny_llama), tmp_path, nproc=3)
    with pytest.raises(UsageError, match="multiple of 4"):
        validate(str(tiny_llama), tmp_path, nproc=2, steps=6)
    assert not (tmp_path / "report.json").exists()
