"""The sizes that a config.json names, for formats that do not record the full shapes of tensors.

The tables know only the names and keys that decoder models of transformers share. A tensor that is too small is a
problem; one that is too large is not, because embeddings are often padded beyond ``vocab_size``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import read_config
from dsconv.checkpoint.map.regions import Sizes


def too_small(config: Path, shapes: Mapping[str, Sizes]) -> tuple[int, tuple[str, Sizes] | None]:
    """Look for a tensor that is smaller than its config.json says.

    Args:
        config: The config.json.
        shapes: {tensor: its shape as far as the files tell}.

    Returns:
        How many tensors could be compared, and the first one that is too small with the shape it should have.
    """
    table = _table(config)
    compared = 0
    for name, shape in shapes.items():
        for pattern, expected in table:
            if len(expected) == len(shape) and pattern.search(name):
                compared += 1
                if any(size < wanted for size, wanted in zip(shape, expected, strict=True)):
                    return compared, (name, expected)
    return compared, None


def _table(config: Path) -> list[tuple[re.Pattern[str], Sizes]]:
    data = read_config(config)
    # These keys mean something else in models with several parts or with narrower embeddings.
    if data is None or any(
        key.endswith("_config") and isinstance(v, dict) and "hidden_size" in v for key, v in data.items()
    ):
        return []
    if "embedding_size" in data or "word_embed_proj_dim" in data:
        return []

    def size(*keys: str) -> int:
        return next((data[key] for key in keys if type(data.get(key)) is int), 0)

    hidden, vocabulary, inner = size("hidden_size", "n_embd", "d_model"), size("vocab_size"), size("intermediate_size")
    heads = size("num_attention_heads")
    groups = size("num_key_value_heads") or heads
    head = size("head_dim") or (hidden // heads if heads else 0)
    rows: list[tuple[str, Sizes]] = [
        (r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$", (vocabulary, hidden)),
        (r"(^|\.)lm_head\.weight$", (vocabulary, hidden)),
        (r"(^|\.)(input_layernorm|post_attention_layernorm|norm|ln_f|ln_1|ln_2)\.weight$", (hidden,)),
        (r"\.self_attn\.q_proj\.weight$", (heads * head, hidden)),
        (r"\.self_attn\.[kv]_proj\.weight$", (groups * head, hidden)),
        (r"\.self_attn\.o_proj\.weight$", (hidden, heads * head)),
        (r"\.mlp\.(gate|up)_proj\.weight$", (inner, hidden)),
        (r"\.mlp\.down_proj\.weight$", (hidden, inner)),
    ]
    return [(re.compile(pattern), expected) for pattern, expected in rows if all(expected)]


# The shapes that weights of these names have in every architecture of the Llama kind.
LAYERS = {
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
    "embed_tokens": ("vocabulary", "hidden"),
    "lm_head": ("vocabulary", "hidden"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "q_norm": ("head",),
    "k_norm": ("head",),
}


def sizes_of(config: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that ``LAYERS`` names and a few more; 0 where the config does not tell."""
    text = config.get("text_config")
    data = config | text if isinstance(text, dict) else config

    def first(*keys: str) -> int:
        return next((data[key] for key in keys if type(data.get(key)) is int and data[key] > 0), 0)

    hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "num_heads")
    kv = first("num_key_value_heads", "num_kv_heads") or heads
    inner = first("intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    head = first("head_dim") or (hidden // heads if heads else 0)
    places = first("max_position_embeddings", "n_positions")
    sizes = {
        "hidden": hidden,
        "inner": inner,
        "head": head,
        "query": heads * head,
        "key": kv * head,
        "vocabulary": first("vocab_size"),
    }
    return sizes | {"places": places, "gate_up": 2 * inner}
