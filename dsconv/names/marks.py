"""Tell from a few names whose a checkpoint's are, without the tables: every merge asks, and imports only this file.

The tables of the families (``torchtitan.py``, ``megatron.py``) are imported where a mark is found, or where a user
gives ``--names``.
"""

from __future__ import annotations

from collections.abc import Iterable

STORED, HF = "stored", "hf"  # values of --names, beside those of FRAMEWORKS
TORCHTITAN, MEGATRON = "torchtitan", "Megatron-core"
FRAMEWORKS = {"torchtitan": TORCHTITAN, "megatron": MEGATRON}  # {value of --names: framework}
# Parts of names, one to a line. Each mark of a family in the tables has one of them.
MARKS = {
    TORCHTITAN: (
        "\ntok_embeddings.weight", "\nlayers.0.attention.", ".attention.qkv_linear.", ".attention.wq.",
        ".attention.wkv_a.", ".feed_forward.w1.",
    ),
    MEGATRON: (
        ".self_attention.linear_qkv.", ".self_attention.linear_kv_up_proj.", ".mlp.experts.experts.linear_fc1.",
        "\nembedding.word_embeddings.weight",
    ),
}  # fmt: skip


def framework_of(names: Iterable[str]) -> str | None:
    """Return the framework whose marks some of the names have; None where they have none.

    All names are searched as one text: 100,000 of them take a hundredth of a second.
    """
    text = "\n".join(("", *names))
    return next((framework for framework, marks in MARKS.items() if any(mark in text for mark in marks)), None)
