"""Make torchtitan/ beside this file: `torchrun --nproc-per-node 2 make_torchtitan.py`, on a CPU.

It needs torchtitan 0.3.0 beside torch 2.13 (`pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro
docstring_parser triton`). A small model of each family is made by torchtitan's own builders, sharded by FSDP2 on two
ranks and saved by DCP, as torchtitan's CheckpointManager does with `last_save_model_only`. truth.safetensors is what
torchtitan's own state-dict adapter makes of the model.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

HERE = Path(__file__).parent / "torchtitan"
DIM, VOCABULARY = 32, 64
GPT_DIM = 8  # whose builders fix 64 heads of 64


def outer(module, norm, head_init, dim=DIM):
    return {
        "vocab_size": VOCABULARY,
        "dim": dim,
        "tok_embeddings": module.Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=dim, param_init=module._EMBEDDING_INIT
        ),
        "norm": norm,
        "lm_head": module.Linear.Config(in_features=dim, out_features=VOCABULARY, param_init=head_init),
    }


def llama3_config():
    norm = llama3.RMSNorm.Config(normalized_shape=DIM, param_init=llama3._NORM_INIT)
    layers = llama3._build_llama3_layers(
        n_layers=2, dim=DIM, n_heads=4, n_kv_heads=2, hidden_dim=48, attn_backend="flex",
        rope=ComplexRoPE.Config(dim=8, max_seq_len=64, theta=10000.0),
    )  # fmt: skip
    return llama3.Llama3Model.Config(layers=layers, **outer(llama3, norm, llama3._output_linear_init(DIM)))


def qwen3_config(experts):
    sizes = {
        "n_layers": 2, "dim": DIM, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "attn_backend": "flex",
        "rope": CosSinRoPE.Config(dim=16, max_seq_len=64, theta=10000.0),
    }  # fmt: skip
    if experts:
        layers = qwen3._build_qwen3_moe_layers(
            moe_hidden_dim=24, num_experts=experts, top_k=2, moe_comm_backend="standard", **sizes
        )
    else:
        layers = qwen3._build_qwen3_layers(hidden_dim=48, **sizes)
    return qwen3.Qwen3Model.Config(
        layers=layers, enable_weight_tying=not experts, **outer(qwen3, qwen3._qwen3_norm(DIM), qwen3._LINEAR_INIT)
    )


def deepseek_v3_config(q_lora_rank):
    norm = deepseek_v3.RMSNorm.Config(normalized_shape=DIM, param_init=deepseek_v3._NORM_INIT)
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=2, n_dense_layers=1, dim=DIM, n_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, mscale=1.0, dense_hidden_dim=48, moe_hidden_dim=16,
        num_experts=4, num_shared_experts=1, router_top_k=2, router_score_func="sigmoid", attn_backend="flex",
        moe_comm_backend="standard", non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=64, theta=10000.0),
    )  # fmt: skip
    return deepseek_v3.DeepSeekV3Model.Config(
        layers=layers, mtp_layers=[], **outer(deepseek_v3, norm, deepseek_v3._output_linear_init(DIM))
    )


def gpt_oss_config():
    norm = gpt_oss.RMSNorm.Config(normalized_shape=GPT_DIM, param_init=gpt_oss._NORM_INIT)
    layers = gpt_oss._build_gptoss_layers(
        n_layers=1, dim=GPT_DIM, hidden_dim=24, num_experts=4, top_k=2, load_balance_coeff=1e-3,
        moe_comm_backend="standard", rope=CosSinRoPE.Config(dim=64, max_seq_len=64, theta=10000.0),
    )  # fmt: skip
    return gpt_oss.GptOssModel.Config(
        layers=layers, **outer(gpt_oss, norm, gpt_oss._output_linear_init(GPT_DIM), GPT_DIM)
    )


# The configuration, the adapter, and the model's config.json as far as the names need it.
HEADS = {"hidden_size": DIM, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "llama3": (llama3_config(), llama3.Llama3StateDictAdapter, {"model_type": "llama", **HEADS}),
    "qwen3": (
        qwen3_config(0),
        qwen3.Qwen3StateDictAdapter,
        {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, **HEADS},
    ),
    "qwen3-moe": (
        qwen3_config(4), qwen3.Qwen3StateDictAdapter, {"model_type": "qwen3_moe", "head_dim": 16, **HEADS}
    ),
    "deepseek-v3": (
        deepseek_v3_config(0), deepseek_v3.DeepSeekV3StateDictAdapter, {"model_type": "deepseek_v3", **HEADS}
    ),
    "deepseek-v3-lora": (
        deepseek_v3_config(12), deepseek_v3.DeepSeekV3StateDictAdapter, {"model_type": "deepseek_v3", **HEADS}
    ),
    "gpt-oss": (gpt_oss_config(), gpt_oss.GptOssStateDictAdapter, {"model_type": "gpt_oss"}),
}  # fmt: skip


def experts_of(model):
    """What one layer's experts give for two tokens each: torchtitan's adapter loses the weights themselves."""
    experts = model.layers["0"].moe.routed_experts.inner_experts
    torch.manual_seed(7)
    tokens = torch.randn(8, GPT_DIM, dtype=torch.bfloat16)
    with torch.no_grad():
        return {"tokens": tokens, "experts": experts(tokens, torch.full((4,), 2, dtype=torch.int32))}


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for case, (config, adapter, hf_config) in CASES.items():
        model = config.build().to(torch.bfloat16)
        for number, (name, tensor) in enumerate((*model.named_parameters(), *model.named_buffers())):
            torch.manual_seed(number)
            if tensor.is_floating_point() and not name.endswith("rope.cache"):
                torch.nn.init.normal_(tensor)
        folder = HERE / case
        truth = adapter(config, None).to_hf(dict(model.state_dict()))
        if case == "gpt-oss":
            truth |= experts_of(model)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in truth.items()}, folder / "truth.safetensors"
            )
            (folder / "config.json").write_text(json.dumps(hf_config, indent=1) + "\n")
        dist.barrier()
        fully_shard(model, mesh=mesh)
        dcp.save(model.state_dict(), checkpoint_id=str(folder / "step-3"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
