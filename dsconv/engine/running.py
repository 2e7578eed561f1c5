"""``train`` and ``resume``: a run in a folder, its metrics, checkpoints and picture."""

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
from dsconv.errors import OutputError, UsageError

Progress = Callable[[str, int, int], None]
NVME_OPTIMIZER = (
    "--ds-config: offload_optimizer to nvme: DeepSpeed 0.19.8 saves what it has swapped under names of the process, and"
    " loads neither that nor the step counts: the run could not be resumed. Write cpu there; --offload nvme keeps the"
    " optimizer in memory too"
)


@dataclass
class RunReport:
    """How a run stands. ``finished``: all steps are taken; ``interrupted``: a signal stopped it, after a save."""

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
    """Start a run in ``options.output_dir``, on ranks of its own, or as one rank of torchrun's.

    It ends after ``options.steps`` steps, or ``stop_after`` to be resumed, with a checkpoint. ``progress`` is called
    with ("train", steps taken, steps in all). Raises UsageError, OutputError where the folder already holds a run, and
    the DsconvError or RunFailedError of a rank that failed.
    """
    options.check()
    options = without_flags(options)
    _lint(options)
    run = Path(options.output_dir)
    if _leads():
        if (run / METRICS).exists() or checkpoints.steps(run):  # what failed before its first step may be tried again
            raise OutputError(
                f"{run} already holds a run: go on with `dsconv resume {run}`, or take another --output-dir"
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
    """Go on with a run from its last whole checkpoint, with the same ranks or with ``layout``.

    Other ranks, stages and parallel degrees get the checkpoint as a universal one, or by DCP's own resharding.
    ``changes`` are other settings of ``RunOptions`` that may change on the way (``steps``, ``save_every``, ``keep``,
    …). Raises as ``train`` does.
    """
    folder = Path(run)
    options = RunOptions.read(folder)
    if changes:
        options = replace(options, **changes)
    checkpoint = checkpoints.latest(folder)
    state = checkpoints.read_state(checkpoint)
    options = options.resharded(layout or state.layout)
    options.check()
    _lint(options)
    if options.layout.backend != state.layout.backend:
        raise UsageError(
            f"{checkpoint} is of --backend {state.layout.backend}, and its optimizer's state is not"
            f" {options.layout.backend}'s: start from its weights with `dsconv merge {checkpoint} OUT` and `dsconv"
            " train OUT`"
        )
    last = _last(options, stop_after)
    if state.step >= last:  # nothing to do, so nothing is started
        return _report(options, Outcome(state.step, str(checkpoint), False, 0.0))
    if _leads():
        options.write()
    return _run(Job(options, last, checkpoint, state.layout != options.layout), progress)


def _lint(options: RunOptions) -> None:
    """Raise UsageError for a DeepSpeed configuration that DeepSpeed would refuse or misread, before any rank starts."""
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
        raise UsageError(f"--stop-after {stop_after}: the run has --steps {options.steps}")
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
    """Tells ``progress`` what metrics.jsonl says, each time that it is called."""

    def look() -> None:
        lines = read_metrics(run)
        if lines:
            progress("train", lines[-1]["step"], steps)

    return look
