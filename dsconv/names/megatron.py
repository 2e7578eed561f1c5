"""Megatron-core's names of a GPTModel in ``torch_dist`` checkpoints.

They are from Megatron Bridge 0.3.1, ``models/*/*_bridge.py`` and ``models/conversion/param_mapping.py``, and from
megatron-core 0.16, ``transformer/*.py`` ``sharded_state_dict``; mixtral's from Megatron-LM's own
``tools/checkpoint/loader_mixtral_hf.py``.

A checkpoint stacks the layers of one kind in a first dimension (``decoder.layers.mlp…``), or numbers them
(``decoder.layers.0.mlp…``) where they are of several kinds; experts are stacked after the layers. The norms before
attention and MLP are named after the layer that Transformer Engine fuses them with, or by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.pickles.values import Instance
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import UnsupportedError
from dsconv.names.marks import MEGATRON
from dsconv.names.operations import GateAndUp, Operation, QueryGroups, Vocabulary
from dsconv.names.tables import SAME, Family, Rule

COMMON = "common.pt"
INTERLEAVED = "rotary_interleaved"
LAYERS, LAYER = "decoder.layers.", "model.layers.{}."
EXPERTS = "mlp.experts.experts."
GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
# Latent attention rotates pairs of neighbours (megatron-core ``models/common/embeddings/rope_utils.py``), as
# transformers does with this.
EXPECTS: dict[str, dict[str, bool]] = {"deepseek_v3": {"rope_interleave": True}}
# {Megatron's name, or its names: (Hugging Face's name, or its names, operation)}
Layers = dict[str | tuple[str, str], tuple[str | tuple[str, ...], Operation]]


def _family(name: str, model_type: str, mark: str, layers: Layers) -> Family:
    """Return the family whose layers have these tensors, stacked or numbered."""
    outer = (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
        Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    )
    forms: list[tuple[Rule, ...]] = []
    for prefix in (LAYERS, LAYERS + "{}."):
        rules = list(outer)
        for theirs, (ours, operation) in layers.items():
            names = (theirs,) if isinstance(theirs, str) else theirs
            parts = (ours,) if isinstance(ours, str) else ours
            first, *also = (prefix + each for each in names)
            rules.append(Rule(first, tuple(LAYER + part for part in parts), operation, tuple(also)))
        forms.append(tuple(rules))
    marks = (LAYERS + mark, LAYERS + "{}." + mark)
    expects = EXPECTS.get(model_type, {})
    return Family(MEGATRON, name, (model_type,), marks, forms[0], expects, numbered=forms[1])


QKV = "self_attention.linear_qkv."
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm.weight", "post_attention_layernorm.weight"
ATTENTION: Layers = {
    (QKV + "layer_norm_weight", "input_layernorm.weight"): (BEFORE_ATTENTION, SAME),
    QKV + "weight": (tuple(f"self_attn.{part}_proj.weight" for part in "qkv"), QueryGroups()),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", SAME),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"): (BEFORE_MLP, SAME),
}
QKV_BIAS: Layers = {QKV + "bias": (tuple(f"self_attn.{part}_proj.bias" for part in "qkv"), QueryGroups())}
QK_NORMS: Layers = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", SAME),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", SAME),
}
MLP: Layers = {
    "mlp.linear_fc1.weight": (("mlp." + GATE, "mlp." + UP), GateAndUp("intermediate_size")),
    "mlp.linear_fc2.weight": ("mlp." + DOWN, SAME),
}
LATENT = "self_attention.linear_"
LATENT_ATTENTION: Layers = {
    "input_layernorm.weight": (BEFORE_ATTENTION, SAME),
    LATENT + "proj.weight": ("self_attn.o_proj.weight", SAME),
    LATENT + "kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight", SAME),
    LATENT + "kv_up_proj.weight": ("self_attn.kv_b_proj.weight", SAME),
    ("self_attention.kv_layernorm.weight", LATENT + "kv_up_proj.layer_norm_weight"): (
        "self_attn.kv_a_layernorm.weight", SAME,
    ),
    LATENT + "q_down_proj.weight": ("self_attn.q_a_proj.weight", SAME),
    LATENT + "q_up_proj.weight": ("self_attn.q_b_proj.weight", SAME),
    ("self_attention.q_layernorm.weight", LATENT + "q_up_proj.layer_norm_weight"): (
        "self_attn.q_a_layernorm.weight", SAME,
    ),
    LATENT + "q_proj.weight": ("self_attn.q_proj.weight", SAME),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): (BEFORE_MLP, SAME),
}  # fmt: skip


def _experts(experts: str, router: str, parts: tuple[str, str, str], width: str) -> Layers:
    gate, up, down = (f"{experts}.{{}}.{part}" for part in parts)
    return {
        "mlp.router.weight": (router, SAME),
        EXPERTS + "linear_fc1.weight": ((gate, up), GateAndUp(width)),
        EXPERTS + "linear_fc2.weight": (down, SAME),
    }


QWEN_EXPERTS = _experts("mlp.experts", "mlp.gate.weight", (GATE, UP, DOWN), "moe_intermediate_size")
MIXTRAL_EXPERTS = _experts(
    "block_sparse_moe.experts", "block_sparse_moe.gate.weight", ("w1.weight", "w3.weight", "w2.weight"),
    "intermediate_size",
)  # fmt: skip
SHARED = "mlp.shared_experts."
SHARED_EXPERTS: Layers = {
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias", SAME),
    SHARED + "linear_fc1.weight": (
        (SHARED + GATE, SHARED + UP),
        GateAndUp("moe_intermediate_size", "n_shared_experts"),
    ),
    SHARED + "linear_fc2.weight": (SHARED + DOWN, SAME),
}

_FAMILIES: tuple[tuple[str, str, str, Layers], ...] = (
    ("GPTModel", "llama", QKV + "weight", ATTENTION | MLP),
    ("GPTModel", "qwen2", QKV + "weight", ATTENTION | QKV_BIAS | MLP),
    ("GPTModel", "qwen3", QKV + "weight", ATTENTION | QK_NORMS | MLP),
    ("GPTModel with experts", "mixtral", EXPERTS + "linear_fc1.weight", ATTENTION | MIXTRAL_EXPERTS),
    ("GPTModel with experts", "qwen3_moe", EXPERTS + "linear_fc1.weight", ATTENTION | QK_NORMS | MLP | QWEN_EXPERTS),
    (
        "GPTModel with latent attention", "deepseek_v3", LATENT + "kv_up_proj.weight",
        LATENT_ATTENTION | MLP | QWEN_EXPERTS | SHARED_EXPERTS,
    ),
)  # fmt: skip
FAMILIES = tuple(_family(*row) for row in _FAMILIES)
# Modules whose ``_extra_state`` a model loads beside its weights (megatron-core ``transformer/utils.py``
# ``make_sharded_tensors_for_checkpoint``). It is empty where nothing was trained in FP8.
STATEFUL = re.compile(r"\.linear_\w+$|layernorm$")


def extra_states(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the keys of the empty objects that a model looks for beside the weights of its modules.

    Those of Transformer Engine's modules are among them; a model without it does not ask for those.

    Args:
        checkpoint: A checkpoint with Megatron-core's names.
    """
    for entry in checkpoint.values():
        for name in (entry.name, *entry.aliases):
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or not STATEFUL.search(module):
                continue
            is_stacked = name.startswith(LAYERS) and not name.removeprefix(LAYERS)[:1].isdigit()
            stack = entry.shape[: is_stacked + (EXPERTS in name)] or (1,)
            modules = [module]
            if module.endswith("self_attention.linear_proj"):
                modules.append(module.removesuffix("linear_proj") + "core_attention")
            for index in product(*map(range, stack)):
                place = f"{'.'.join(map(str, index))}_{'.'.join(map(str, stack))}"
                yield from (f"{each}._extra_state/shard_{place}" for each in modules)


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
