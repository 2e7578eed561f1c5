"""Train one rank of a Llama with DeepSpeed for a step and save it. ``checkpoint`` starts the ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LAYERS = {
    0: (1, 64),
    0.1: (8, 768),
    0.4: (20, 1152),
    0.8: (22, 1664),
    1.0: (23, 1792),
    2.0: (26, 2432),
}  # nominal size in 10⁹ parameters → layers, width


def checkpoint(folder: Path, size: float, stage: int = 3, world: int = 2, dtype: str = "bf16") -> Path:
    """Return the path of a checkpoint of about ``size`` × 10⁹ parameters, which is trained on the first call."""
    target = folder / f"llama-{size}b-z{stage}-{dtype}-w{world}"
    if (target / "latest").is_file() and (target / "config.json").is_file():
        return target
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(target), str(size), str(stage), dtype],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise RuntimeError(f"training the benchmark's checkpoint failed: exit codes {codes}")
    return target


def llama_config(size: float) -> Any:
    """Return the configuration of a Llama of about ``size`` × 10⁹ parameters; ``size`` is a key of LAYERS."""
    from transformers import LlamaConfig

    layers, width = LAYERS[size]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


def train(target: Path, size: float, stage: int, dtype: str) -> None:
    import deepspeed
    import torch
    import torch._dynamo  # import it before zero.Init patches what it inspects
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # use gloo for every collective; the native op would have to be compiled
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    config = llama_config(size)
    # Sub-groups take their steps one after another, so the fp32 gradients of 10⁹ parameters fit in 24 GB of memory.
    zero = {"stage": stage, "overlap_comm": False, "sub_group_size": 50_000_000}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": zero,
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    ids = torch.randint(0, 32000, (1, 8), generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(target))
    if rank == 0:
        config.save_pretrained(target)
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    train(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
