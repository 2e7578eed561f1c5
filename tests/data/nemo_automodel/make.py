"""Make the checkpoints of this folder with NeMo Automodel's own Checkpointer: see README.md.

    torchrun --nproc-per-node 2 make.py safetensors    # and consolidated, torch_save

A Llama of transformers under FSDP2 takes two steps at 1e-4 on gloo and a CPU; the recipes call the same class to save
it, in ``epoch_E_step_S``. The truth is gathered from the live model.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

here = Path(__file__).parent


def main(case: str) -> None:
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), here / case
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = CheckpointingConfig(
        checkpoint_dir=folder / "ckpt",
        model_save_format="torch_save" if case == "torch_save" else "safetensors",
        save_consolidated=case == "consolidated",
        model_repo_id="org/model",
    )
    path = folder / "ckpt" / "epoch_0_step_2"
    checkpointer = settings.build(dp_rank=rank, tp_rank=0, pp_rank=0)
    checkpointer.save_model(model, str(path))
    if case == "torch_save":
        checkpointer.save_optimizer(optimizer, model, str(path))
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        config.save_pretrained(folder / "config")
        save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, folder / "truth.safetensors")
        (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
