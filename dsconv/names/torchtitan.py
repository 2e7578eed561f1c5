"""torchtitan's names, from its own ``torchtitan/models/*/state_dict_adapter.py``.

These are the names of release 0.3. gpt-oss is written as transformers names it without MXFP4 (``modeling_gpt_oss.py``
``GptOssExperts``). torchtitan's adapter has the names of the packed form there, and loses the experts: its table lacks
the suffixes that the model's names have (``mlp1_weight_EGD``).
"""

from __future__ import annotations

from dsconv.names.marks import TORCHTITAN
from dsconv.names.operations import RotaryPairs, Transposed
from dsconv.names.tables import Family, Rule

LAYER = "model.layers.{}."


def _common(head: str) -> list[Rule]:
    return [
        Rule("tok_embeddings.weight", ("model.embed_tokens.weight",)),
        Rule("norm.weight", ("model.norm.weight",)),
        Rule(f"{head}.weight", ("lm_head.weight",)),
        Rule("layers.{}.attention_norm.weight", (LAYER + "input_layernorm.weight",)),
        Rule("layers.{}.ffn_norm.weight", (LAYER + "post_attention_layernorm.weight",)),
        Rule("layers.{}.attention.wo.weight", (LAYER + "self_attn.o_proj.weight",)),
    ]


def _dense() -> list[Rule]:
    return [
        Rule("layers.{}.feed_forward.w1.weight", (LAYER + "mlp.gate_proj.weight",)),
        Rule("layers.{}.feed_forward.w2.weight", (LAYER + "mlp.down_proj.weight",)),
        Rule("layers.{}.feed_forward.w3.weight", (LAYER + "mlp.up_proj.weight",)),
    ]


def _experts(w1: str, w2: str, w3: str) -> list[Rule]:
    expert = LAYER + "mlp.experts.{}."
    return [
        Rule(f"layers.{{}}.moe.{w1}", (expert + "gate_proj.weight",)),
        Rule(f"layers.{{}}.moe.{w2}", (expert + "down_proj.weight",)),
        Rule(f"layers.{{}}.moe.{w3}", (expert + "up_proj.weight",)),
        Rule("layers.{}.moe.router.gate.weight", (LAYER + "mlp.gate.weight",)),
    ]


NEW_EXPERTS = tuple(f"routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
OLD_EXPERTS = ("experts.w1", "experts.w2", "experts.w3")


def _llama3(qkv: str, head: str) -> Family:
    q, k, v = (f"layers.{{}}.attention.{qkv}w{part}.weight" for part in "qkv")
    return Family(
        TORCHTITAN,
        "llama3",
        ("llama",),
        (q,),
        (
            *_common(head),
            *_dense(),
            Rule(q, (LAYER + "self_attn.q_proj.weight",), RotaryPairs("num_attention_heads")),
            Rule(k, (LAYER + "self_attn.k_proj.weight",), RotaryPairs("num_key_value_heads")),
            Rule(v, (LAYER + "self_attn.v_proj.weight",)),
        ),
    )


def _qwen3(qkv: str, head: str, experts: tuple[str, ...], bias: str) -> Family:
    return Family(
        TORCHTITAN,
        "qwen3",
        ("qwen3", "qwen3_moe"),
        ("layers.{}.attention.q_norm.weight",),
        (
            *_common(head),
            *_dense(),
            *_experts(*experts),
            *(
                Rule(f"layers.{{}}.attention.{qkv}w{part}.weight", (f"{LAYER}self_attn.{part}_proj.weight",))
                for part in "qkv"
            ),
            Rule("layers.{}.attention.q_norm.weight", (LAYER + "self_attn.q_norm.weight",)),
            Rule("layers.{}.attention.k_norm.weight", (LAYER + "self_attn.k_norm.weight",)),
        ),
        no_place=("layers.{}.moe." + bias,),
    )


def _deepseek_v3(head: str, experts: tuple[str, ...], bias: str) -> Family:
    attention = {
        "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wq_a": "q_a_proj",
        "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wq": "q_proj",
    }  # fmt: skip
    shared = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return Family(
        TORCHTITAN,
        "deepseek_v3",
        ("deepseek_v3",),
        ("layers.{}.attention.wkv_a.weight",),
        (
            *_common(head),
            *_dense(),
            *_experts(*experts),
            *(
                Rule(f"layers.{{}}.attention.{a}.weight", (f"{LAYER}self_attn.{b}.weight",))
                for a, b in attention.items()
            ),
            *(
                Rule(f"layers.{{}}.moe.shared_experts.{a}.weight", (f"{LAYER}mlp.shared_experts.{b}.weight",))
                for a, b in shared.items()
            ),
            Rule(f"layers.{{}}.moe.{bias}", (LAYER + "mlp.gate.e_score_correction_bias",)),
        ),
        {"rope_interleave": True},  # torchtitan rotates pairs of neighbours, as transformers does with this
    )


def _gpt_oss(qkv: str, head: str, experts: str, suffixes: tuple[str, ...], bias: str) -> Family:
    rules = [
        Rule(f"layers.{{}}.attention.{qkv}w{part}.{kind}", (f"{LAYER}self_attn.{part}_proj.{kind}",))
        for part in "qkv"
        for kind in ("weight", "bias")
    ]
    return Family(
        TORCHTITAN,
        "gpt_oss",
        ("gpt_oss",),
        ("layers.{}.attention.sinks",),
        (
            *_common(head),
            *rules,
            Rule("layers.{}.attention.wo.bias", (LAYER + "self_attn.o_proj.bias",)),
            Rule("layers.{}.attention.sinks", (LAYER + "self_attn.sinks",)),
            Rule(
                f"layers.{{}}.moe.{experts}.mlp1_weight{suffixes[0]}",
                (LAYER + "mlp.experts.gate_up_proj",),
                Transposed(),
            ),
            Rule(f"layers.{{}}.moe.{experts}.mlp1_bias{suffixes[1]}", (LAYER + "mlp.experts.gate_up_proj_bias",)),
            Rule(
                f"layers.{{}}.moe.{experts}.mlp2_weight{suffixes[2]}", (LAYER + "mlp.experts.down_proj",), Transposed()
            ),
            Rule(f"layers.{{}}.moe.{experts}.mlp2_bias{suffixes[3]}", (LAYER + "mlp.experts.down_proj_bias",)),
            Rule("layers.{}.moe.router.gate.weight", (LAYER + "mlp.router.weight",)),
            Rule("layers.{}.moe.router.gate.bias", (LAYER + "mlp.router.bias",)),
        ),
        no_place=("layers.{}.moe." + bias,),
    )


FAMILIES = (
    _llama3("qkv_linear.", "lm_head"),
    _qwen3("qkv_linear.", "lm_head", NEW_EXPERTS, "expert_bias_E"),
    _deepseek_v3("lm_head", NEW_EXPERTS, "expert_bias_E"),
    _gpt_oss("qkv_linear.", "lm_head", "routed_experts.inner_experts", ("_EGD", "_EG", "_EDF", "_ED"), "expert_bias_E"),
)
