"""The parts of the engine that need no ranks: options, data, random generators, the folder of checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from dsconv.engine import checkpoints, train, validation
from dsconv.engine.checkpoints import State
from dsconv.engine.data import SYNTHETIC_SAMPLES, Position, open_data
from dsconv.engine.deepspeed_backend import ds_config
from dsconv.engine.files import write_file
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.overlay import without_flags
from dsconv.engine.randomness import restore_randomness, save_randomness, seed_everything
from dsconv.engine.worker import read_metrics
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, OutputError, UsageError

RUN = RunOptions("model", "run", 8, Layout(nproc=4, zero_stage=1), batch_size=8)


def test_a_deepspeed_config_does_not_decide_what_flags_do() -> None:
    """Otherwise a run that continues in another layout would have two contradictory settings."""
    said = {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": True},
    }
    said |= {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }
    kept = without_flags(replace(RUN, ds_config=said))
    assert kept.ds_config == {"zero_optimization": {"overlap_comm": True}, "bf16": {}, "gradient_clipping": 0.5}
    config = ds_config(replace(kept, layout=Layout(nproc=2, zero_stage=2)))
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (config["gradient_clipping"], config["bf16"], config["gradient_accumulation_steps"]) == (
        0.5,
        {"enabled": True},
        4,
    )
    for wrong, flag in (
        ({"zero_optimization": {"stage": 3}}, "--zero-stage"),
        ({"fp16": {"enabled": True}}, "--dtype"),
        ({"train_batch_size": 16}, "--batch-size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "--tp"),
    ):
        with pytest.raises(
            UsageError, match=rf"--ds-config: .* is .* but {flag} makes it .*: remove the entry or change {flag}"
        ):
            without_flags(replace(RUN, ds_config=wrong))
    swapped = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}
    with pytest.raises(UsageError, match="neither what it has swapped nor the step counts"):
        train(replace(RUN, layout=Layout(nproc=2, zero_stage=3), ds_config=swapped))
    for section in (True, None, "nvme"):
        with pytest.raises(UsageError, match=r"--ds-config: zero_optimization is .*; expected an object"):
            train(replace(RUN, ds_config={"zero_optimization": section}))
    with pytest.raises(UsageError, match="--ds-config needs --backend deepspeed"):
        without_flags(replace(RUN, layout=Layout("native"), ds_config=said))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(nproc=3, tp=2), "multiple of 2"),
        (Layout(nproc=4, tp=2, pp=2, zero_stage=1), "AutoTP and Ulysses do not shard"),
        (Layout(nproc=2, pp=2, zero_stage=2), "stages 0 and 1"),
        (Layout(nproc=4, tp=2, sp=2), "do not combine; give one"),
        (Layout(nproc=2, cp=2), "--backend native"),
        (Layout(nproc=2, sp=2, backend="native"), "--backend deepspeed"),
        (Layout(nproc=2, zero_stage=2, backend="native"), "FSDP2"),
        (Layout(nproc=2, zero_stage=4), "0, 1, 2 or 3"),
        (Layout(nproc=0), "1 or more"),
        (Layout(backend="horovod"), "deepspeed or native"),
    ],
)
def test_layouts_that_no_engine_has_are_refused_with_what_would_work(layout: Layout, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6}, "use 8"),
        ({"micro_batch": 3}, "use 12"),
        ({"offload": "cpu", "layout": Layout(nproc=4)}, "needs --zero-stage"),
        ({"offload": "nvme"}, "--nvme-path"),
        ({"hook": "bf16"}, "--no-fsdp"),
        ({"dtype": "fp16", "layout": Layout(nproc=4, backend="native")}, "loss scaler"),
        ({"dtype": "int8"}, "fp32, bf16, fp16"),
        ({"steps": 0}, "1 or more"),
        ({"seq_len": 127, "layout": Layout(nproc=4, sp=2, zero_stage=1)}, "sequence parallelism"),
        ({"monitor": ("csv",), "layout": Layout(nproc=4, backend="native")}, "metrics.jsonl only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RUN, **change).check()  # type: ignore[arg-type]


def test_options_survive_their_file(tmp_path: Path) -> None:
    options = replace(RUN, output_dir=str(tmp_path), monitor=("csv",), ds_config={"gradient_clipping": 0.5})
    options.write()
    assert RunOptions.read(tmp_path) == options


def test_an_invalid_run_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"run\.json does not exist"):
        RunOptions.read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(MalformedError, match="not JSON"):
        RunOptions.read(tmp_path)
    (tmp_path / "run.json").write_text('{"model": "m", "layout": {}, "colour": 1}')
    with pytest.raises(MalformedError, match="colour"):
        RunOptions.read(tmp_path)


def test_every_epoch_takes_each_sample_once_in_another_order() -> None:
    data = open_data("synthetic", 8, 97, 3, None)
    position = Position()
    epochs = [torch.cat([data.take(position, 100) for _ in range(5)] + [data.take(position, 12)]) for _ in range(2)]
    assert (position.epoch, position.taken) == (2, 0)
    rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(tuple, data.samples.tolist()))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_crosses_the_end_of_an_epoch() -> None:
    data = open_data("synthetic", 8, 97, 3, None)
    position = Position(0, SYNTHETIC_SAMPLES - 3)
    expected = torch.cat([data.samples[data.order(0)[-3:]], data.samples[data.order(1)[:5]]])
    assert torch.equal(data.take(position, 8), expected)
    assert (position.epoch, position.taken) == (1, 5)


def test_text_without_a_tokenizer_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)) * 2)
    assert open_data(str(path), 100, 256, 0, None).samples.tolist() == [[*range(100)], [*range(100, 200)]] * 2
    with pytest.raises(UsageError, match="too small for bytes"):
        open_data(str(path), 100, 97, 0, None)


def test_token_ids_are_checked_against_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    numpy.save(path, numpy.arange(50, dtype=numpy.uint16))
    assert open_data(str(path), 10, 50, 0, None).samples.shape == (5, 10)
    with pytest.raises(MalformedError, match="from 0 to 49"):
        open_data(str(path), 10, 40, 0, None)
    with pytest.raises(UsageError, match="fewer than one sample"):
        open_data(str(path), 51, 50, 0, None)
    numpy.save(path, numpy.zeros((2, 2)))
    with pytest.raises(MalformedError, match="2 dimensions"):
        open_data(str(path), 10, 50, 0, None)
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        open_data(str(tmp_path / "none"), 10, 50, 0, None)


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[object]:
        return [
            random.random(),
            random.gauss(0, 1),
            *numpy.random.rand(3),
            numpy.random.randn(),
            *torch.rand(3).tolist(),
        ]

    seed_everything(1, 2)
    draw()
    save_randomness(tmp_path / "rng.safetensors")
    expected = draw()
    seed_everything(7, 7)
    restore_randomness(tmp_path / "rng.safetensors")
    assert draw() == expected
    (tmp_path / "rng.safetensors").write_bytes(b"nothing")
    with pytest.raises(MalformedError, match="random generators"):
        restore_randomness(tmp_path / "rng.safetensors")


def _save(run: Path, step: int) -> None:
    folder = checkpoints.begin(run) / checkpoints.tag_of(step)
    folder.mkdir()
    checkpoints.write_state(folder, State(step))
    checkpoints.commit(run, step, keep=2)


def test_a_save_that_was_killed_leaves_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert checkpoints.steps(tmp_path) == [2, 3]
    folder = checkpoints.begin(tmp_path) / checkpoints.tag_of(4)
    folder.mkdir()
    assert checkpoints.read_state(checkpoints.latest(tmp_path)).step == 3
    _save(tmp_path, 4)
    assert checkpoints.read_state(checkpoints.latest(tmp_path)).step == 4
    assert not (tmp_path / checkpoints.FOLDER / checkpoints.PARTIAL).exists()


def test_latest_that_names_no_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        checkpoints.latest(tmp_path)
    _save(tmp_path, 5)
    (tmp_path / checkpoints.FOLDER / checkpoints.LATEST).write_text("step-00000009")
    with pytest.raises(MalformedError, match="step-00000005"):
        checkpoints.latest(tmp_path)
    (tmp_path / checkpoints.FOLDER / checkpoints.LATEST).write_text("../..")
    with pytest.raises(MalformedError, match="does not exist"):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "latest", "engine.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "deep", "list", "bytes"])
def test_an_invalid_engine_file_is_named(name: str, kind: str, tmp_path: Path) -> None:
    replace(RUN, output_dir=str(tmp_path)).write()
    _save(tmp_path, 5)
    folder = tmp_path / checkpoints.FOLDER
    path = {"run.json": tmp_path, "latest": folder, "engine.json": folder / checkpoints.tag_of(5)}[name] / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes({"deep": b"[" * 10**6, "list": b"[1]", "bytes": b"\xff\xfe"}[kind])

    def read() -> State:
        RunOptions.read(tmp_path)
        return checkpoints.read_state(checkpoints.latest(tmp_path))

    with pytest.raises((CheckpointNotFoundError, MalformedError)):
        read()


@pytest.mark.parametrize("value", [None, True, -1.5, "x", [], {}, 10**30, [1]], ids=repr)
def test_fields_of_the_wrong_type(value: object, tmp_path: Path) -> None:
    replace(RUN, output_dir=str(tmp_path)).write()
    _save(tmp_path, 5)
    for path, read in (
        (tmp_path / "run.json", lambda: RunOptions.read(tmp_path).check()),
        (checkpoints.latest(tmp_path) / "engine.json", lambda: checkpoints.read_state(checkpoints.latest(tmp_path))),
    ):
        whole = json.loads(path.read_text())
        for key in whole:
            path.write_text(json.dumps({**whole, key: value}))
            with contextlib.suppress(DsconvError):
                read()
        for key in ("step", "steps"):
            if key in whole:
                path.write_text(json.dumps({**whole, key: value}))
                with pytest.raises(MalformedError):
                    read()


def test_a_truncated_metrics_line_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_keep_never_removes_the_latest_checkpoint(tmp_path: Path) -> None:
    """A run that goes back to an earlier checkpoint saves lower steps than the branch that it left."""
    for step in (2, 4, 6, 8):
        folder = checkpoints.begin(tmp_path) / checkpoints.tag_of(step)
        folder.mkdir()
        checkpoints.write_state(folder, State(step))
        checkpoints.commit(tmp_path, step, keep=0)
    (tmp_path / checkpoints.FOLDER / checkpoints.LATEST).write_text(checkpoints.tag_of(2))
    _save(tmp_path, 3)
    assert checkpoints.latest(tmp_path).name == checkpoints.tag_of(3)
    _save(tmp_path, 5)
    assert checkpoints.steps(tmp_path) == [4, 5, 6, 8]
    assert checkpoints.latest(tmp_path).name == checkpoints.tag_of(5)


@pytest.mark.parametrize("losses", [[2.0, math.nan, 1.8], [math.nan, 1.9, 1.8], [2.0, math.inf, 1.8], [2.0, 1.9], []])
def test_no_tolerance_admits_a_loss_that_is_not_finite(losses: list[float]) -> None:
    class Curve:
        def __init__(self, losses: list[float]) -> None:
            self.losses = losses

        def curve(self, key: str) -> list[float]:
            return self.losses

    sound: Any = Curve([2.0, 1.9, 1.8])
    broken: Any = Curve(losses)
    assert validation._distance(sound, sound) == 0
    assert validation._distance(sound, broken) == validation._distance(broken, sound) == math.inf


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_ranks_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("multiprocessing", "torch", "socket"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    program = f"""
import sys
if __name__ == "__main__":
    sys.path = {[path for path in sys.path if path]!r}
    from multiprocessing import get_context
    from dsconv.engine import launch
    launch.PRELOAD.clear()
    launch.prepare()
    rank = get_context("forkserver").Process(target=print)
    rank.start()
    rank.join()
    sys.exit(rank.exitcode)
"""
    (tmp_path / "bin").mkdir()
    # As pip installs it: sys.path begins with the script's folder, not with the current one.
    (tmp_path / "bin" / "script").write_text(program)
    done = subprocess.run([sys.executable, "bin/script"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line", ["[1]", "3", '{"step": "x", "loss": 0.1}', '{"step": 2}', '{"step": 2, "loss": []}', "[" * 10**5]
)
def test_a_line_of_metrics_that_the_engine_did_not_write_is_ignored(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n' + line + "\n")
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_metrics_in_a_pipe_do_not_stall(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path) == []
    with pytest.raises(OutputError, match="is a fifo"):
        write_file(tmp_path / "metrics.jsonl", b"")


def test_what_a_run_writes_follows_no_link(tmp_path: Path) -> None:
    """A run's folder may come from anybody: the picture and the configuration must not replace files elsewhere."""
    from transformers import LlamaConfig

    from dsconv.engine.models import Source, keep_source
    from dsconv.engine.plots import plot_run

    home, run = tmp_path / "home", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    home.mkdir()
    (home / "config.json").write_text("mine")
    (run / "loss.png").symlink_to(home / "config.json")
    warnings: list[str] = []
    assert plot_run(run, [{"step": 1, "loss": 0.1}], warnings) is None
    assert "loss.png is a link" in warnings[0]
    (run / "checkpoints" / "config.json").symlink_to(home / "config.json")
    with pytest.raises(OutputError, match="is a link"):
        keep_source(Source(LlamaConfig(), None, None), run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(home)
    with pytest.raises(OutputError, match="is a link"):
        keep_source(Source(LlamaConfig(), None, None), run)
    assert {path.name: path.read_text() for path in home.iterdir()} == {"config.json": "mine"}
