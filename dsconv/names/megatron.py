"""Megatron-core's names of a GPTModel in ``torch_dist`` checkpoints.

They are from Megatron Bridge 0.3.1, ``models/*/*_bridge.py`` and ``models/conversion/param_mapping.py``, and from
megatron-core 0.16, ``transformer/*.py`` ``sharded_state_dict``.

A checkpoint stacks the layers of one kind in a first dimension (``decoder.layers.mlp…``), or numbers them
(``decoder.layers.0.mlp…``) where they are of several kinds; experts are stacked after the layers. The norms before
attention and MLP are named after the layer that Transformer Engine fuses them with, or by themselves.
"""

from __future__ import annotations

from dataclasses import replace

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.pickles.values import Instance
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import UnsupportedError
from dsconv.names.operations import GateAndUp, Operation, QueryGroups, Vocabulary
from dsconv.names.tables import Family, Rule

FRAMEWORK = "Megatron-core"
COMMON = "common.pt"
INTERLEAVED = "rotary_interleaved"
LAYER = "model.layers.{}."
GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
Layers = dict[str, tuple[str | tuple[str, ...], Operation | None]]


def _family(name: str, model_types: tuple[str, ...], mark: str, layers: Layers) -> Family:
    """Return the family whose layers have these tensors, stacked or numbered."""
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
        Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    for theirs, (ours, operation) in layers.items():
        parts = (ours,) if isinstance(ours, str) else ours
        rule = Rule(f"decoder.layers.{theirs}", tuple(LAYER + part for part in parts))
        rule = replace(rule, operation=operation) if operation is not None else rule
        rules += [rule, replace(rule, theirs=f"decoder.layers.{{}}.{theirs}")]
    marks = (f"decoder.layers.{mark}", f"decoder.layers.{{}}.{mark}")
    return Family(FRAMEWORK, name, model_types, marks, tuple(rules))


NORMS: Layers = {
    "input_layernorm.weight": ("input_layernorm.weight", None),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", None),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", None),
}
QKV = "self_attention.linear_qkv."
ATTENTION: Layers = {
    **NORMS,
    QKV + "layer_norm_weight": ("input_layernorm.weight", None),
    QKV + "weight": (tuple(f"self_attn.{part}_proj.weight" for part in "qkv"), QueryGroups()),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", None),
}
QKV_BIAS: Layers = {QKV + "bias": (tuple(f"self_attn.{part}_proj.bias" for part in "qkv"), QueryGroups())}
QK_NORMS: Layers = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", None),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", None),
}
MLP: Layers = {
    "mlp.linear_fc1.weight": (("mlp." + GATE, "mlp." + UP), GateAndUp("intermediate_size")),
    "mlp.linear_fc2.weight": ("mlp." + DOWN, None),
}
LATENT = "self_attention.linear_"
LATENT_ATTENTION: Layers = {
    **NORMS,
    LATENT + "proj.weight": ("self_attn.o_proj.weight", None),
    LATENT + "kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight", None),
    LATENT + "kv_up_proj.weight": ("self_attn.kv_b_proj.weight", None),
    LATENT + "kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight", None),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight", None),
    LATENT + "q_down_proj.weight": ("self_attn.q_a_proj.weight", None),
    LATENT + "q_up_proj.weight": ("self_attn.q_b_proj.weight", None),
    LATENT + "q_up_proj.layer_norm_weight": ("self_attn.q_a_layernorm.weight", None),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight", None),
    LATENT + "q_proj.weight": ("self_attn.q_proj.weight", None),
}


def _experts(experts: str, router: str, parts: tuple[str, str, str], width: str) -> Layers:
    gate, up, down = (f"{experts}.{{}}.{part}" for part in parts)
    return {
        "mlp.router.weight": (router, None),
        "mlp.experts.experts.linear_fc1.weight": ((gate, up), GateAndUp(width)),
        "mlp.experts.experts.linear_fc2.weight": (down, None),
    }


QWEN_EXPERTS = _experts("mlp.experts", "mlp.gate.weight", (GATE, UP, DOWN), "moe_intermediate_size")
SHARED = "mlp.shared_experts."
SHARED_EXPERTS: Layers = {
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias", None),
    SHARED + "linear_fc1.weight": (
        (SHARED + GATE, SHARED + UP),
        GateAndUp("moe_intermediate_size", "n_shared_experts"),
    ),
    SHARED + "linear_fc2.weight": (SHARED + DOWN, None),
}

_FAMILIES: tuple[tuple[str, str, str, Layers], ...] = (
    ("GPTModel", "llama", QKV + "weight", ATTENTION | MLP),
    ("GPTModel", "qwen2", QKV + "weight", ATTENTION | QKV_BIAS | MLP),
    ("GPTModel", "qwen3", QKV + "weight", ATTENTION | QK_NORMS | MLP),
    ("GPTModel with experts", "qwen3_moe", "mlp.router.weight", ATTENTION | QK_NORMS | MLP | QWEN_EXPERTS),
    (
        "GPTModel with latent attention", "deepseek_v3", LATENT + "kv_up_proj.weight",
        LATENT_ATTENTION | MLP | QWEN_EXPERTS | SHARED_EXPERTS,
    ),
)  # fmt: skip
FAMILIES = tuple(_family(name, (model_type,), mark, layers) for name, model_type, mark, layers in _FAMILIES)


def check_arguments(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Check that the run's arguments, which Megatron-LM saves, tell of no other arrangement of the weights.

    They lie in ``common.pt`` (megatron-core ``dist_checkpointing/strategies/common.py``), under ``args``.

    Returns:
        A warning, if the checkpoint does not hold them.

    Raises:
        UnsupportedError: the weights are arranged otherwise.
    """
    told = False
    for folder in dict.fromkeys(source.parent for source in checkpoint.sources):
        path = folder / COMMON
        if not path.is_file():
            continue
        root = TorchFile(path, may_hold_unread=True).root
        arguments = root.get("args") if isinstance(root, dict) else None
        if not isinstance(arguments, Instance):
            continue
        told = True
        if arguments.get(INTERLEAVED) is True:
            raise UnsupportedError(
                f"{path}: the run's arguments set {INTERLEAVED}: the rows of q and k are arranged for rotated pairs of"
                " neighbours, which --names hf does not convert"
            )
    if told:
        return ()
    text = (
        f"the checkpoint does not hold the run's arguments: --names hf assumes {INTERLEAVED}=False, Megatron-core's"
        " default. If the model was built with True, the rows of q and k are wrong"
    )
    return (text,)
