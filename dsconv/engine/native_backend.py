"""Train on torch alone: tensor parallelism by transformers' plans, FSDP2 or DDP, context parallelism, DCP."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsconv.engine.backend import StepResult
from dsconv.engine.models import Source
from dsconv.engine.native_model import build_replicated, build_sharded
from dsconv.engine.options import RunOptions
from dsconv.errors import UsageError


class NativeBackend:
    """One rank of torch's own parallelism.

    Ranks are numbered dp × cp × tp, the last fastest. Weights and optimizer states are fp32. bf16 is FSDP2's mixed
    precision, or autocast under plain DDP. Plain DDP is used if ``layout.fsdp`` is False and there is no tensor
    parallelism; only it has communication hooks. With tensor parallelism, replicas are FSDP2's, sharded over one rank.
    Context parallelism needs a GPU and **has not been run on one**.

    Args:
        options: The run.
        source: The model.
        fresh: Whether the run starts from the model's weights; ``load`` is not called then.
    """

    def __init__(self, options: RunOptions, source: Source, *, fresh: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        layout, rank = options.layout, dist.get_rank()
        self.options = options
        self.config = copy.deepcopy(source.config)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        if layout.cp > 1 and self.device.type == "cpu":
            raise UsageError(
                f"--cp {layout.cp} needs a GPU, since torch's context_parallel has no attention for the CPU"
            )
        if options.hook == "bf16" and self.device.type == "cpu":
            raise UsageError(
                "--hook bf16 needs a GPU, since torch's DDP sums bf16 over NCCL only; --hook powersgd works on a CPU"
            )
        self.hook = None
        self._replicated = layout.tp == 1 and not layout.fsdp
        if self._replicated:
            from dsconv.engine.native_hooks import Hook

            self.model = build_replicated(options, source, fresh, self.device)
            self.hook = Hook(self.model, options)
        else:
            self.model = build_sharded(options, source, fresh, self.device)
        self.module = self.model.module if self._replicated else self.model
        self._cp_mesh = None
        if layout.cp > 1:
            mesh = init_device_mesh(
                self.device.type, (layout.dp, layout.cp, layout.tp), mesh_dim_names=("dp", "cp", "tp")
            )
            self._cp_mesh = mesh["cp"]
        self._groups = _by_mesh([p for p in self.model.parameters() if p.requires_grad])
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in self._groups], lr=options.lr, weight_decay=options.weight_decay
        )
        self.schedule(0)
        self.dp_rank = rank // (layout.tp * layout.cp)
        # Tensor-parallel ranks hold the same activations, so their dropout must be the same.
        self.stream = rank // layout.tp
        if self._replicated:
            self._settle_buckets()

    def schedule(self, taken: int) -> None:
        """Set the schedule after ``taken`` steps.

        It equals DeepSpeed's WarmupDecayLR (``lr_schedules.py``) bit for bit.
        """
        steps, warmup = self.options.steps, max(2, self.options.warmup)

        def factor(count: int) -> float:
            done = count - 1
            if done < warmup:
                return max(0, done) / warmup
            return max(0.0, (steps - done) / max(1, steps - warmup))

        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.options.lr
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor, last_epoch=taken - 1)

    def step(self, rows: torch.Tensor) -> StepResult:
        parts = rows.to(self.device).split(self.options.micro_batch)
        losses = [self._accumulate(part, len(parts), last=index == len(parts) - 1) for index, part in enumerate(parts)]
        norm = self._clip()
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return StepResult(torch.stack(losses).double().mean().item(), norm, lr)

    def _accumulate(self, part: torch.Tensor, count: int, last: bool) -> torch.Tensor:
        """Run forward and backward of one of ``count`` micro-batches; the last averages gradients over the ranks."""
        with self._syncing(last), self._autocast(), self._context(part) as sequence:
            loss = self._loss(*sequence) if self._cp_mesh is not None else self.model(input_ids=part, labels=part).loss
            with torch.autocast(self.device.type, enabled=False):
                (loss / count).backward()
        return loss.detach()

    @contextlib.contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        if not self._replicated:
            self.model.set_requires_gradient_sync(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.model.no_sync():
                yield

    def _autocast(self) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._replicated and self.options.dtype == "bf16"
        )

    @contextlib.contextmanager
    def _context(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (ids, labels, positions) of this rank's part of the sequence, with ring attention inside the context.

        Yields an empty tuple without context parallelism.
        """
        if self._cp_mesh is None:
            yield ()
            return
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import _cp_options
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # Balanced parts have gaps in their positions, which transformers would take for several sequences in one.
        _cp_options.enable_load_balance = False
        places = torch.arange(rows.shape[1], device=rows.device).repeat(len(rows), 1)
        labels = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
        buffers = [rows.clone(), labels, places]
        with (
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]),
            context_parallel(
                self._cp_mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
            ),
        ):
            yield tuple(buffers)

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return a loss whose mean over the context-parallel ranks is the mean over all tokens but the first."""
        logits = self.model(input_ids=ids, position_ids=places).logits
        total = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total * self.options.layout.cp / (len(ids) * (self.options.seq_len - 1))

    def _clip(self) -> float:
        """Clip the gradient and return the norm that it had before, over all shards."""
        from torch.distributed.tensor import DTensor
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        norms = []
        for group in self._groups:
            norm = get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = torch.linalg.vector_norm(torch.stack(norms))
        if self.options.grad_clip > 0:
            for group in self._groups:
                clip_grads_with_norm_(group, self.options.grad_clip, total)
        return float(total)

    def _settle_buckets(self) -> None:
        """Run one pass and discard it: after the first, DDP rebuilds its buckets, which changes the order of sums."""
        rows = torch.zeros(self.options.micro_batch, self.options.seq_len, dtype=torch.int64, device=self.device)
        self._accumulate(rows, 1, last=True)
        self.optimizer.zero_grad()

    def save(self, folder: Path, tag: str) -> None:
        from dsconv.engine.native_state import save

        save(self, folder / tag)

    def load(self, checkpoint: Path) -> None:
        from dsconv.engine.native_state import load

        load(self, checkpoint)

    def local_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, "fp32", _local(parameter)
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if value.dim():
                    yield name, key, _local(value)

    def logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        if self._cp_mesh is not None:
            return None
        self.model.eval()
        with torch.no_grad(), self._autocast():
            found: torch.Tensor = self.model(input_ids=rows.to(self.device)).logits.float().cpu()
        self.model.train()
        return found

    def close(self) -> None:
        self.optimizer.zero_grad()


def _by_mesh(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Group parameters by their mesh, since torch's foreach operations take those of one mesh together."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
