"""``dsconv train`` and ``dsconv resume``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dsconv.cli import console
from dsconv.cli.console import Dtype, command
from dsconv.errors import require_packages
from dsconv.urls import local_path

Function = TypeVar("Function", bound=Callable[..., Any])
AXES = ("nproc", "zero_stage", "tp", "pp", "sp", "cp", "backend", "fsdp")


def _layout_options(start: bool) -> Callable[[Function], Function]:
    """Return the options of the layout. Those of ``resume`` have no defaults: a run keeps what is not given."""
    number = click.IntRange(1)
    options = [
        click.option(
            "--nproc",
            type=number,
            metavar="W",
            help=f"Ranks in all (default: torchrun's, or {'1' if start else 'those of the run'}).",
        ),
        click.option(
            "--zero-stage",
            type=click.IntRange(0, 3),
            metavar="N",
            default=0 if start else None,
            help="DeepSpeed's ZeRO stage.",
        ),
        click.option("--tp", type=number, default=1 if start else None, metavar="N", help="Tensor-parallel ranks."),
        click.option(
            "--pp", type=number, default=1 if start else None, metavar="N", help="Pipeline stages (DeepSpeed)."
        ),
        click.option(
            "--sp",
            type=number,
            default=1 if start else None,
            metavar="N",
            help="Ulysses sequence-parallel ranks (DeepSpeed).",
        ),
        click.option(
            "--cp",
            type=number,
            default=1 if start else None,
            metavar="N",
            help="Context-parallel ranks (native, on GPUs).",
        ),
        click.option(
            "--backend",
            type=click.Choice(["deepspeed", "native"]),
            default="deepspeed" if start else None,
            help="The engine.",
        ),
        click.option(
            "--fsdp/--no-fsdp",
            default=True if start else None,
            help="Native: shard parameters (FSDP2) or replicate them (DDP).",
        ),
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _output_options(function: Function) -> Function:
    for option in (
        console.DEBUG,
        console.QUIET,
        console.JSON,
        click.option(
            "--stop-after", type=click.IntRange(1), metavar="S", help="Save and stop after step S; resume later."
        ),
    ):
        function = option(function)
    return function


@command(epilog="""\b
Example:
  dsconv train model/ --output-dir run --steps 1000 --zero-stage 3 --nproc 8
  torchrun --nproc-per-node 8 -m dsconv train model/ --output-dir run …""")  # fmt: skip
@click.argument("model")
@click.option("--output-dir", required=True, type=click.Path(), metavar="RUN", help="New folder for the run.")
@click.option("--steps", required=True, type=click.IntRange(1), metavar="N", help="Optimizer steps in all.")
@_layout_options(start=True)
@click.option(
    "--save-every",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Save after every K steps (the end is always saved).",
)
@click.option(
    "--keep", type=click.IntRange(0), default=0, metavar="N", help="Keep the last N checkpoints (default: all)."
)
@click.option(
    "--seq-len", type=click.IntRange(2), default=128, show_default=True, metavar="L", help="Tokens per sample."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Samples per step over all ranks.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Samples per forward pass on one rank.",
)
@click.option(
    "--dtype",
    type=Dtype(),
    default="bf16",
    show_default=True,
    help="Dtype of the computation; masters are fp32.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of weights, data order and dropout.",
)
@click.option(
    "--data",
    default="synthetic",
    show_default=True,
    metavar="FILE",
    help="Text, an .npy array of token ids, or 'synthetic'.",
)
@click.option(
    "--lr",
    type=float,
    metavar="X",
    default=1e-3,
    show_default=True,
    help="Peak learning rate; it decays linearly to 0.",
)
@click.option("--weight-decay", type=float, metavar="X", default=0.01, show_default=True, help="Weight decay of AdamW.")
@click.option("--warmup", type=click.IntRange(0), default=0, metavar="N", help="Steps of linear warm-up.")
@click.option(
    "--grad-clip",
    type=click.FloatRange(0),
    metavar="X",
    default=1.0,
    show_default=True,
    help="Largest gradient norm; 0 does not clip.",
)
@click.option(
    "--dropout", type=click.FloatRange(0, 1), metavar="P", help="Probability of every dropout (default: the model's)."
)
@click.option(
    "--offload",
    type=click.Choice(["none", "cpu", "nvme"]),
    default="none",
    show_default=True,
    help="Where ZeRO keeps states; nvme holds parameters.",
)
@click.option("--nvme-path", type=click.Path(), metavar="DIR", help="Folder for --offload nvme.")
@click.option("--activation-checkpointing", is_flag=True, help="Recompute activations in the backward pass.")
@click.option(
    "--hook", type=click.Choice(["none", "bf16", "powersgd"]), default="none", help="Native DDP: compress gradients."
)
@click.option(
    "--monitor",
    multiple=True,
    type=click.Choice(["csv", "tensorboard", "comms"]),
    help="Monitors of DeepSpeed; may be repeated.",
)
@click.option(
    "--ds-config", type=click.Path(), metavar="JSON", help="DeepSpeed configuration to lay over dsconv's own."
)
@_output_options
def train(
    model: str, ds_config: str | None, stop_after: int | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:  # fmt: skip
    """Train a causal language model and save all of its state.

    MODEL is a folder, a Hub id or a configuration. RUN gets run.json, metrics.jsonl (exact floats), loss.png,
    checkpoints/ (each complete or absent) and the logs of the ranks. On SIGTERM or Ctrl-C the run saves after the
    current step and exits with 0.
    """
    require_packages("training", "train", "torch", "transformers")
    from dsconv.engine import Layout, RunOptions
    from dsconv.engine import train as run
    from dsconv.zero_utils.config import DSConfig

    options["nproc"] = options["nproc"] or _launched_ranks() or 1
    layout = Layout(**{axis: options.pop(axis) for axis in AXES})
    if ds_config is not None:
        options["ds_config"] = DSConfig.read(ds_config).to_dict()
    settings = RunOptions(model=model, layout=layout, **options)
    with console.progress(quiet or as_json, unit="steps") as progress:
        report = run(settings, stop_after=stop_after, progress=progress)
    _show(report, as_json, quiet)


@command(epilog="""\b
Example:
  dsconv resume run
  dsconv resume run --nproc 4 --zero-stage 2""")  # fmt: skip
@click.argument("run", type=click.Path(), metavar="RUN")
@_layout_options(start=False)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Optimizer steps in all (default: the run's).")
@click.option("--save-every", type=click.IntRange(0), metavar="K", help="Save after every K steps.")
@click.option("--keep", type=click.IntRange(0), metavar="N", help="Keep the last N checkpoints.")
@_output_options
def resume(run: str, stop_after: int | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Resume RUN from its last checkpoint.

    Options change the layout of the ranks; options that are not given keep their values.
    """
    from dataclasses import replace

    require_packages("training", "train", "torch", "transformers")
    from dsconv.engine import resume as run_on
    from dsconv.engine.checkpoints import latest, read_state

    options["nproc"] = options["nproc"] or _launched_ranks()
    axes = {axis: value for axis in AXES if (value := options.pop(axis)) is not None}
    layout = replace(read_state(latest(local_path(run, "a run"))).layout, **axes) if axes else None
    changes = {name: value for name, value in options.items() if value is not None}
    with console.progress(quiet or as_json, unit="steps") as progress:
        report = run_on(run, layout=layout, stop_after=stop_after, changes=changes, progress=progress)
    _show(report, as_json, quiet)


def _launched_ranks() -> int | None:
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def _show(report: Any, as_json: bool, quiet: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        console.show_json(report.to_dict())
    elif not quiet:
        console.warn(report.warnings)
        loss = "" if report.loss is None else f", loss {report.loss:.4f}"
        end = "finished" if report.finished else "interrupted, saved" if report.interrupted else "stopped"
        console.say(
            f"{report.run} ({report.layout}): step {report.step} of {report.steps}{loss}; {end} in"
            f" {report.seconds:.1f} s"
        )
        if report.checkpoint:
            console.say(f"checkpoint: {report.checkpoint}")
        if not report.finished:
            console.say(f"to resume: dsconv resume {report.run}")
