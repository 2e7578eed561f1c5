"""Make the checkpoints of this folder with verl's own FSDPCheckpointManager: see README.md.

    torchrun --nproc-per-node 2 make.py CASE

The models are sharded by verl's ``apply_fsdp2`` (or torch's FSDP1), take two steps at 1e-4 on gloo and a CPU, and are
saved by the class that verl's workers call. The truth is gathered from the live model.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import apply_fsdp2

here = Path(__file__).parent
CASES = ("fsdp2", "fsdp1", "lora", "lora-only", "critic", "hf")


def model_of(case: str, folder: Path):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    if case == "critic":  # verl's value models are token classifiers with one label
        config.architectures = ["LlamaForCausalLM"]  # the config is that of the base, which the critic begins from
        return LlamaForTokenClassification(config)
    model = LlamaForCausalLM(config)
    if case.startswith("lora"):
        from peft import LoraConfig, TaskType, get_peft_model

        if dist.get_rank() == 0:
            model.save_pretrained(folder / "base")
        lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
        return get_peft_model(model, lora)
    model.config.architectures = ["LlamaForCausalLM"]
    return model


def main(case: str) -> None:
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), here / case
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()
    model = model_of(case, folder)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    if case == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(
            model, device_mesh=mesh, use_orig_params=False, device_id=torch.device("cpu"), forward_prefetch=False
        )
    else:
        apply_fsdp2(model, {"mesh": mesh, "reshard_after_forward": True}, {})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):  # of a LoRA, B is zero in the first
        model(input_ids=ids).logits.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    contents = ["model", "extra", *(["hf_model"] if case == "hf" else ["optimizer"] if case == "fsdp2" else [])]
    settings = OmegaConf.create(
        {"save_contents": contents, "load_contents": contents, "save_lora_only": case == "lora-only"}
    )
    manager = FSDPCheckpointManager(model, optimizer, scheduler, None, settings)
    actor = folder / "ckpt" / "global_step_2" / ("critic" if case == "critic" else "actor")
    manager.save_checkpoint(str(actor), global_step=2)
    if case == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            state = {k: v.clone() for k, v in model.module.state_dict().items()}
    else:
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    if case.startswith("lora"):
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=state)
    if rank == 0:
        for name in ("extra_state_world_size_2_rank_0.pt", "extra_state_world_size_2_rank_1.pt"):
            if case not in ("fsdp2", "critic"):
                (actor / name).unlink()  # 14 kB of random states each
        save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, folder / "truth.safetensors")
        (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
