"""Train on DeepSpeed's engine: ZeRO 0 to 3, offload, AutoTP, Ulysses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsconv.checkpoint.opening import open_checkpoint
from dsconv.engine.backend import StepResult
from dsconv.engine.checkpoints import read_state
from dsconv.engine.models import Source, build
from dsconv.engine.options import RunOptions
from dsconv.engine.overlay import merged
from dsconv.engine.states import fill_whole_masters, local_states, take_over
from dsconv.errors import RunFailedError, UnsupportedError, UsageError
from dsconv.loaders.stream import stream_into


def ds_config(options: RunOptions) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: from its options, with ``options.ds_config`` laid over it."""
    layout = options.layout
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.grad_clip,
        "steps_per_print": 10**9,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.lr, "weight_decay": options.weight_decay, "torch_adam": options.offload == "none"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": options.steps,
                "warmup_num_steps": max(1, options.warmup),
                "warmup_min_lr": 0.0,
                "warmup_max_lr": options.lr,
                "warmup_type": "linear",
            },
        },
        "zero_optimization": {"stage": layout.zero_stage},
    }
    if options.dtype != "fp32":
        config[options.dtype] = {"enabled": True}
    if layout.tp > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tp}
    if options.offload != "none":
        zero = config["zero_optimization"]
        pinned = {"pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = {"device": "cpu", **pinned}  # never NVMe: see ``running.NVME_OPTIMIZER``
        if layout.zero_stage == 3:
            path = {"nvme_path": str(options.nvme_path)} if options.offload == "nvme" else {}
            zero["offload_param"] = {"device": options.offload, **path, **pinned}
        if not torch.cuda.is_available():  # torch's Adam, since DeepSpeed's own would be compiled first
            config["zero_force_ds_cpu_optimizer"] = False
            config["optimizer"]["params"]["torch_adam"] = True
    if "comms" in options.monitor:
        config["comms_logger"] = {"enabled": True, "prof_all": True}
    for kind in options.monitor:
        name = {"csv": "csv_monitor", "tensorboard": "tensorboard"}.get(kind)
        if name is not None:
            config[name] = {"enabled": True, "output_path": str(Path(options.output_dir) / "monitor"), "job_name": kind}
    return merged(config, options.ds_config)


class DeepSpeedBackend:
    """One rank of DeepSpeed's engine.

    Args:
        options: The run.
        source: The model.
        fresh: Whether the run starts from the model's weights; ``load`` is not called then.
        universal: Whether ``load`` is given a universal checkpoint, of any layout.
    """

    def __init__(self, options: RunOptions, source: Source, *, fresh: bool, universal: bool) -> None:
        import deepspeed
        from deepspeed.utils import groups

        layout = options.layout
        rank = dist.get_rank()
        config = ds_config(options)
        if universal:
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        self.options = options
        self._group = self._mpu = None
        if fresh and layout.zero_stage == 3 and source.checkpoint is not None and layout.tp == 1:
            from dsconv.loaders.zero3 import load_zero3

            model = load_zero3(source.checkpoint, config, model_class=_causal(source), config=source.config).train()
        else:
            model = build(source, options.seed, torch.float32, fresh)
        if options.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if layout.sp > 1:
            self._mpu = _ulysses(model, options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config, mpu=self._mpu)
        self.module = self.engine.module
        if fresh and source.checkpoint is not None and layout.tp == 1 and options.dtype != "fp32":
            # Fill the masters at the checkpoint's precision; DeepSpeed made them from the 16-bit weights.
            if layout.zero_stage:
                stream_into(self.engine, source.checkpoint, strict=False)
            else:
                fill_whole_masters(self.engine, source.checkpoint)
        self._plain_norm: float | None = None
        self._keep_plain_norm()
        self._share_of_mean = 1
        if layout.sp > 1:
            self._group = groups._get_sequence_parallel_group()
            averaged = layout.zero_stage == 3 and self.engine.optimizer.reduce_scatter
            self._share_scale = layout.sp if averaged else 1
            self._share_of_mean = layout.sp // self._share_scale  # scales a share to the mean over all ranks
        self.dp_rank = rank // (layout.tp * layout.sp)
        # Tensor-parallel ranks hold the same activations, so their dropout must be the same.
        self.stream = rank // layout.tp

    def step(self, rows: torch.Tensor) -> StepResult:
        losses = []
        for part in rows.to(self.engine.device).split(self.options.micro_batch):
            loss = (
                self._sequence_loss(part) if self._group is not None else self.engine(input_ids=part, labels=part).loss
            )
            losses.append(loss.detach() * self._share_of_mean)
            self.engine.backward(loss)
            if self.engine.is_gradient_accumulation_boundary():
                lr = float(self.engine.get_lr()[0])
            self.engine.step()
        found = self.engine.get_global_grad_norm()
        norm = self._plain_norm if found is None else float(found)
        return StepResult(torch.stack(losses).double().mean().item(), norm, lr, self._communication())

    def _communication(self) -> float | None:
        """Return the seconds in collectives since the last step, from DeepSpeed's logger.

        DeepSpeed ``utils/comms_logging.py`` counts milliseconds.
        """
        if "comms" not in self.options.monitor:
            return None
        from deepspeed.comm.comm import comms_logger

        spent = sum(sum(row[1]) for sizes in comms_logger.comms_dict.values() for row in sizes.values())
        comms_logger.comms_dict.clear()
        return float(spent) / 1000

    def _keep_plain_norm(self) -> None:
        """Keep the gradient's norm, which the engine forgets without ZeRO in fp32.

        See DeepSpeed ``engine.py`` ``clip_fp32_gradients``.
        """
        from deepspeed.runtime.utils import clip_grad_norm_

        engine = self.engine

        def clip() -> None:
            self._plain_norm = float(
                clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)
            )

        engine.clip_fp32_gradients = clip

    def _sequence_loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the mean loss over all tokens, from its part of each sequence.

        This is Ulysses (arXiv 2309.14509). DeepSpeed sums gradients over the sequence-parallel ranks and averages them
        over the data-parallel ones (DeepSpeed ``stage_1_and_2.py``,
        "dp_world_size / float(self.sequence_parallel_size)"), so each rank must give its share. Stage 3 with
        ``reduce_scatter`` averages over all ranks (``stage3.py`` ``__avg_scatter_grads``), which a factor undoes.
        """
        size, mine = dist.get_world_size(self._group), dist.get_rank(self._group)
        length = rows.shape[1] // size
        here = slice(mine * length, (mine + 1) * length)
        labels = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)[:, here].contiguous()
        places = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)[:, here].contiguous()
        logits = self.engine(input_ids=rows[:, here].contiguous(), position_ids=places).logits
        total = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total / (len(rows) * (rows.shape[1] - 1)) * self._share_scale

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, checkpoint: Path) -> None:
        new, old = self.options.layout, read_state(checkpoint).layout
        if new.zero_stage == 0 and (old.zero_stage, old.tp, old.pp) != (0, new.tp, new.pp):
            if new.tp * new.pp > 1:
                raise UnsupportedError(
                    f"{checkpoint}: {new.label()} cannot resume from another layout, since DeepSpeed without ZeRO loads"
                    " no universal checkpoint; use --zero-stage 1, which computes the same"
                )
            take_over(self.engine, open_checkpoint(checkpoint))
            return
        path, _ = self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise RunFailedError(f"DeepSpeed did not load {checkpoint}")

    def local_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        return local_states(self.engine)

    def logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        if self._group is not None:
            return None
        self.module.eval()
        with torch.no_grad():
            found = self.module(input_ids=rows.to(self.engine.device)).logits.float().cpu()
        self.module.train()
        if self.options.layout.tp > 1:  # AutoTP cuts the head along the vocabulary
            from deepspeed.utils import groups

            group = groups.get_tensor_model_parallel_group()
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = torch.cat(parts, -1) if found.shape[-1] < self.module.config.get_text_config().vocab_size else found
        return found

    def close(self) -> None:
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._release_process_group_references()


def _causal(source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(source.config)]


def _ulysses(model: Any, options: RunOptions) -> Any:
    """Replace transformers' "sdpa" by DeepSpeed's sequence-parallel attention (DeepSpeed ``ulysses_sp.py``)."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    text = model.config.get_text_config()
    if text.num_attention_heads % options.layout.sp:
        raise UsageError(
            f"--sp {options.layout.sp} does not divide the model's {text.num_attention_heads} attention heads"
        )
    text.num_key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", options.layout.sp, options.micro_batch, seq_length=options.seq_len, seq_length_is_variable=False
    )
