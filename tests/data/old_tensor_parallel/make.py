"""Writes the checkpoints of this folder with real, older DeepSpeed releases whose AutoTP saves no rules for joining shards.

    python tests/data/old_tensor_parallel/make.py --ds FOLDER --out OUT --release 0.16.9 [--variant zero1_bf16 ...]

FOLDER holds `ds-<release>/` as written by `pip install --no-deps --target`, as for tests/data/old_releases, whose shims this
uses. Each variant trains a tiny Llama for two steps on two gloo ranks. The truth: a second model whose weights are their own
positions is cut by the same release, so that each rank knows which elements of the full tensors its live masters are.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "old_releases"))
import make as old  # noqa: E402

ZERO = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000, "overlap_comm": False}
VARIANTS = {
    "stage0_fp32": {},
    "zero1_bf16": {"bf16": {"enabled": True}, "zero_optimization": {**ZERO, "stage": 1}},
    "zero2_bf16": {"bf16": {"enabled": True}, "zero_optimization": {**ZERO, "stage": 2}},
}
TP = 2


def build(torch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1234)
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=28,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        ),
        attn_implementation="eager",
    )


def positions(torch, deepspeed):
    model = build(torch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape))
    model = deepspeed.tp_model_init(model, tp_size=TP, dtype=torch.float32)
    return {name: parameter.detach().long().clone() for name, parameter in model.named_parameters()}


def worker(variant, out):
    old.shim()
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, not a kernel that would be compiled first
    get_accelerator()._communication_backend_name = "gloo"
    type(get_accelerator()).current_device = lambda self: "cpu"  # 0.16 gives torch the number of the rank
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    import deepspeed.module_inject.layers as layers

    layers.set_autotp_mode(training=True)
    held = positions(torch, deepspeed)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 100,
        "tensor_parallel": {"autotp_size": TP},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **VARIANTS[variant],
    }
    model = build(torch)
    model = deepspeed.tp_model_init(model, tp_size=TP, dtype=torch.bfloat16 if "bf16" in config else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(0, 31, (2, 6), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(out), client_state={"epoch": 1})
    shards = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter
        shards[name] = (held[name].flatten(), master.detach().float().flatten().clone())
        assert len(held[name].flatten()) == len(shards[name][1]), name
    gathered = [None] * TP
    torch.distributed.all_gather_object(gathered, shards)
    if int(os.environ["RANK"]) == 0:
        truth = {}
        for name, parameter in build(torch).named_parameters():
            truth[name] = torch.full((parameter.numel(),), float("nan"))
            for rank in gathered:
                truth[name][rank[name][0]] = rank[name][1]
            assert not truth[name].isnan().any(), name
            truth[name] = truth[name].view(parameter.shape)
        save_file(truth, str(out / "truth.safetensors"), metadata={"format": "pt"})
        model.config.save_pretrained(out)
        facts = {
            "tied": {},
            "deepspeed": deepspeed.__version__.split("+")[0],
            "torch": torch.__version__.split("+")[0],
            "variant": variant,
        }
        (out / "truth.json").write_text(json.dumps(facts, indent=1) + "\n")
    torch.distributed.barrier()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ds", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--release", required=True)
    parser.add_argument("--variant", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    for variant in options.variant:
        out = options.out / options.release / variant
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": str(options.ds / f"ds-{options.release}"),
            "DS_ACCELERATOR": "cpu",
            "WORLD_SIZE": str(TP),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "LOCAL_SIZE": str(TP),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", variant, str(out)],
                env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
            )
            for r in range(TP)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(f"{options.release} {variant} failed")
        for path in out.rglob("*"):
            if path.is_file() and path.suffix == ".py":
                path.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
