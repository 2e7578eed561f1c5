"""Save one rank's shards of a random bf16 Llama with torch.distributed.checkpoint. ``checkpoint`` starts the ranks.

FSDP2 cuts rows (dimension 0 of every tensor), and row-parallel TP cuts columns (dimension 1 of every matrix). The
weights are made shard by shard, so that the ranks together need no more memory than the model's size.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

LAYERS = {0.01: (2, 256), 0.1: (8, 768), 0.8: (20, 1664), 2.0: (26, 2432)}  # 10⁹ parameters → layers, width
KINDS = ("rows", "columns", "hf")


def checkpoint(folder: Path, size: float, kind: str, world: int = 2) -> Path:
    """Return the path of a checkpoint of about ``size`` × 10⁹ parameters, which is saved on the first call."""
    target = folder.resolve() / f"llama-{size}b-{kind}-w{world}"
    if (target / "DONE").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(target), str(size), kind]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(world)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise RuntimeError(f"saving the benchmark's checkpoint failed: exit codes {codes}")
    (target / "store").unlink(missing_ok=True)
    (target / "DONE").touch()
    return target


def save(target: Path, size: float, kind: str) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers import LlamaConfig, LlamaForCausalLM

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{target}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    layers, width = LAYERS[size]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(rank)
    state = {}
    for name, tensor in model.state_dict().items():
        dim = 1 if kind == "columns" else 0
        placement = Shard(dim) if dim < tensor.ndim else Replicate()
        local = tensor.chunk(world, dim)[rank] if dim < tensor.ndim else tensor
        values = torch.randn(local.shape, dtype=torch.bfloat16)
        state[name] = DTensor.from_local(
            values, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    if kind == "hf":
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(target), save_distributed=True))
    else:
        dcp.save({"model": state}, checkpoint_id=target)
    if rank == 0:
        config.save_pretrained(target)
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    save(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
