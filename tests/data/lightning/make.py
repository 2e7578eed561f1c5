"""Make the checkpoints of this folder with Lightning's own Trainer and Fabric: see README.md.

    torchrun --nproc-per-node 2 make.py fabric-sharded    # and fabric-full; FSDP2, as FSDP1 wants a GPU there
    python make.py trainer

Each case takes two steps at 1e-4 on gloo and a CPU. The truth is gathered from the live model.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

here = Path(__file__).parent


def build() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config)


def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 61, (4, 8), generator=torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))))


class Module(pl.LightningModule):
    def __init__(self, lr: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = build()

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], foreach=False)


def keep(folder: Path, state: dict[str, torch.Tensor]) -> None:
    build().config.save_pretrained(folder / "config")
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "truth.safetensors")
    (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")


def train(folder: Path) -> None:
    module = Module()
    saving = ModelCheckpoint(dirpath=folder / "ckpt", filename="{epoch}-{step}", every_n_train_steps=2)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", devices=1, callbacks=[saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(), batch_size=2))
    keep(folder, module.net.state_dict())


def shard(model: LlamaForCausalLM, mesh: DeviceMesh) -> LlamaForCausalLM:
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


def fabric(folder: Path, kind: str) -> None:
    strategy = ModelParallelStrategy(
        shard, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=kind == "sharded"
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(build())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False))
    for ids in torch.stack(batches()).split(2):
        fabric.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(folder / "ckpt" / "step-2.ckpt", {"model": model, "optimizer": optimizer, "step": 2})
    state = {name: value.full_tensor() for name, value in model._forward_module.state_dict().items()}
    if fabric.global_rank == 0:
        keep(folder, state)
    fabric.barrier()


def main(case: str) -> None:
    folder = here / case
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "ckpt").mkdir(parents=True)
    if case == "trainer":
        train(folder)
    else:
        fabric(folder, case.removeprefix("fabric-"))


if __name__ == "__main__":
    main(sys.argv[1])
