"""The native backend: FSDP2, DDP with its hooks, and tensor parallelism, all of which save with DCP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dsconv.engine import Layout, RunOptions, checkpoints, files, resume, train
from dsconv.engine.matrix import COLUMNS, scenarios
from dsconv.engine.validation import Validation
from dsconv.engine.worker import read_metrics
from dsconv.errors import UsageError

EXACT = ("step", "loss", "grad_norm", "lr")


def options(model: Path, run: Path, layout: Layout, **changes: Any) -> RunOptions:
    return RunOptions(
        str(model), str(run), 4, layout, **{"seq_len": 16, "batch_size": 4, "dtype": "fp32", "save_every": 2, **changes}
    )


def test_fsdp_resumes_in_place_as_ddp_and_tensor_parallel_and_converts(tiny_llama: Path, tmp_path: Path) -> None:
    (scenario,) = scenarios(2, False, ("native-fp32",))
    validation = Validation(
        tmp_path, RunOptions(str(tiny_llama), "", 4, Layout(nproc=2), seq_len=16, batch_size=4), [scenario]
    )
    validation.run()
    assert [(cell.column, cell.passed) for cell in validation.cells] == [(column, True) for column in COLUMNS], (
        validation.cells
    )
    assert scenario.targets["another stage"] == Layout("native", 2, tp=2)


def test_powersgds_memory_is_part_of_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    train(options(tiny_llama, run, Layout("native", 2, fsdp=False), hook="powersgd"))
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("logs", checkpoints.tag_of(4)))
    files.write_file(again / checkpoints.FOLDER / checkpoints.LATEST, checkpoints.tag_of(2).encode())
    assert resume(again).finished
    left, right = ([[line[key] for key in EXACT] for line in read_metrics(folder)] for folder in (run, again))
    assert len(left) == 4
    assert left == right


def test_settings_that_need_a_gpu_are_refused_on_ranks_without_one(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cp 2 needs a GPU"):
        train(options(tiny_llama, tmp_path / "run", Layout("native", 2, cp=2)))
    with pytest.raises(UsageError, match=r"--hook bf16 needs a GPU, .* --hook powersgd works on a CPU"):
        train(options(tiny_llama, tmp_path / "hook", Layout("native", 1, fsdp=False), hook="bf16"))


def test_a_run_does_not_change_its_engine(tiny_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options(tiny_llama, run, Layout("native", 1, fsdp=False)), stop_after=2)
    with pytest.raises(UsageError, match="dsconv merge"):
        resume(run, layout=Layout("deepspeed", 1))
