"""Start the ranks of a job on this machine with torchrun's elastic agent, or be one of them under torchrun."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import dsconv.errors
from dsconv.convert.folders import refuse_link
from dsconv.engine import checkpoints
from dsconv.engine.worker import STOP, Job, Outcome, run_rank
from dsconv.errors import DsconvError, RunFailedError

# What the server that forks the ranks imports once for all of them; it ignores what is not installed.
# transformers imports lazily: without modeling_layers, each rank would spend seconds on importing torch's compiler.
PRELOAD = [
    "dsconv.engine.worker",
    "dsconv.engine.native_backend",
    "dsconv.engine.deepspeed_backend",
    "dsconv.engine.pipeline_backend",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_layers",
]


def launched() -> bool:
    """Return whether torchrun, the deepspeed launcher or a similar one started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_job(job: Job, waiting: Callable[[], None] | None = None) -> Outcome:
    """Run ``job`` on new ranks, or, under torchrun, as the rank that this process is.

    SIGTERM and SIGINT make the ranks save after the current step and end.

    Args:
        job: What to run; ``job.options.layout.nproc`` is the number of ranks.
        waiting: Called several times a second while the ranks run.

    Raises:
        DsconvError: The error of the rank that failed first.
        RunFailedError: The ranks ended in any other way.
    """
    if not launched():
        return launch(job, waiting)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs there
        return run_rank(job)


def launch(job: Job, waiting: Callable[[], None] | None = None) -> Outcome:
    """Run ``job`` on new ranks, as ``run_job`` does; their output goes to RUN/logs."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare()
    logs = Path(job.options.output_dir) / "logs"
    refuse_link(logs)
    logs.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.options.layout.nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn" if torch.cuda.is_available() else "forkserver",  # a CUDA context does not survive a fork
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    ended: list[Any] = []

    def agent() -> None:
        try:
            ended.append(elastic_launch(config, _entry)(replace(job, launcher=os.getpid())))
        except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
            ended.append(error)

    thread = threading.Thread(target=agent, name="agent", daemon=True)
    with _signals_forwarded(logs.parent):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if waiting is not None:
                waiting()
    if isinstance(ended[0], BaseException):
        checkpoints.abandon(logs.parent)
        raise rank_error(ended[0], logs) from None
    return Outcome(**ended[0][0])


def _entry(job: Job) -> dict[str, Any]:
    """Run one rank and return its outcome to the agent.

    Returning waits for the agent. That would last forever if the launcher was killed, so the rank exits instead.
    """
    outcome = run_rank(job)
    if not _alive(job.launcher):
        os._exit(0)
    return asdict(outcome)


def _alive(pid: int | None) -> bool:
    """Return whether the process still runs; a zombie does not."""
    if pid is None:
        return False
    try:
        return not select.select([os.pidfd_open(pid)], [], [], 0)[0]
    except ProcessLookupError:
        return False


def _start_server() -> None:
    """Start the server that forks the ranks, with SIGTERM ignored; ranks ignore it too until they set their handler.

    A scheduler signals every process of a job. A rank that is still importing would die, and nothing would be saved.
    """
    from multiprocessing.forkserver import ensure_running

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
    try:
        ensure_running()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def prepare() -> None:
    """Set the environment of the ranks and start the server that forks them.

    The server imports once what all of them need.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")  # ends ranks that wait for one that failed
    # The server is started with python -c, which would import modules from the current folder first (Python 3.11 on).
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; keeps the order of sums fixed
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        multiprocessing.set_forkserver_preload(PRELOAD)
        _start_server()


@contextlib.contextmanager
def _signals_forwarded(run: Path) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into RUN/.stop, on which the ranks save and end; a second signal kills them at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(signum: int, frame: FrameType | None) -> None:
        if not (run / STOP).exists():
            (run / STOP).touch()
            return
        for child in multiprocessing.active_children():
            child.kill()
        signal.signal(signum, before[signum])
        signal.raise_signal(signum)

    (run / STOP).unlink(missing_ok=True)
    before = {int(number): signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        (run / STOP).unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_error(error: BaseException, logs: Path) -> BaseException:
    """Return the error of the rank that failed first, as its own class if it is one of dsconv's."""
    failures = getattr(error, "failures", None)
    if not failures:
        return RunFailedError(f"the ranks could not be started: {error}") if isinstance(error, Exception) else error
    for failure in sorted(failures.values(), key=lambda failure: failure.timestamp):
        name, _, message = _text(failure).partition(": ")
        kind = getattr(dsconv.errors, name, None)
        if isinstance(kind, type) and issubclass(kind, DsconvError) and kind is not dsconv.errors.RankFailedError:
            return kind.__new__(kind, message)  # some have arguments of their own
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return RunFailedError(f"rank {rank} failed: {_text(failure)} (its output is in {logs})")


def _text(failure: Any) -> str:
    found = failure.error_file_data.get("message")
    return str(found["message"] if isinstance(found, dict) else failure.message)
