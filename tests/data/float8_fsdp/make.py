"""Make ckpt/ and truth.safetensors beside this file, on a CPU.

It needs torchao 0.18 (`pip install --no-deps torchao==0.18.0`) beside torch 2.13. FSDP2 gathers the weights of
torchao's float8 linears as float8; what it saves are full-precision weights, each in a
WeightWithDynamicFloat8CastTensor.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

here = Path(__file__).parent
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(16, 32, bias=False))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, here / "truth.safetensors")
    convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    dcp.save({"model": model.state_dict()}, checkpoint_id=here / "ckpt")
    dist.destroy_process_group()
