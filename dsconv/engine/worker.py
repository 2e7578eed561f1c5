"""One rank of a run: build the engine, restore its state, take steps, save."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsconv.checkpoint.storage.local import read_small
from dsconv.engine import checkpoints, files
from dsconv.engine.backend import Backend
from dsconv.engine.checkpoints import State
from dsconv.engine.data import Position, open_data
from dsconv.engine.models import Source, keep_source, open_source
from dsconv.engine.options import RunOptions
from dsconv.engine.randomness import restore_randomness, save_randomness, seed_everything
from dsconv.engine.state_digests import write_logits, write_states
from dsconv.errors import DsconvError, InconsistentCheckpointError, OutputError, RunFailedError, UsageError
from dsconv.loaders.agreement import agreement
from dsconv.text import count

METRICS = "metrics.jsonl"
MAX_METRICS_BYTES = 1 << 30  # some seven million steps
STOP = ".stop"


@dataclass(frozen=True)
class Job:
    """What the ranks of one launch do.

    Attributes:
        options: The run.
        stop_after: The last step to take; it is saved.
        checkpoint: The checkpoint to resume from; None starts a new run.
        resharded: Whether the checkpoint was written in another layout.
        digests: A folder for the digests and logits that validation compares.
        fault: The fault that validation injects.
        launcher: The id of the process that started the ranks, if one did.
    """

    options: RunOptions
    stop_after: int
    checkpoint: Path | None = None
    resharded: bool = False
    digests: Path | None = None
    fault: str | None = None
    launcher: int | None = None


@dataclass
class Outcome:
    """How a launch ended. It is the same on every rank."""

    step: int
    checkpoint: str | None
    interrupted: bool
    seconds: float


def run_rank(job: Job) -> Outcome:
    """Run ``job`` as the rank that this process is.

    Every rank calls it, with RANK, WORLD_SIZE and MASTER_ADDR in the environment. Raises DsconvError.
    """
    began = time.monotonic()
    gc.freeze()  # DeepSpeed collects garbage several times a step: what was imported need not be looked through
    stop = _StopFlag(Path(job.options.output_dir), job.launcher)
    _start_group(job.options)
    try:
        with agreement("the engine"):
            job.options.check()
            _check_world(job.options)
            source = open_source(job.options, job.checkpoint is not None)
            if job.checkpoint is None and dist.get_rank() == 0:
                keep_source(source, Path(job.options.output_dir))
            state = _state(job, source)
            data = open_data(
                job.options.data,
                job.options.seq_len,
                source.config.get_text_config().vocab_size,
                job.options.seed,
                source.folder,
            )
        backend = _backend(job, source)
        try:
            _restore(job, backend, state, source)
            if job.digests is not None and job.checkpoint is not None:
                write_states(job.digests / "start", backend)
                if job.resharded:
                    backend.save(job.digests, "resaved")
            loop = _Loop(job, backend, state, data, stop)
            loop.run()
            if job.digests is not None:
                write_states(job.digests / "end", backend)
                write_logits(job.digests, backend, data)
            return Outcome(state.step, loop.saved, loop.interrupted, time.monotonic() - began)
        finally:
            backend.close()
    finally:
        _end_group()


def _check_world(options: RunOptions) -> None:
    world = dist.get_world_size()
    if world != options.layout.nproc:
        raise UsageError(
            f"the launcher started {count(world, 'rank')}, but the run needs {options.layout.nproc}: give --nproc"
            f" {world}"
        )
    if options.dtype == "fp16" and not torch.cuda.is_available():
        raise UsageError("--dtype fp16 needs a GPU, since DeepSpeed does not train in fp16 on a CPU; use --dtype bf16")


def _start_group(options: RunOptions) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if options.layout.backend == "deepspeed":
        import deepspeed

        if not torch.cuda.is_available():  # gloo for every collective; the alternative would be compiled first
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    else:
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")


def _end_group() -> None:
    with contextlib.suppress(Exception):  # report the failure of the other rank, not its absence
        if dist.is_initialized():
            dist.destroy_process_group()


def _backend(job: Job, source: Source) -> Backend:
    options = job.options
    if options.layout.backend == "native":
        from dsconv.engine.native_backend import NativeBackend

        return NativeBackend(options, source, fresh=job.checkpoint is None)
    if options.layout.pp > 1:
        from dsconv.engine.pipeline_backend import PipelineBackend

        return PipelineBackend(options, source, fresh=job.checkpoint is None, universal=_converts(job))
    from dsconv.engine.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(options, source, fresh=job.checkpoint is None, universal=_converts(job))


def _converts(job: Job) -> bool:
    """Return whether the checkpoint must be converted to a universal one first.

    DCP reshards by itself, and DeepSpeed without ZeRO does not load universal checkpoints.
    """
    return job.resharded and job.options.layout.backend == "deepspeed" and job.options.layout.zero_stage > 0


def _state(job: Job, source: Source) -> State:
    """Return the state to start from. Raises InconsistentCheckpointError if the checkpoint is another model's."""
    identity = source.identity()
    if job.checkpoint is None:
        return State(0, Position(), job.options.layout, identity)
    state = checkpoints.read_state(job.checkpoint)
    if state.model != identity:
        differing = [
            f"{key} {state.model.get(key)} and {value}"
            for key, value in identity.items()
            if state.model.get(key) != value
        ]
        raise InconsistentCheckpointError(
            f"{job.checkpoint} was saved from another model than {job.options.model}: {', '.join(differing)}"
        )
    return replace(state, layout=job.options.layout)


def _restore(job: Job, backend: Backend, state: State, source: Source) -> None:
    """Restore the engine's state, then the random generators, since loading draws random numbers."""
    options, rank = job.options, dist.get_rank()
    if job.checkpoint is None:
        seed_everything(options.seed, backend.stream)
        return
    if _converts(job):
        with _universal(job, rank, source) as converted:
            backend.load(converted)
    else:
        backend.load(job.checkpoint)
    if job.resharded:  # no generator states were saved for these ranks
        seed_everything(options.seed + state.step, backend.stream)
    elif job.fault == "reset-rng":
        seed_everything(options.seed, backend.stream)
    else:
        restore_randomness(checkpoints.randomness_path(job.checkpoint, rank))
    if job.fault == "drop-exp-avg":
        for _, name, tensor in backend.local_states():
            if name == "exp_avg":
                tensor.zero_()


@contextlib.contextmanager
def _universal(job: Job, rank: int, source: Source) -> Iterator[Path]:
    """Yield the checkpoint as a universal one, which rank 0 makes and removes afterwards."""

    from dsconv.engine.reshaping import write_universal

    if job.checkpoint is None:
        raise RunFailedError("there is no checkpoint to convert to a universal one")
    run = Path(job.options.output_dir)
    folder = run / checkpoints.FOLDER / checkpoints.UNIVERSAL / job.checkpoint.name
    with agreement("to-universal"):
        if rank == 0:
            checkpoints.begin_universal(run, job.checkpoint.name)
            write_universal(job.checkpoint, folder, job.options.layout, source.config)
    try:
        yield folder
    finally:
        dist.barrier()
        if rank == 0:
            checkpoints.end_universal(run)


class _StopFlag:
    """Whether the run must save after the current step and end.

    SIGTERM, SIGINT, the file RUN/.stop that the launcher makes, and the launcher's end raise it.
    """

    def __init__(self, run: Path, launcher: int | None) -> None:
        self._file = run / STOP
        # Readable once that process has ended.
        self._launcher = os.pidfd_open(launcher) if launcher is not None else None
        self._signalled = False
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._raise)

    def _raise(self, signum: int, frame: Any) -> None:
        self._signalled = True

    @property
    def raised(self) -> bool:
        return self._signalled or self._file.exists() or self._orphaned()

    def _orphaned(self) -> bool:
        """Return whether the launcher was killed.

        The server that forked the ranks lives as long as they do, so nothing else would end them.
        """
        return self._launcher is not None and bool(select.select([self._launcher], [], [], 0)[0])


class _Loop:
    def __init__(self, job: Job, backend: Backend, state: State, data: Any, stop: _StopFlag) -> None:
        self.job, self.backend, self.state, self.data, self.stop = job, backend, state, data, stop
        self.options = job.options
        self.run_folder = Path(job.options.output_dir)
        self.rank = dist.get_rank()
        self.saved: str | None = None
        self.interrupted = False
        self._ended = time.monotonic()

    def run(self) -> None:
        """Take steps up to ``job.stop_after``.

        A checkpoint is saved at each multiple of ``save_every``, at the end, and when the run is told to stop.
        """
        with self._metrics() as metrics:
            if self.job.fault == "skip-batch" and self.job.checkpoint is not None:
                self.data.take(self.state.position, self.options.batch_size)
            while self.state.step < self.job.stop_after and not self.interrupted:
                line = self._step()
                if metrics is not None:
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                last = self.state.step == self.job.stop_after
                due = self.options.save_every and self.state.step % self.options.save_every == 0
                if last or due or self.interrupted:
                    self._save()
                    self._ended = time.monotonic()

    def _step(self) -> dict[str, Any]:
        """Take one step and return its line of metrics.

        ``seconds`` counts from the end of the step before, or of its save: it is the whole cost of a step.
        """
        rows = self.data.take(self.state.position, self.options.batch_size)
        share = len(rows) // self.options.layout.dp
        result = self.backend.step(rows[self.backend.dp_rank * share : (self.backend.dp_rank + 1) * share])
        self.state.step += 1
        loss, stopped, memory = self._reduced(result.loss)
        self.interrupted = stopped
        now = time.monotonic()
        seconds, self._ended = now - self._ended, now
        tokens = self.options.batch_size * self.options.seq_len
        return {
            "step": self.state.step,
            "loss": loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_s": tokens / seconds,
            "memory_bytes": memory,
            "seconds": seconds,
            **({} if result.comm_seconds is None else {"comm_seconds": result.comm_seconds}),
        }

    def _reduced(self, loss: float) -> tuple[float, bool, int]:
        """Return the mean loss, whether any rank was told to stop, and the largest memory of a rank, in one exchange.

        The mean is taken in the order of the ranks.
        """
        mine = torch.tensor([loss, float(self.stop.raised), float(_memory_bytes())], dtype=torch.float64)
        mine = mine.cuda() if torch.cuda.is_available() else mine
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        return table[:, 0].mean().item(), bool(table[:, 1].any()), int(table[:, 2].max())

    def _save(self) -> None:
        """Write a checkpoint on all ranks and commit it on rank 0. A full disk leaves the one before in place."""
        tag = checkpoints.tag_of(self.state.step)
        partial = self.run_folder / checkpoints.FOLDER / checkpoints.PARTIAL
        try:
            with agreement("save"):
                if self.rank == 0:
                    checkpoints.begin(self.run_folder)
            with _disk_errors(partial):  # ranks communicate here: one that fails must end, not wait
                self.backend.save(partial, tag)
            with agreement("save"), _disk_errors(partial):
                save_randomness(checkpoints.randomness_path(partial / tag, self.rank))
                if self.rank == 0:
                    checkpoints.write_state(partial / tag, self.state)
            with agreement("save"):
                if self.rank == 0:
                    self.saved = str(checkpoints.commit(self.run_folder, self.state.step, self.options.keep))
        except DsconvError:
            if self.job.launcher is None:  # otherwise the launcher does it, once no rank writes any more
                checkpoints.abandon(self.run_folder)
            raise

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Any]:
        """Open RUN/metrics.jsonl on rank 0, without the lines of steps that will be taken again."""
        if self.rank != 0:
            yield None
            return
        path = self.run_folder / METRICS
        kept = [line for line in read_metrics(self.run_folder) if line["step"] <= self.state.step]
        files.write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with open(path, "a", encoding="utf-8") as file:
            yield file


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what torch and DeepSpeed raise on a full disk into OutputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, DsconvError) or (isinstance(error, RuntimeError) and "inline_container" not in str(error)):
            # only torch.save's writer names a file so; others concern connections that a dead rank has closed
            raise
        raise OutputError(
            f"{folder}: the checkpoint cannot be written: {error}; `latest` still names the one before"
        ) from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl, without those that the engine did not write whole.

    Raises:
        MalformedError: It is larger than any such file.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):  # also where it is no regular file
        for text in read_small(run / METRICS, MAX_METRICS_BYTES).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if _is_metrics(line):
                    found.append(line)
    return found


def _is_metrics(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and isinstance(line.get("loss"), float)
        and isinstance(line.get("grad_norm"), (float, type(None)))
    )


def _memory_bytes() -> int:
    """Return the peak so far: of the device if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
