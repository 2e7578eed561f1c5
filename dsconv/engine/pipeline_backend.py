"""Train on DeepSpeed's pipeline engine: stages of layers × data parallelism, with ZeRO 0 or 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsconv.checkpoint.map.renaming import renamed
from dsconv.engine.backend import StepResult
from dsconv.engine.deepspeed_backend import DeepSpeedBackend, ds_config
from dsconv.engine.models import Source, build
from dsconv.engine.options import RunOptions
from dsconv.engine.pipeline_layers import Donor, layer_specs, paths_of, pipeline_names
from dsconv.errors import UsageError
from dsconv.loaders.stream import stream_into
from dsconv.zero_utils.tag_folder import LAYERS_OF_TRANSFORMERS


class PipelineBackend(DeepSpeedBackend):
    """One rank of DeepSpeed's pipeline engine.

    Every rank builds the whole model, as in any layout, and keeps the layers of its stage. Gradient accumulation is the
    pipeline's micro-batches. Stages differ by at most one decoder layer.
    """

    def __init__(self, options: RunOptions, source: Source, *, fresh: bool, universal: bool) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        layout = options.layout
        paths_of(source.config)
        if layout.pp > source.config.num_hidden_layers:
            raise UsageError(
                f"--pp {layout.pp}: each stage needs a layer, but the model has {source.config.num_hidden_layers}"
            )
        # DeepSpeed `engine.py` `_load_checkpoint` does not take the file of such an optimizer.
        if options.dtype == "bf16" and layout.zero_stage == 0:
            raise UsageError(
                "--pp with --dtype bf16 needs --zero-stage 1: without ZeRO, DeepSpeed's pipeline cannot load what it"
                " saves"
            )
        config = ds_config(options)
        config["pipeline"] = {"use_reentrant": False, **config.get("pipeline", {})}
        if universal:
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        self.options = options
        donor = Donor(build(source, options.seed, torch.float32, fresh))
        self.module = PipelineModule(
            layer_specs(donor),
            num_stages=layout.pp,
            loss_fn=_Loss(source.config.vocab_size),
            partition_method="type:Block",
            activation_checkpoint_interval=1 if options.activation_checkpointing else 0,
            checkpointable_layers=["Block"],
        )
        donor.model = None
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=self.module, model_parameters=parameters, config=config)
        names = pipeline_names(source.config)
        self._names = {pipeline: name for name, pipeline in names.items()}
        if fresh and source.checkpoint is not None and options.dtype != "fp32":  # the masters, as in DeepSpeedBackend
            stream_into(self.module, renamed(source.checkpoint, names), strict=False)
        self._sizes = (source.config.hidden_size, source.config.vocab_size)
        self._plain_norm: float | None = None
        self._keep_plain_norm()
        self.dp_rank = self.engine.grid.get_data_parallel_id()
        self.stream = dist.get_rank()  # each stage has its own layers

    def step(self, rows: torch.Tensor) -> StepResult:
        lr = float(self.engine.get_lr()[0])
        self.engine.train_batch(iter([(part, part) for part in rows.split(self.options.micro_batch)]))
        found = self.engine.get_global_grad_norm()
        norm = self._plain_norm if found is None else float(found)
        return StepResult(float(self.engine.dp_group_loss), norm, lr, self._communication())

    def _keep_plain_norm(self) -> None:
        """Clip by the norm of the whole gradient and keep it, without ZeRO in fp32.

        The engine would forget the norm, and would take the first stage's for the whole: DeepSpeed
        ``runtime/utils.py`` ``clip_grad_norm_`` counts gradients of model-parallel rank 0 only, and a pipeline's stages
        are such ranks. A tied weight counts once.
        """
        engine = self.engine

        def clip() -> None:
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            counted = [p.grad for p in engine.module.parameters() if p.grad is not None and not p.ds_pipe_replicated]
            total = torch.stack([g.float().norm() for g in counted]).square().sum()
            dist.all_reduce(total, group=engine.grid.get_pipe_parallel_group())
            norm = total.sqrt()
            self._plain_norm = float(norm)
            torch._foreach_mul_(gradients, torch.clamp(engine.gradient_clipping() / (norm + 1e-6), max=1.0))

        engine.clip_fp32_gradients = clip

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(
            str(folder), tag=tag, save_latest=False, client_state={LAYERS_OF_TRANSFORMERS: True}
        )

    def local_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, state, tensor in super().local_states():
            yield self._names[name], state, tensor

    def logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Run one stage after another; each broadcasts its output to its pipeline."""
        grid = self.engine.grid
        weight = next(self.module.parameters())
        x: Any = rows.to(weight.device)
        self.module.eval()
        with torch.no_grad():
            for stage in range(self.options.layout.pp):
                if stage == grid.get_stage_id():
                    x = self.module(x).contiguous()
                else:
                    width = self._sizes[stage == self.options.layout.pp - 1]
                    x = torch.empty((*rows.shape, width), dtype=weight.dtype, device=weight.device)
                dist.broadcast(x, grid.stage_to_global(stage), group=grid.get_pipe_parallel_group())
        self.module.train()
        return x.float().cpu()


class _Loss:
    """The model's own loss of one micro-batch's logits; DeepSpeed averages over the micro-batches."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        return ForCausalLMLoss(logits, labels, self.vocab_size)
