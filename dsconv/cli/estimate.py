"""``dsconv estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import Size, command
from dsconv.errors import require_packages
from dsconv.urls import local_path

if TYPE_CHECKING:
    from dsconv.zero_utils.estimate import Report, Row

NOTES = """Ideal: the model states of a rank, wherever they are kept (ZeRO paper). DeepSpeed: its own estimators' memory
of a GPU (16-bit training, no activations). The other columns are what DeepSpeed 0.19.8 allocates with AdamW;
activations are an estimate. Peak: the larger of backward (gradients, buffers, activations) and the optimizer's
step. CUDA's context, workspaces and fragmentation are not counted. docs/estimate.md has the formulas."""


@command(epilog="""\b
Example:
  dsconv estimate Qwen/Qwen2.5-7B --nproc 8
  dsconv estimate config.json --fit 80GB --nproc 8 --nodes 2 --plot memory.png""")  # fmt: skip
@click.argument("model", metavar="MODEL")
@click.option(
    "--nproc", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Ranks (GPUs) per node."
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Nodes.")
@click.option(
    "--tp",
    "tps",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Tensor-parallel degree; may be repeated.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Training precision.",
)
@click.option("--fp32-grads", is_flag=True, help="Accumulate gradients in fp32 (data_types.grad_accum_dtype).")
@click.option(
    "--seq-len", type=click.IntRange(1), default=4096, show_default=True, metavar="N", help="Tokens per sequence."
)
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Sequences per forward pass on one rank.",
)
@click.option(
    "--accumulation", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Micro-batches per step."
)
@click.option(
    "--fit",
    "limit",
    type=Size(),
    metavar="SIZE",
    help="Name the cheapest setting that fits a GPU of SIZE, such as 80GB.",
)
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE", help="Draw the table (.png, .svg, .pdf).")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are in bytes.")
@console.DEBUG
def estimate(
    model: str,
    tps: tuple[int, ...],
    limit: int | None,
    plot: str | None,
    revision: str | None,
    as_json: bool,
    debug: bool,
    **job: Any,
) -> None:
    """Estimate the memory that DeepSpeed training needs.

    MODEL is a config.json, a folder that has one, or a Hub id. Only the configuration is read, no weights. Each
    combination of ZeRO stage, offload and activation checkpointing is a row, the cheapest first.
    """
    require_packages("an estimate", "train", "torch", "transformers")
    from dsconv.loaders.sizes import model_sizes
    from dsconv.zero_utils import estimate as estimating
    from dsconv.zero_utils.memory import Job

    work = Job(**job)
    for tp in tps:
        if work.nproc % tp:
            raise click.UsageError(f"--tp {tp} does not divide the {console.count(work.nproc, 'rank')} of a node")
    console.quiet_downloads(as_json)
    report = estimating.estimate(model_sizes(model, revision), work, tuple(sorted(set(tps))) or (1,), limit)
    if plot is not None:
        from dsconv.zero_utils.memory_plot import draw

        draw(report, local_path(plot, "--plot"))
    if as_json:
        console.show_json(report.to_dict())
    else:
        _show(report)


def _show(report: Report) -> None:
    model, job = report.model, report.job
    world = f"{console.count(job.nodes, 'node')} × {console.count(job.nproc, 'GPU')}"
    console.say(
        f"{model.name}: {model.numel:,} parameters; {world}, {job.dtype}, {job.micro_batch} × {job.seq_len:,} tokens"
        " per"
        " rank"
    )
    if model.decoder is None:
        console.warn(["activations are not estimated, since the configuration is not a decoder's"])
    columns = (
        "ideal",
        "DeepSpeed",
        "parameters",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "peak",
        "CPU a node",
        "NVMe a node",
        "checkpoint",
    )
    console.say("")
    console.table(
        [("setting", "left"), *((column, "right") for column in columns)],
        [_cells(report, row) for row in report.rows],
        bold=None if report.fit is None else report.rows.index(report.fit),
        wrap=False,
        pipe_columns=250,
    )
    console.say("", *NOTES.splitlines())
    if report.limit is not None:
        console.say("", _verdict(report, report.limit))


def _cells(report: Report, row: Row) -> list[str]:
    held = row.held
    sizes: list[int | None] = [
        row.ideal,
        row.deepspeed[0] if row.deepspeed else None,
        held.parameters,
        held.gradients,
        held.optimizer,
        held.buffers,
    ]
    sizes += [
        held.activations if report.model.decoder else None,
        held.peak,
        held.cpu * report.job.nproc,
        held.nvme * report.job.nproc,
        row.disk,
    ]
    return [str(row.setting), *("–" if size is None else console.size(size) if size else "0" for size in sizes)]


def _verdict(report: Report, limit: int) -> str:
    if report.fit is None:
        least = report.smallest
        return f"Nothing fits {console.size(limit)}: {least.setting} needs the least, {console.size(least.held.peak)}"
    peak = report.fit.held.peak
    return (
        f"Cheapest that fits {console.size(limit)}: {report.fit.setting} ({console.size(peak)},"
        f" {console.size(limit - peak)} left over)"
    )
