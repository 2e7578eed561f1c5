"""``python -m tests.hour.training RUN TRUTHS``: transformers' Trainer, which saves and deletes checkpoints, and writes
down what the weights were at each save.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from tests.fixtures import models

DEEPSPEED = {
    "train_batch_size": models.BATCH, "train_micro_batch_size_per_gpu": models.BATCH, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}  # fmt: skip


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("truths", type=click.Path(path_type=Path))
@click.option("--saves", type=int, default=10)
@click.option("--every", "seconds", type=float, default=1.0, help="Seconds between two checkpoints.")
@click.option("--deepspeed/--plain", default=False)
def main(run: Path, truths: Path, saves: int, seconds: float, deepspeed: bool) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    steps_each = 5
    if deepspeed:
        import deepspeed as engine

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        engine.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.distributed.init_process_group("gloo", init_method=f"file://{truths}/store", rank=0, world_size=1)
        engine.init_distributed(dist_backend="gloo", verbose=False)
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=saves * steps_each, save_steps=steps_each, save_total_limit=2,
        per_device_train_batch_size=models.BATCH, learning_rate=1e-2, use_cpu=True, bf16=deepspeed,
        deepspeed=DEEPSPEED if deepspeed else None, logging_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model = models.build("llama_tied", False, 2)

    class Truth(TrainerCallback):  # type: ignore[misc]
        """Takes the truth at the moment of the save, and waits as long as an hour's steps would take."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if deepspeed:
                from deepspeed.utils import safe_get_full_fp32_param

                weights = {name: safe_get_full_fp32_param(weight) for name, weight in model.named_parameters()}
            else:
                weights = dict(model.named_parameters())
            kept = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
            save_file(kept, truths / f"new-{state.global_step}")
            (truths / f"new-{state.global_step}").rename(truths / f"checkpoint-{state.global_step}.safetensors")
            time.sleep(seconds)

    generator = torch.Generator().manual_seed(models.SEED)
    rows = [
        {name: value[0] for name, value in models.SPECS["llama_tied"].batch(model, generator).items()}
        for _ in range(saves * steps_each * models.BATCH)
    ]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Truth()]).train()


if __name__ == "__main__":
    main()
