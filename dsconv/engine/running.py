"""``train`` and ``resume``: make a run in a folder, with its metrics, checkpoints and picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsconv.engine import checkpoints
from dsconv.engine.launch import launched, run_job
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.overlay import without_flags
from dsconv.engine.worker import METRICS, Job, Outcome, read_metrics
from dsconv.errors import OutputError, UsageError, require_packages
from dsconv.urls import local_path

Progress = Callable[[str, int, int], None]
NVME_OPTIMIZER = (
    "--ds-config: offload_optimizer to nvme: the run could not be resumed, since DeepSpeed 0.19.8 loads neither what it"
    " has swapped nor the step counts. Set device to cpu; --offload nvme keeps the optimizer in memory too"
)


@dataclass
class RunReport:
    """The state of a run.

    Attributes:
        run: The run's folder.
        step: Steps taken.
        steps: Steps in all.
        finished: Whether all steps are taken.
        interrupted: Whether a signal stopped the run, after a save.
        loss: The loss of the last step.
        checkpoint: The last checkpoint.
        metrics: The file metrics.jsonl.
        layout: The layout's name.
        seconds: How long the launch took.
        plot: The picture of the losses, if it was drawn.
        warnings: What the user should know.
    """

    run: str
    step: int
    steps: int
    finished: bool
    interrupted: bool
    loss: float | None
    checkpoint: str | None
    metrics: str
    layout: str
    seconds: float
    plot: str | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(options: RunOptions, *, stop_after: int | None = None, progress: Progress | None = None) -> RunReport:
    """Start a run in ``options.output_dir``, on new ranks, or as one rank of torchrun's.

    The run ends with a checkpoint.

    Args:
        options: The run.
        stop_after: A step after which to stop, to be resumed later; by default ``options.steps``.
        progress: Called with ("train", steps taken, steps in all).

    Raises:
        UsageError: The options do not fit together.
        OutputError: The folder already holds a run.
        DsconvError: The error of the rank that failed first.
        RunFailedError: A rank failed in any other way.
    """
    _require_engine(options)
    options.check()
    options = without_flags(options)
    _lint(options)
    run = local_path(options.output_dir, "--output-dir")
    options = replace(options, output_dir=str(run))
    if _leads():
        # A run that failed before its first step may be repeated.
        if (run / METRICS).exists() or checkpoints.steps(run):
            raise OutputError(
                f"{run} already holds a run: resume it with `dsconv resume {run}`, or give another --output-dir"
            )
        options.write()
    return _run(Job(options, _last(options, stop_after)), progress)


def resume(
    run: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    stop_after: int | None = None,
    changes: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Resume a run from its last whole checkpoint, in the same layout or another.

    Another layout loads the checkpoint as a universal one, or by DCP's own resharding.

    Args:
        run: The run's folder.
        layout: The new layout; by default the checkpoint's.
        stop_after: A step after which to stop.
        changes: Other fields of ``RunOptions`` that change (``steps``, ``save_every``, ``keep``, …).
        progress: Called with ("train", steps taken, steps in all).

    Raises:
        CheckpointNotFoundError: The folder holds no run or no checkpoint.
        UnsafeError: A file of the checkpoint asks to run code, or a link leaves the run's folder.
        DsconvError: As ``train``.
    """
    folder = local_path(run, "a run")
    options = RunOptions.read(folder)
    if changes:
        options = replace(options, **changes)
    checkpoint = checkpoints.latest(folder)
    if _leads():
        checkpoints.require_harmless(folder, checkpoint)
    state = checkpoints.read_state(checkpoint)
    options = options.resharded(layout or state.layout)
    _require_engine(options)
    options.check()
    _lint(options)
    if options.layout.backend != state.layout.backend:
        raise UsageError(
            f"{checkpoint} was saved with --backend {state.layout.backend}, and --backend {options.layout.backend}"
            f" cannot load its optimizer: start from the weights with `dsconv merge {checkpoint} OUT` and `dsconv"
            " train OUT`"
        )
    last = _last(options, stop_after)
    if state.step >= last:  # nothing is left to do
        return _report(options, Outcome(state.step, str(checkpoint), False, 0.0))
    if _leads():
        options.write()
    return _run(Job(options, last, checkpoint, state.layout != options.layout), progress)


def _require_engine(options: RunOptions) -> None:
    deepspeed = ["deepspeed"] if options.layout.backend == "deepspeed" else []
    require_packages("training", "train", "transformers", *deepspeed)


def _lint(options: RunOptions) -> None:
    """Raise UsageError, before any rank starts, if DeepSpeed would refuse or misread the configuration."""
    if options.layout.backend != "deepspeed":
        return
    from dsconv.engine.deepspeed_backend import ds_config
    from dsconv.zero_utils.config import DSConfig

    config = ds_config(options)
    wrong = [finding for finding in DSConfig.read(config).lint(options.layout.nproc) if finding.severity == "error"]
    if wrong:
        raise UsageError("; ".join(f"{finding.key}: {finding.message} {finding.fix}".strip() for finding in wrong))
    if (config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "nvme":
        raise UsageError(NVME_OPTIMIZER)


def _leads() -> bool:
    return not launched() or os.environ["RANK"] == "0"


def _last(options: RunOptions, stop_after: int | None) -> int:
    if stop_after is not None and not 1 <= stop_after <= options.steps:
        raise UsageError(f"--stop-after {stop_after}; expected 1 to {options.steps}, the --steps of the run")
    return stop_after or options.steps


def _run(job: Job, progress: Progress | None) -> RunReport:
    run = Path(job.options.output_dir)
    return _report(
        job.options, run_job(job, _follow(run, job.options.steps, progress) if progress is not None else None)
    )


def _report(options: RunOptions, outcome: Outcome) -> RunReport:
    run = Path(options.output_dir)
    lines = read_metrics(run)
    report = RunReport(
        str(run),
        outcome.step,
        options.steps,
        outcome.step >= options.steps,
        outcome.interrupted,
        lines[-1]["loss"] if lines else None,
        outcome.checkpoint,
        str(run / METRICS),
        options.layout.label(),
        outcome.seconds,
    )
    if _leads() and lines:
        from dsconv.engine.plots import plot_run

        report.plot = plot_run(run, lines, report.warnings)
    return report


def _follow(run: Path, steps: int, progress: Progress) -> Callable[[], None]:
    """Return a function that reports to ``progress`` what metrics.jsonl says."""

    def look() -> None:
        lines = read_metrics(run)
        if lines:
            progress("train", lines[-1]["step"], steps)

    return look
