"""Estimate the activations that a decoder keeps for its backward pass.

Korthikanti et al. (arXiv 2205.05198) count s·b·h·(34 + 5·a·s/h) bytes for a layer of GPT in 16 bits. Flash attention,
which torch's sdpa and FlashAttention run, keeps q, k, v, the output and one fp32 number a row and head in place of the
5·a·s² term. The rest is counted here in the same way for transformers' own modules, whose norms are not fused, without
dropout.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder. ``inner`` is the width of the feed-forward part that a token passes, all experts
    together.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    gated: bool  # SwiGLU and its like: three matrices
    rms_norm: bool
    query_key_norm: bool


def layer_bytes(decoder: Decoder, tokens: int, item: int, tp: int = 1) -> int:
    """Return the bytes that one layer keeps. TP divides attention and feed-forward, not the norms.

    An RMS norm of transformers keeps its input in fp32, the normalised input and its output; torch's layer norm input
    and output. A gated feed-forward keeps gate, its activation, up and their product; another what goes into its
    activation and what comes out. ``item`` is the bytes of an element of the model's dtype.
    """
    norm = 4 + 2 * item if decoder.rms_norm else 2 * item
    queries, keys = decoder.heads * decoder.head_dim, decoder.key_value_heads * decoder.head_dim
    attention = item * (2 * queries + 2 * keys) + 4 * decoder.heads
    if decoder.query_key_norm:
        attention += (4 + item) * (queries + keys)
    forward = item * decoder.inner * (4 if decoder.gated else 2)
    return tokens * (2 * norm * decoder.hidden + -(-(attention + forward) // tp))


def activation_bytes(
    decoder: Decoder, micro_batch: int, seq_len: int, item: int, tp: int = 1, checkpointing: bool = False
) -> int:
    """Return the most bytes that are kept at once.

    These are all layers, or with checkpointing each layer's input and one layer, and the head: the last norm; logits in
    the model's dtype, their log-softmax in fp32, and its gradient or the logits' fp32 copy."""
    tokens = micro_batch * seq_len
    layer = layer_bytes(decoder, tokens, item, tp)
    head = tokens * ((4 + 2 * item) * decoder.hidden + (8 + item) * decoder.vocabulary)
    if not checkpointing:
        return decoder.layers * layer + head
    return decoder.layers * tokens * decoder.hidden * item + max(layer, head)
