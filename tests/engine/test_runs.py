"""Runs that are killed in a save, told to stop, out of disk space, started from another model, or under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attacks.payload import touch
from attacks.places import poisoned
from dsconv.engine import Layout, RunOptions, checkpoints, files, resume, train
from dsconv.engine.worker import read_metrics
from dsconv.errors import DsconvError, InconsistentCheckpointError, OutputError, UnsafeError, UsageError
from tests.checkpoint.building import call, glob, whole

STEPS = 6
EXACT = ("step", "loss", "grad_norm", "lr")


def options(model: Path, run: Path, **changes: Any) -> RunOptions:
    settings: dict[str, Any] = {
        "layout": Layout(nproc=2, zero_stage=2),
        "seq_len": 16,
        "batch_size": 4,
        "save_every": 1,
    }
    return RunOptions(str(model), str(run), STEPS, **{**settings, **changes})


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in read_metrics(run)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dsconv", *arguments]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that ended undisturbed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    report = train(options(tiny_llama, run, monitor=("csv", "comms")))
    assert report.finished
    assert report.step == STEPS
    return run


def wait_for(found: Any, process: subprocess.Popen[Any]) -> None:
    """Wait until ``found()`` is true. The process must not end before that."""
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_leaves_what_it_says(finished: Path) -> None:
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(
        line["memory_bytes"] > 1 << 20 and line["tokens_per_s"] > 0 and line["comm_seconds"] > 0 for line in lines
    )
    assert checkpoints.steps(finished) == list(range(1, STEPS + 1))
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "monitor").rglob("*.csv"))
    assert not (finished / checkpoints.FOLDER / checkpoints.PARTIAL).exists()


def test_a_run_that_was_killed_in_a_save_goes_on_from_the_one_before(
    finished: Path, tiny_llama: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    arguments = [
        "--steps",
        str(STEPS),
        "--save-every",
        "1",
        "--seq-len",
        "16",
        "--batch-size",
        "4",
        "--nproc",
        "2",
        "--zero-stage",
        "2",
    ]
    process = subprocess.Popen(
        command("train", str(tiny_llama), "--output-dir", str(run), *arguments),
        env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    third = run / checkpoints.FOLDER / checkpoints.PARTIAL / checkpoints.tag_of(3)
    wait_for(lambda: third.is_dir() and any(third.iterdir()), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    step = checkpoints.read_state(checkpoints.latest(run)).step
    assert step in (2, 3)  # 3 if the save had finished by the time the signal came
    assert checkpoints.steps(run)[-1] == step
    report = resume(run)
    assert report.finished
    assert exact(run) == exact(finished)
    assert not (run / checkpoints.FOLDER / checkpoints.PARTIAL).exists()


def test_a_run_that_is_told_to_stop_saves_and_exits_with_0(
    finished: Path, tiny_llama: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    arguments = [
        "--steps",
        "100000",
        "--seq-len",
        "16",
        "--batch-size",
        "4",
        "--nproc",
        "2",
        "--zero-stage",
        "1",
        "--json",
    ]
    process = subprocess.Popen(
        command("train", str(tiny_llama), "--output-dir", str(run), *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(read_metrics(run)) > 2, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    report = json.loads(output)
    assert report["interrupted"]
    assert not report["finished"]
    assert checkpoints.read_state(checkpoints.latest(run)).step == report["step"] == len(read_metrics(run))
    assert resume(run, stop_after=report["step"] + 1).step == report["step"] + 1


def test_ranks_whose_launcher_was_killed_save_and_end(
    tiny_llama: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--steps", "100000", "--seq-len", "16", "--batch-size", "4", "--nproc", "2", "--zero-stage", "1"]
    process = subprocess.Popen(
        command("train", str(tiny_llama), "--output-dir", str(run), *arguments),
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: len(read_metrics(run)) > 2, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while not (run / checkpoints.FOLDER / checkpoints.LATEST).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    steps = len(read_metrics(run))
    assert checkpoints.read_state(checkpoints.latest(run)).step == steps
    time.sleep(0.5)
    assert len(read_metrics(run)) == steps


def test_a_disk_that_fills_leaves_the_checkpoint_before(
    finished: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A limit on the size of files stands in for a full disk."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("logs", checkpoints.tag_of(5), checkpoints.tag_of(6)))
    files.write_file(run / checkpoints.FOLDER / checkpoints.LATEST, checkpoints.tag_of(4).encode())
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", *command("resume", str(run))]
    ended = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 3, ended.stderr
    assert "cannot be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert checkpoints.latest(run).name == checkpoints.tag_of(4)
    assert not (run / checkpoints.FOLDER / checkpoints.PARTIAL).exists()
    assert resume(run).finished
    assert exact(run) == exact(finished)


def test_under_torchrun_each_process_is_a_rank(
    finished: Path, tiny_llama: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    arguments = [
        "--output-dir",
        str(run),
        "--steps",
        str(STEPS),
        "--seq-len",
        "16",
        "--batch-size",
        "4",
        "--zero-stage",
        "2",
        "--json",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dsconv",
        "train",
    ]
    ended = subprocess.run(
        [*torchrun, str(tiny_llama), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["finished"]
    assert exact(run) == exact(finished)


def test_a_finished_run_is_not_started_again(finished: Path) -> None:
    before = sorted(path for path in finished.rglob("*"))
    assert resume(finished).finished
    assert sorted(path for path in finished.rglob("*")) == before


def test_a_folder_that_holds_a_run_is_refused(finished: Path, tiny_llama: Path) -> None:
    with pytest.raises(OutputError, match="already holds a run"):
        train(options(tiny_llama, finished))


def test_a_checkpoint_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("logs"))
    checkpoint = checkpoints.latest(run)
    state = checkpoints.read_state(checkpoint)
    state.step, state.model = 4, {**state.model, "hidden_size": 64}
    checkpoints.write_state(checkpoint, state)
    with pytest.raises(InconsistentCheckpointError, match="hidden_size 64 and 32"):
        resume(run)


def test_a_world_that_does_not_divide_the_batch_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="use 6"):
        resume(finished, layout=Layout(nproc=3, zero_stage=2), changes={"steps": 8})


def test_a_planted_program_is_refused_before_deepspeed_reads_it(finished: Path, tmp_path: Path) -> None:
    """DeepSpeed loads a checkpoint by ``torch.load(weights_only=False)``, which would run it."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    planted = next(checkpoints.latest(run).rglob("*optim_states.pt"))
    sound = planted.read_bytes()
    planted.write_bytes(poisoned(sound, whole(call(glob("os", "system"), touch(str(tmp_path / "canary"))))))
    with pytest.raises(UnsafeError, match=rf"{planted.name}.*os\.system"):
        resume(run, changes={"steps": STEPS + 1})
    planted.write_bytes(b"cos\nsystem\n.")
    with pytest.raises(DsconvError, match=planted.name):
        resume(run, changes={"steps": STEPS + 1})
    planted.unlink()
    (tmp_path / "elsewhere.pt").write_bytes(sound)
    planted.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UnsafeError, match="a link that leaves"):
        resume(run, changes={"steps": STEPS + 1})
    planted.unlink()
    planted.write_bytes(sound)
    checkpoints.require_harmless(run, checkpoints.latest(run))
    folder = checkpoints.latest(run)
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafeError, match="a link that leaves"):
        resume(run, changes={"steps": STEPS + 1})
    assert not (tmp_path / "canary").exists()
