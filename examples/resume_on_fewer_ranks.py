"""Continue from a ZeRO-3 checkpoint, fp32 masters included, on another number of ranks and without a merge on disk.

torchrun --nproc-per-node 2 examples/resume_on_fewer_ranks.py CHECKPOINT_FOLDER   # saved by any number of ranks

The optimizer's moments start from zero; `dsconv to-universal` keeps them.
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
model = dsconv.load_zero3(sys.argv[1], ds_config=DS_CONFIG)  # the bf16 weights of the model, in partitions
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=DS_CONFIG)
dsconv.stream_into(engine, sys.argv[1])  # the optimizer's fp32 masters, as they were saved

engine.train()
ids = torch.randint(0, model.config.vocab_size, (2, 16), device=engine.device)  # your data here
loss = engine(input_ids=ids, labels=ids).loss
engine.backward(loss)
engine.step()
if engine.global_rank == 0:
    print(f"resumed: loss {loss.item():.3f}", flush=True)
engine.destroy()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
