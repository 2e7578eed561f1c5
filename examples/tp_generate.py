"""Generate with a tensor-parallel model. Each rank reads only its slices, and the source may be a training checkpoint.

torchrun --nproc-per-node 2 examples/tp_generate.py MODEL_OR_CHECKPOINT_FOLDER
"""

import os
import sys

import torch

import dsconv

torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
model = dsconv.load_tp(sys.argv[1], tp_plan="auto")

prompt = torch.arange(1, 9, device=model.device)[None]  # your tokenizer here
tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
if torch.distributed.get_rank() == 0:
    print("generated:", tokens[0].tolist(), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
