"""Make what megatron/ beside this file lacks, on a CPU: `torchrun --nproc-per-node 4 make_megatron.py save`, then
`python make_megatron.py truth`. `python make_megatron.py back FOLDER` proves the way back.

It needs megatron-core 0.16.1 and megatron-bridge 0.3.1 (`pip install --no-deps`, with psutil) beside torch 2.13. Small
GPTModels are saved by Megatron's own dist_checkpointing on several tensor- and pipeline-parallel ranks. For
truth.safetensors Megatron loads each checkpoint into a model on one rank, and Megatron Bridge's mappings convert that;
mixtral's, which Bridge lacks, have the names of Megatron-LM's own tools/checkpoint/loader_mixtral_hf.py. For the way
back, FOLDER/<case> is what `dsconv to-dcp truth.safetensors --names megatron` made: Megatron loads it with its own
dist_checkpointing.load, and the model must hold the same bytes.
Only the calls that wait for a GPU are replaced, and packages that Bridge imports and does not use here.
"""

import importlib.abc
import importlib.machinery
import json
import re
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent / "megatron"
ABSENT = {"transformer_engine", "mamba_ssm", "causal_conv1d", "fla", "nvidia_resiliency_ext", "hydra", "omegaconf",
          "wandb", "mlflow", "timm", "open_clip", "qwen_vl_utils", "datasets", "accelerate", "modelopt", "PIL", "peft",
          "megatron_fsdp"}  # fmt: skip
ATTENTION = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"qk_layernorm": True, "kv_channels": 16, "num_moe_experts": 4, "moe_router_topk": 2,
           "moe_ffn_hidden_size": 16}  # fmt: skip
LATENT = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1],
          "moe_shared_expert_intermediate_size": 16, "moe_router_enable_expert_bias": True,
          "moe_router_score_function": "sigmoid", "q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 8,
          "qk_pos_emb_head_dim": 8, "v_head_dim": 8, "multi_latent_attention": True, "rope_type": "rope",
          "qk_layernorm": True}  # fmt: skip
# config.json, the changes of TransformerConfig and of the layers' spec, and (tensor, pipeline) parallel sizes.
CASES = {
    "llama": ({"model_type": "llama", "intermediate_size": 48, **ATTENTION}, {}, {}, (2, 2)),
    "qwen2": ({"model_type": "qwen2", "intermediate_size": 48, **ATTENTION}, {"add_qkv_bias": True}, {}, (2, 1)),
    "qwen3": (
        {"model_type": "qwen3", "intermediate_size": 48, "head_dim": 16, **ATTENTION},
        {"qk_layernorm": True, "kv_channels": 16}, {"qk_layernorm": True}, (1, 2),
    ),
    "mixtral": (
        {"model_type": "mixtral", "intermediate_size": 16, **ATTENTION},
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16},
        {"num_experts": 4}, (2, 1),
    ),
    "qwen3-moe": (
        {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "head_dim": 16, **ATTENTION},
        EXPERTS,
        {"qk_layernorm": True, "num_experts": 4}, (1, 2),
    ),
    "qwen3-moe-ep": (
        {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "head_dim": 16, **ATTENTION},
        {**EXPERTS, "expert_model_parallel_size": 2},
        {"qk_layernorm": True, "num_experts": 4}, (1, 1),
    ),
    "deepseek-v3": (
        {"model_type": "deepseek_v3", "intermediate_size": 48, "moe_intermediate_size": 16, "n_shared_experts": 1,
         **ATTENTION},
        LATENT | {"q_lora_rank": 12}, None, (2, 1),
    ),
    "deepseek-v3-pp": (
        {"model_type": "deepseek_v3", "intermediate_size": 48, "moe_intermediate_size": 16, "n_shared_experts": 1,
         **ATTENTION},
        LATENT, None, (1, 2),
    ),
}  # fmt: skip
VOCABULARY, PADDED = 60, 64


def setup() -> None:
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.device_count = lambda: 1
    dist.init_process_group("gloo")


def build(case: str, tp: int, pp: int):
    from megatron.core import parallel_state as parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer import multi_latent_attention as latent
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    for name in ("TEColumnParallelLinear", "TELinear", "Linear"):
        setattr(latent, name, type(name, (), {}))  # classes of Transformer Engine
    if not hasattr(DotProductAttention, "plain"):  # latent attention on a CPU: it holds no weights
        DotProductAttention.plain = DotProductAttention.__init__
        DotProductAttention.__init__ = lambda self, *given, k_channels=0, v_channels=0, **options: self.plain(
            *given, **options
        )
    _, changes, spec, _ = CASES[case]
    changes = dict(changes)
    ep = changes.pop("expert_model_parallel_size", 1) if dist.get_world_size() > 1 else 1
    changes.pop("expert_model_parallel_size", None)
    parallel.destroy_model_parallel()
    parallel.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    random.initialize_rng_tracker(force_reset=True)
    config = (MLATransformerConfig if spec is None else TransformerConfig)(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        use_cpu_initialization=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, pipeline_dtype=torch.float32, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm",
        bias_activation_fusion=False, **changes,
    )  # fmt: skip
    layers = (
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        if spec is None
        else get_gpt_layer_local_spec(normalization="RMSNorm", **spec)
    )
    model = GPTModel(
        config, layers, vocab_size=PADDED, max_sequence_length=16,
        pre_process=parallel.is_pipeline_first_stage(), post_process=parallel.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    return model, parallel


def save() -> None:
    setup()
    from megatron.core import dist_checkpointing

    missing = [case for case in CASES if not (HERE / case).exists()]
    dist.barrier()
    for case in missing:
        hf_config, _, _, (tp, pp) = CASES[case]
        model, parallel = build(case, tp, pp)
        for number, (name, weight) in enumerate(model.named_parameters()):
            split = getattr(weight, "tensor_model_parallel", False)
            stage = parallel.get_pipeline_model_parallel_rank()
            own = parallel.get_tensor_model_parallel_rank() if split else 0
            expert = parallel.get_expert_model_parallel_rank() if ".experts." in name else 0
            torch.manual_seed(1000 * stage + 10 * number + own + 100000 * expert)
            torch.nn.init.normal_(weight)
        for name, bias in model.named_buffers():
            if name.endswith("expert_bias"):
                torch.manual_seed(5)
                torch.nn.init.normal_(bias)
        folder = HERE / case / "iter_0000010"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
            (folder.parent / "latest_checkpointed_iteration.txt").write_text("10")
            (folder.parent / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, **hf_config}) + "\n")
        dist.barrier()
        state = {"model": model.sharded_state_dict(), "iteration": 10, "checkpoint_version": 3.0}
        dist_checkpointing.save(state, str(folder))
        dist.barrier()
    dist.destroy_process_group()


class Anything(type):
    """A class for whatever is asked of a package that is not there."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __or__(cls, other):
        return cls

    def __ror__(cls, other):
        return cls

    def __call__(cls, *given, **options):
        return given[0] if len(given) == 1 and callable(given[0]) else type.__call__(cls)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        absent = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: Anything.__getattr__(Anything, name)
        return module

    def exec_module(self, module):
        pass


def start_alone() -> None:
    import os

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}
    setup()


def loaded(case: str, folder: Path):
    from megatron.core import dist_checkpointing

    model, _ = build(case, 1, 1)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"])
    return model


def back(folder: Path) -> None:
    """Compare what Megatron loads from its own checkpoints with what it loads from dsconv's. The padding is zero."""
    start_alone()
    for case in CASES:
        (made,) = (folder / case).glob("iter_*")
        ours, theirs = (dict(loaded(case, each).state_dict()) for each in (made, HERE / case / "iter_0000010"))
        assert ours.keys() == theirs.keys(), case
        for name, tensor in theirs.items():
            rows = VOCABULARY if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
            same = (tensor is None and ours[name] is None) or torch.equal(tensor[:rows], ours[name][:rows])
            assert same, f"{case}: {name}"
        print(f"{case}: {len(theirs)} tensors are the same")
    dist.destroy_process_group()


def mixtral_registry():
    """Return Bridge's mappings with the names of Megatron-LM's tools/checkpoint/loader_mixtral_hf.py."""
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping

    theirs, ours = "decoder.layers.*.", "model.layers.*."
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        theirs + "input_layernorm.weight": ours + "input_layernorm.weight",
        theirs + "pre_mlp_layernorm.weight": ours + "post_attention_layernorm.weight",
        theirs + "self_attention.linear_proj.weight": ours + "self_attn.o_proj.weight",
        theirs + "mlp.router.weight": ours + "block_sparse_moe.gate.weight",
        theirs + "mlp.experts.linear_fc2.weight*": ours + "block_sparse_moe.experts.*.w2.weight",
    }
    qkv = {part: f"{ours}self_attn.{part}_proj.weight" for part in "qkv"}
    expert = ours + "block_sparse_moe.experts.*."
    return MegatronMappingRegistry(
        *(AutoMapping(megatron_param=a, hf_param=b) for a, b in names.items()),
        QKVMapping(megatron_param=theirs + "self_attention.linear_qkv.weight", **qkv),
        GatedMLPMapping(
            megatron_param=theirs + "mlp.experts.linear_fc1.weight*", gate=expert + "w1.weight", up=expert + "w3.weight"
        ),
    )


def truth() -> None:
    start_alone()
    from safetensors.torch import save_file

    missing = [case for case in CASES if not (HERE / case / "truth.safetensors").exists()]
    models = {case: loaded(case, HERE / case / "iter_0000010") for case in missing}
    sys.meta_path.append(Absent())
    from megatron.bridge.models.deepseek.deepseek_v3_bridge import DeepSeekV3Bridge
    from megatron.bridge.models.llama.llama_bridge import LlamaBridge
    from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
    from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge
    from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge

    registries = {
        "llama": lambda: LlamaBridge().mapping_registry(),
        "qwen2": lambda: Qwen2Bridge().mapping_registry(),
        "qwen3": lambda: Qwen3Bridge().mapping_registry(),
        "qwen3_moe": lambda: Qwen3MoEBridge().mapping_registry(),
        "deepseek_v3": lambda: DeepSeekV3Bridge().mapping_registry(),
        "mixtral": mixtral_registry,
    }
    for case, model in models.items():
        build(case, 1, 1)
        registry = registries[CASES[case][0]["model_type"]]()
        found = {}
        biases = {name: bias for name, bias in model.named_buffers() if name.endswith("expert_bias")}
        for name, weight in (*model.named_parameters(), *biases.items()):
            grouped = re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
            mapping = registry.megatron_to_hf_lookup(grouped)
            if mapping is None:
                raise SystemExit(f"{case}: Bridge does not know {name}")
            module = model.get_submodule(name.rpartition(".")[0])
            module.config = model.config
            found |= mapping.megatron_to_hf(weight.detach(), module)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # Bridge cuts the padding when it exports
            found[name] = found[name][:VOCABULARY]
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in found.items()}, HERE / case / "truth.safetensors"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    {"save": save, "truth": truth, "back": lambda: back(Path(sys.argv[2]))}[sys.argv[1]]()
