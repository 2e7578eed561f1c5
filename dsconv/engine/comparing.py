"""Compare what validation must find equal: digests of states, tensors of checkpoints, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.transfer.reading import tensor_bytes
from dsconv.convert.universal_plan import training_of
from dsconv.engine.checkpoints import FOLDER, tag_of
from dsconv.engine.state_digests import read_logits, read_states
from dsconv.errors import UnsupportedError
from dsconv.text import count as counted

SHOWN = 5


def compare_states(first: Path, second: Path, kinds: tuple[str, ...] | None = None) -> list[str]:
    """Return where two folders of digests differ, as ``rank 1: exp_avg of model.norm.weight``.

    Only the first few differences are listed, then their number. ``kinds`` restricts the comparison to some states.
    """
    a, b = read_states(first), read_states(second)
    if len(a) != len(b):
        return [f"{len(a)} and {counted(len(b), 'rank')}"]
    found = []
    for rank, (left, right) in enumerate(zip(a, b, strict=True)):
        for kind in kinds or sorted(left.keys() | right.keys()):
            one, two = left.get(kind, {}), right.get(kind, {})
            found += [
                f"rank {rank}: {kind} of {name}"
                for name in sorted(one.keys() | two.keys())
                if one.get(name) != two.get(name)
            ]
    return _few(found)


def _few(found: list[str]) -> list[str]:
    return found if len(found) <= SHOWN else [*found[:SHOWN], f"and {len(found) - SHOWN} more"]


def compare_checkpoints(run: Path, step: int, resaved: Path) -> tuple[int, list[str]]:
    """Compare a step's checkpoint with one that was saved from what another run loaded, bit for bit.

    Masters are compared, and optimizer states if dsconv reads those of both formats.

    Returns:
        The number of tensors that were compared, and the names of those that differ.
    """
    first, second = open_checkpoint(run / FOLDER / tag_of(step)), open_checkpoint(resaved)
    count, differing = _compare(dict(first), dict(second))
    one, two = _optimizer(first), _optimizer(second)
    if one and two:
        more, others = _compare(one, two)
        count, differing = count + more, differing + others
    return count, _few(differing)


def _optimizer(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return the states as {parameter/state: entry}; empty if dsconv does not read the format's optimizer."""
    try:
        training = training_of(checkpoint)
    except UnsupportedError:
        return {}
    return {f"{name}/{state}": entry for name, states in training.states.items() for state, entry in states.items()}


def _compare(first: dict[str, TensorEntry], second: dict[str, TensorEntry]) -> tuple[int, list[str]]:
    second = second | {alias: entry for entry in second.values() for alias in entry.aliases}
    names = {name for name in first if name in second} | {a for e in first.values() for a in e.aliases if a in second}
    differing = [
        f"{name} is missing"
        for name, entry in first.items()
        if name not in second and not any(a in names for a in entry.aliases)
    ]
    compared = 0
    for name, entry in first.items():
        match = next((n for n in (name, *entry.aliases) if n in second), None)
        if match is None:
            continue
        compared += 1
        a, b = entry.read().contiguous(), second[match].read().contiguous()
        if a.shape != b.shape or a.dtype != b.dtype or bytes(tensor_bytes(a)) != bytes(tensor_bytes(b)):
            differing.append(name)
    return compared, differing


def compare_logits(digests: Path, merged: Path, dtype: str) -> dict[str, Any]:
    """Return how far the merged model's logits are from the trained model's, as a part of the largest logit.

    0 means that they are equal bit for bit.
    """
    found = read_logits(digests)
    if found is None:
        return {"logits": "not computed: each rank has only a part of every sequence"}
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from dsconv.engine.models import TORCH_DTYPES

    rows, trained = found
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(merged), dtype=TORCH_DTYPES[dtype], attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=rows).logits.float()
    return {
        "largest difference of logits": float((logits - trained).abs().max() / trained.abs().max()),
        "rows": len(rows),
    }
