"""Measure what the engine costs: its steps against a plain DeepSpeed loop, and its resharding against DeepSpeed's tool.

    python -m benchmarks.engine

Steps: both loops use the same model, configuration, data and ranks. The plain loop copies each step's loss to the host,
as a script that prints it would. Rounds alternate, and the ratio compares the medians of all steps but the first ones.
Resuming: dsconv, inside ``resume``, and ``ds_to_universal`` convert the run's own checkpoint to a universal one.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import machine, measure, median

WARM = 5


def plain_rank(options: Any) -> list[float]:
    """Run one rank of a plain training loop and return the seconds per step."""
    import torch

    from dsconv.engine.data import Position, open_data
    from dsconv.engine.deepspeed_backend import ds_config
    from dsconv.engine.models import build, open_source
    from dsconv.engine.randomness import seed_everything
    from dsconv.engine.worker import _start_group

    _start_group(options)
    import deepspeed

    source = open_source(options, False)
    data = open_data(options.data, options.seq_len, source.config.vocab_size, options.seed, None)
    model = build(source, options.seed, torch.float32, True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds_config(options))
    rank, share = torch.distributed.get_rank(), options.batch_size // options.layout.dp
    seed_everything(options.seed, rank)
    position, seconds = Position(), []
    ended = time.monotonic()
    for _ in range(options.steps):
        rows = data.take(position, options.batch_size)[rank * share : (rank + 1) * share]
        for part in rows.split(options.micro_batch):
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
        loss.item()
        now = time.monotonic()
        seconds.append(now - ended)
        ended = now
    return seconds


def run_plain(options: Any) -> list[float]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = Path(options.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=options.layout.nproc, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="forkserver", logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )  # fmt: skip
    found: dict[int, list[float]] = elastic_launch(config, plain_rank)(options)
    return found[0]


def overhead(folder: Path, model: Path, stage: int, rounds: int, steps: int) -> dict[str, Any]:
    from dsconv.engine import Layout, RunOptions, train
    from dsconv.engine.worker import read_metrics

    ratios, plain_steps, own_steps = [], [], []
    for number in range(rounds):
        times: dict[str, float] = {}
        for name in ("plain", "engine") if number % 2 else ("engine", "plain"):
            run = folder / name
            shutil.rmtree(run, ignore_errors=True)
            options = RunOptions(
                str(model),
                str(run),
                steps,
                Layout(nproc=2, zero_stage=stage),
                seq_len=128,
                batch_size=4,
                micro_batch=2,
                dtype="fp32",
            )
            if name == "engine":
                train(options)
                seconds = [line["seconds"] for line in read_metrics(run)]
            else:
                seconds = run_plain(options)
            times[name] = statistics.median(seconds[WARM:])
        ratios.append(times["engine"] / times["plain"])
        plain_steps.append(times["plain"])
        own_steps.append(times["engine"])
    return {
        "stage": stage,
        "plain_seconds": median(plain_steps),
        "engine_seconds": median(own_steps),
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def resuming(folder: Path, model: Path, rounds: int) -> dict[str, Any]:
    """Time both conversions, and a whole resume on other ranks with one step."""
    from dsconv.engine import Layout, RunOptions, checkpoints, resume, train

    run = folder / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    train(
        RunOptions(str(model), str(run), 2 * rounds + 2, Layout(nproc=2, zero_stage=3), seq_len=128, batch_size=4),
        stop_after=1,
    )
    ours: list[float] = []
    theirs: list[float] = []
    whole: list[float] = []
    for number in range(rounds):
        source = checkpoints.latest(run)
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            made = folder / "universal" / "made"
            shutil.rmtree(made.parent, ignore_errors=True)
            made.parent.mkdir()
            if name == "ours":
                command = [
                    sys.executable,
                    "-m",
                    "dsconv",
                    "to-universal",
                    str(source),
                    str(made),
                    "--quiet",
                    "--no-fsync",
                ]
            else:
                official = ["--input_folder", str(source), "--output_folder", str(made), "--inject_missing_state"]
                command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *official]
            done = measure(command, {"DS_ACCELERATOR": "cpu"})
            if done.code:
                raise click.ClickException(done.output)
            (ours if name == "ours" else theirs).append(done.seconds)
        step = checkpoints.read_state(source).step
        began = time.monotonic()
        resume(run, layout=Layout(nproc=1 + number % 2, zero_stage=1 + number % 2), stop_after=step + 1)
        whole.append(time.monotonic() - began)
    return {
        "dsconv_seconds": median(ours), "ds_to_universal_seconds": median(theirs), "resume_seconds": median(whole),
        "conversion_ratio": round(median([b / a for a, b in zip(ours, theirs, strict=True)]), 2),
    }  # fmt: skip


@click.command()
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--steps", type=int, default=40, show_default=True)
@click.option("--hidden", type=int, default=384, show_default=True, help="Width of the Llama; 8 layers.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench"), show_default=True)
def main(rounds: int, steps: int, hidden: int, folder: Path) -> None:
    """Print one JSON object."""
    from transformers import LlamaConfig

    from dsconv.engine.launch import prepare

    prepare()
    folder = folder / "engine"
    model = folder / "model"
    LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256,
    ).save_pretrained(model)  # fmt: skip
    found: dict[str, Any] = {
        "machine": machine(),
        "steps": [overhead(folder, model, stage, rounds, steps) for stage in (1, 3)],
    }
    found["resume"] = resuming(folder, model, rounds)
    click.echo(json.dumps(found, indent=1))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
