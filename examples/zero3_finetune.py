"""Fine-tune under ZeRO-3 from any checkpoint. Each rank reads only its own bytes.

torchrun --nproc-per-node 2 examples/zero3_finetune.py MODEL_FOLDER
"""

import sys

import deepspeed
import torch

import dsconv

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
}

deepspeed.init_distributed()
model = dsconv.load_zero3(sys.argv[1], ds_config=DS_CONFIG)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=DS_CONFIG)

engine.train()
for step in range(3):
    ids = torch.randint(0, model.config.vocab_size, (2, 16), device=engine.device)  # your data here
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
engine.destroy()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
