"""The options of a run, which RUN/run.json keeps, and the layout of its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsconv.errors import CheckpointNotFoundError, MalformedError, UsageError
from dsconv.text import count
from dsconv.urls import local_path

RUN_FILE = "run.json"
BACKENDS = ("deepspeed", "native")
DTYPES = ("fp32", "bf16", "fp16")
HOOKS = ("none", "bf16", "powersgd")


@dataclass(frozen=True)
class Layout:
    """The ranks of a run and what they do.

    The remaining factor of ``nproc`` is data parallelism.

    Attributes:
        backend: "deepspeed" or "native".
        nproc: Ranks in all.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        tp: Degree of tensor parallelism.
        pp: Pipeline stages.
        sp: Degree of Ulysses sequence parallelism.
        cp: Degree of torch's context parallelism.
        fsdp: Whether the native backend shards parameters (FSDP2) or replicates them (DDP).
    """

    backend: str = "deepspeed"
    nproc: int = 1
    zero_stage: int = 0
    tp: int = 1
    pp: int = 1
    sp: int = 1
    cp: int = 1
    fsdp: bool = True

    @property
    def dp(self) -> int:
        """The number of ranks that take different samples."""
        return self.nproc // (self.tp * self.pp * self.sp * self.cp)

    def check(self) -> None:
        """Raise UsageError, which says what would work, unless an engine has this layout."""
        for axis in ("nproc", "tp", "pp", "sp", "cp"):
            if getattr(self, axis) < 1:
                raise UsageError(f"--{axis} is {getattr(self, axis)}; expected 1 or more")
        if self.backend not in BACKENDS:
            raise UsageError(f"--backend is {self.backend!r}; expected {' or '.join(BACKENDS)}")
        if self.zero_stage not in range(4):
            raise UsageError(f"--zero-stage is {self.zero_stage}; expected 0, 1, 2 or 3")
        degree = self.tp * self.pp * self.sp * self.cp
        if self.nproc % degree:
            asked = " × ".join(
                f"{axis} {getattr(self, axis)}" for axis in ("tp", "pp", "sp", "cp") if getattr(self, axis) > 1
            )
            raise UsageError(
                f"{count(self.nproc, 'rank', 'does')} not divide into {asked}: --nproc must be a multiple of {degree}"
            )
        if self.backend == "native":
            self._check_native()
        elif self.cp > 1:
            raise UsageError(
                "--cp is torch's context parallelism and needs --backend native; DeepSpeed has Ulysses: --sp"
            )
        elif self.pp > 1 and self.zero_stage > 1:
            raise UsageError(
                f"--pp {self.pp} with --zero-stage {self.zero_stage}: DeepSpeed's pipeline supports stages 0 and 1"
            )
        elif self.pp > 1 and (self.tp > 1 or self.sp > 1):
            raise UsageError(
                "--pp combines with data parallelism only: AutoTP and Ulysses do not shard a PipelineModule"
            )
        elif self.tp > 1 and self.sp > 1:
            raise UsageError("--tp with --sp: DeepSpeed's AutoTP and Ulysses do not combine; give one of them")

    def _check_native(self) -> None:
        for axis, other in (("pp", "DeepSpeed's pipeline"), ("sp", "DeepSpeed's Ulysses")):
            if getattr(self, axis) > 1:
                raise UsageError(f"--{axis} is {other} and needs --backend deepspeed")
        if self.zero_stage:
            raise UsageError(
                "--zero-stage needs --backend deepspeed; --backend native shards with FSDP2 (--no-fsdp for DDP)"
            )

    def label(self) -> str:
        """Return a short name, such as ``zero3 × 2`` or ``native tp2 fsdp × 4``."""
        axes = [f"{axis}{getattr(self, axis)}" for axis in ("tp", "pp", "sp", "cp") if getattr(self, axis) > 1]
        kind = f"zero{self.zero_stage}" if self.backend == "deepspeed" else ("fsdp" if self.fsdp else "ddp")
        return " ".join([*(["native"] if self.backend == "native" else []), *axes, kind, "×", str(self.nproc)])


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Attributes:
        model: A folder, a Hub id or a configuration.
        output_dir: The run's folder.
        steps: Optimizer steps in all.
        layout: The ranks.
        save_every: Save after this many steps; 0 saves at the end only.
        keep: Checkpoints to keep; 0 keeps all.
        seq_len: Tokens of a sample.
        batch_size: Samples of a step over all ranks, so that it stays when the layout changes.
        micro_batch: Samples of a forward pass on one rank; gradient accumulation makes up the rest of the batch.
        dtype: "fp32", "bf16" or "fp16".
        seed: The seed of weights, data and dropout.
        data: ``synthetic`` or a file.
        lr: The peak learning rate.
        weight_decay: The weight decay of AdamW.
        warmup: Steps of linear warm-up.
        grad_clip: The largest gradient norm; 0 does not clip.
        offload: Where ZeRO keeps states: "none", "cpu" or "nvme".
        nvme_path: The folder for ``offload`` to NVMe.
        activation_checkpointing: Whether to recompute activations in the backward pass.
        dropout: Overrides every dropout probability of the model's configuration.
        hook: The DDP communication hook of the native backend.
        monitor: DeepSpeed's monitors. ``csv`` and ``tensorboard`` write into RUN/monitor; ``comms`` adds the time in
            collectives to the metrics.
        ds_config: Laid over the DeepSpeed configuration that dsconv makes.
    """

    model: str
    output_dir: str
    steps: int
    layout: Layout = field(default_factory=Layout)
    save_every: int = 0
    keep: int = 0
    seq_len: int = 128
    batch_size: int = 8
    micro_batch: int = 1
    dtype: str = "bf16"
    seed: int = 0
    data: str = "synthetic"
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 0
    grad_clip: float = 1.0
    offload: str = "none"
    nvme_path: str | None = None
    activation_checkpointing: bool = False
    dropout: float | None = None
    hook: str = "none"
    monitor: tuple[str, ...] = ()
    ds_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accumulation(self) -> int:
        """The number of micro-batches of a step on one rank."""
        return self.batch_size // (self.micro_batch * self.layout.dp)

    def check(self) -> None:
        """Raise UsageError unless the run is possible."""
        self.layout.check()
        for what, path in (("MODEL", self.model), ("--data", self.data), ("--nvme-path", self.nvme_path or "")):
            local_path(path, what)
        for name in ("steps", "seq_len", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 1 or more")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype is {self.dtype!r}; expected {', '.join(DTYPES)}")
        share = self.micro_batch * self.layout.dp
        if self.batch_size % share:
            raise UsageError(
                f"--batch-size {self.batch_size} does not divide by --micro-batch {self.micro_batch} × {self.layout.dp}"
                f" data-parallel ranks: use {-(-self.batch_size // share) * share}"
            )
        cut = self.layout.sp * self.layout.cp
        if self.seq_len % cut:
            raise UsageError(f"--seq-len {self.seq_len} does not divide by {cut} ranks of sequence parallelism")
        if self.offload != "none" and self.layout.zero_stage == 0:
            raise UsageError(f"--offload {self.offload} needs --zero-stage 1, 2 or 3")
        if self.offload == "nvme" and (self.layout.zero_stage != 3 or not self.nvme_path):
            raise UsageError("--offload nvme needs --zero-stage 3 and --nvme-path, a folder on a fast local disk")
        if self.hook not in HOOKS:
            raise UsageError(f"--hook is {self.hook!r}; expected {', '.join(HOOKS)}")
        if self.hook != "none" and (self.layout.backend != "native" or self.layout.fsdp or self.layout.tp > 1):
            raise UsageError("--hook compresses DDP's gradients: it needs --backend native --no-fsdp, without --tp")
        if self.monitor and self.layout.backend == "native":
            raise UsageError("--monitor needs --backend deepspeed: the native backend writes metrics.jsonl only")
        if self.dtype == "fp16" and self.layout.backend == "native":
            raise UsageError("--dtype fp16 needs a loss scaler, which --backend native does not have: use bf16")

    def resharded(self, layout: Layout) -> RunOptions:
        """Return the run in another layout, with a micro-batch of 1 if its own does not divide the batch."""
        options = replace(self, layout=layout)
        if layout.dp and options.batch_size % (options.micro_batch * layout.dp) and options.batch_size % layout.dp == 0:
            options = replace(options, micro_batch=1)
        return options

    def write(self) -> None:
        """Write RUN/run.json, replacing it in one step. Raises OutputError."""
        from dsconv.engine.files import write_file

        write_file(Path(self.output_dir) / RUN_FILE, json.dumps(asdict(self), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, run: Path) -> RunOptions:
        """Read RUN/run.json. Raises CheckpointNotFoundError or MalformedError."""
        from dsconv.engine.files import check_types, read_object

        path = run / RUN_FILE
        if not path.exists():
            raise CheckpointNotFoundError(
                f"{path} does not exist: give the folder that `dsconv train --output-dir` wrote"
            )
        found = read_object(path)
        known = {f.name for f in fields(cls)}
        try:
            unknown = sorted(set(found) - known)
            if unknown:
                raise MalformedError(
                    f"{path} has the unknown settings {', '.join(unknown)}: another version of dsconv wrote it"
                )
            check_types(path, cls, found)
            check_types(path, Layout, found["layout"])
            layout = Layout(**found.pop("layout"))
            return cls(
                **{**found, "layout": layout, "monitor": tuple(found.get("monitor", ())), "output_dir": str(run)}
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise MalformedError(f"{path} was not written by `dsconv train`: {error}") from None
