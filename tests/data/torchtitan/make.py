"""Make the checkpoints of this folder with torchtitan's own Trainer: see README.md.

    torchrun --nproc-per-node 2 make.py CASE

The Trainer shards a tiny model with FSDP2, takes two steps on gloo and a CPU, and saves as the case says. Only answers
about the device are replaced, and flex attention, which has no backward pass on a CPU, by the package's own
ScaledDotProductAttention. The truth is gathered from the live model.
"""

import json
import os
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

here = Path(__file__).parent
CASES = {
    "llama3-full": {"last_save_model_only": False},
    "llama3-last": {"last_save_model_only": True, "export_dtype": "bfloat16"},
    "llama3-hf": {"last_save_model_only": True, "last_save_in_hf": True},
    "qwen3-tied-hf": {"last_save_model_only": True, "last_save_in_hf": True},
    "qwen3-moe-last": {"last_save_model_only": True},
}


def cpu() -> None:
    """Let torchtitan find a CPU where it looks for an accelerator."""
    torch._utils._get_available_device_type = lambda: "cpu"
    from torchtitan.components import metrics
    from torchtitan.distributed import utils as distributed

    distributed.set_pg_timeouts = lambda **_: None  # it ends with a barrier on devices
    peak = metrics.DeviceMemStats(*[0.0] * len(metrics.DeviceMemStats._fields))
    monitor = types.SimpleNamespace(device_name="cpu", get_peak_stats=lambda: peak, reset_peak_stats=lambda: None)
    metrics.build_device_memory_monitor = lambda: monitor


def model_spec(case: str):
    """Return torchtitan's spec of a family, with layers of a few numbers."""
    from torchtitan.models import llama3, qwen3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    layers = 1 if case.endswith("full") else 2  # a full save has twelve files of zip for every tensor
    if case.startswith("llama3"):
        spec = llama3.model_registry("debugmodel", attn_backend="flex")
        rope = llama3.ComplexRoPE.Config(dim=4, max_seq_len=32, theta=10000)
        spec.model.layers = llama3._build_llama3_layers(
            n_layers=layers, dim=16, n_heads=4, n_kv_heads=2, hidden_dim=24, rope=rope, attn_backend="flex"
        )
    else:
        rope = qwen3.CosSinRoPE.Config(dim=4, max_seq_len=32, theta=10000)
        sizes = {"n_layers": layers, "dim": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "attn_backend": "flex"}
        spec = qwen3.model_registry("debugmodel", attn_backend="flex")
        if "moe" in case:
            spec = qwen3.model_registry("debugmodel_moe", attn_backend="flex")
            spec.model.layers = qwen3._build_qwen3_moe_layers(
                moe_hidden_dim=16, num_experts=4, top_k=2, rope=rope, moe_comm_backend="standard", **sizes
            )
        else:
            spec.model.layers = qwen3._build_qwen3_layers(hidden_dim=24, rope=rope, **sizes)
    spec.model.dim, spec.model.vocab_size = 16, 61
    spec.model.tok_embeddings.num_embeddings, spec.model.tok_embeddings.embedding_dim = 61, 16
    spec.model.norm.normalized_shape = 16
    spec.model.lm_head.in_features, spec.model.lm_head.out_features = 16, 61
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def trainer(case: str, folder: Path):
    """Return the Trainer of a case."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    class Tokens(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, tokenizer_path):
            super().__init__()

        def encode(self, *_, **__):
            raise NotImplementedError

        decode = encode

        def get_vocab_size(self):
            return 61

    class Batches(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, dp_rank, dp_world_size, seq_len, local_batch_size, **_):
            self.generator = torch.Generator().manual_seed(dp_rank)
            self.shape, self.rank, self.world, self.taken = (local_batch_size, seq_len), dp_rank, dp_world_size, 0

        def __iter__(self):
            while True:
                self.taken += 1
                ids = torch.randint(0, 61, self.shape, generator=self.generator)
                yield {"input": ids, "positions": torch.arange(self.shape[1]).expand(self.shape)}, ids.roll(-1, 1)

        def state_dict(self):
            return {f"dp_rank_{self.rank}": self.taken, "world_size": self.world}

        def load_state_dict(self, state):
            raise NotImplementedError

    return Trainer.Config(
        model_spec=model_spec(case),
        dump_folder=str(folder),
        hf_assets_path=str(folder / "assets"),
        tokenizer=Tokens.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=1e-4, implementation="for-loop"),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(
            local_batch_size=2, seq_len=16, steps=2, disable_cuda_graphs=True, mixed_precision_param="bfloat16"
        ),
        loss=CrossEntropyLoss.Config(global_vocab_size=61),
        checkpoint=CheckpointManager.Config(enable=True, folder="ckpt", interval=100, **CASES[case]),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=None,
    ).build()


def hub_config(case: str):
    """Return the config.json of the same model; torchtitan leaves the one that it was started from where it is."""
    from transformers import LlamaConfig, Qwen3Config

    kind = LlamaConfig if case.startswith("llama3") else Qwen3Config
    return kind(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings="tied" in case,
        architectures=["LlamaForCausalLM" if kind is LlamaConfig else "Qwen3ForCausalLM"], dtype="float32",
    )  # fmt: skip


def main(case: str) -> None:
    cpu()
    folder = here / case
    if os.environ["RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "assets").mkdir(parents=True)
    run = trainer(case, folder)
    for module in run.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    run.train()
    (model,) = run.model_parts
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    if case.endswith("hf"):
        state = run.config.model_spec.state_dict_adapter(run.model_config, None).to_hf(state)
    run.close()
    if torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "truth.safetensors")
        if case.endswith("hf"):
            hub_config(case).save_pretrained(folder / "config")
        (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")
        for extra in ("assets", "comm_traces"):
            shutil.rmtree(folder / extra, ignore_errors=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
