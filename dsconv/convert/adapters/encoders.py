"""Compute what PEFT computes when it saves an adapter, with the same operations in the same order, to get the same
bits.

Prompt learning saves the embeddings that its encoder gives, not the encoder (peft ``peft_model.py``,
``get_prompt_embedding_to_save``; ``tuners/{prompt_tuning,p_tuning,prefix_tuning,cpt,cartridge}/model.py``); VB-LoRA may
keep the best vectors only (``tuners/vblora/model.py``); AdaLoRA drops the ranks that it pruned (``tuners/adalora/
model.py``, ``resize_state_dict_by_rank_pattern``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.convert.adapters.methods import ENCODER
from dsconv.convert.computed import ComputedEntry, computed
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import count, quote

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]


def prompt_entries(state: Mapping[str, TensorEntry], config: Mapping[str, Any], adapter: str) -> list[TensorEntry]:
    """Return what PEFT saves for a prompt-learning method: ``prompt_embeddings`` and, for multitask, its two factors.

    Args:
        state: The state dict's entries by name.
        config: The adapter_config.json.
        adapter: The adapter's name.

    Raises:
        MalformedError: A tensor of the encoder is missing.
        UnsupportedError: The encoder is of a kind that dsconv does not know.
    """
    kind = str(config.get("peft_type"))
    start = f"{ENCODER}.{adapter}."
    own = {name.removeprefix(start): entry for name, entry in state.items() if name.startswith(start)}

    def need(part: str) -> TensorEntry:
        if part not in own:
            raise MalformedError(
                f"the adapter {quote(adapter)} is of {kind}, and the checkpoint has no {start}{part}, which it needs"
            )
        return own[part]

    if kind == "CARTRIDGE":
        return [_joined("prompt_embeddings", [own[n] for n in ("frozen_embedding",) if n in own]
                        + [need("trainable_embedding")])]  # fmt: skip
    rows = need("embedding.weight")
    if kind == "MULTITASK_PROMPT_TUNING":
        return [
            renamed(need("prefix_task_cols"), "prefix_task_cols"),
            renamed(need("prefix_task_rows"), "prefix_task_rows"),
            renamed(rows, "prompt_embeddings"),
        ]
    function, width = _encoder(kind, own, config, rows)
    if function is None:
        return [renamed(rows, "prompt_embeddings")]
    sources = [entry for _, entry in sorted(own.items())]
    compute = partial(_encode, function, own)
    return [computed("prompt_embeddings", rows.dtype, (rows.shape[0], width), compute, *sources)]


def renamed(entry: TensorEntry, name: str) -> TensorEntry:
    """Return ``entry`` under another name, without the names that it was tied to."""
    return replace(entry, name=name, aliases=())


def _joined(name: str, parts: list[TensorEntry]) -> TensorEntry:
    if len(parts) == 1:
        return renamed(parts[0], name)

    def compute() -> torch.Tensor:
        import torch

        return torch.cat([part.read() for part in parts], dim=0)

    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return computed(name, parts[0].dtype, shape, compute, *parts)


def _encoder(
    kind: str, own: Mapping[str, TensorEntry], config: Mapping[str, Any], rows: TensorEntry
) -> tuple[Callable[[Read], torch.Tensor] | None, int]:
    """Return the function that encodes the prompt and the width of what it gives; (None, …) if there is none."""
    if kind == "P_TUNING" and any(name.startswith("mlp_head.") for name in own):
        last = max(int(name.split(".")[1]) for name in own if name.startswith("mlp_head."))
        if config.get("encoder_reparameterization_type", "MLP") == "LSTM":
            return partial(_lstm, layers=int(config.get("encoder_num_layers", 2))), own[
                f"mlp_head.{last}.weight"
            ].shape[0]
        return partial(_mlp, "mlp_head", last, "relu"), own[f"mlp_head.{last}.weight"].shape[0]
    if kind == "PREFIX_TUNING" and any(name.startswith("transform.") for name in own):
        return partial(_mlp, "transform", 2, "tanh"), own["transform.2.weight"].shape[0]
    if kind == "CPT" and "delta_embedding.weight" in own:
        return partial(_cpt, config=config), rows.shape[1]
    known = {"embedding.weight"}
    if more := sorted(set(own) - known):
        raise UnsupportedError(
            f"the prompt encoder of {kind} has {quote(more[0])}, which dsconv does not know; save the adapter with PEFT"
        )
    return None, rows.shape[1]


def _encode(function: Callable[[Read], torch.Tensor], own: Mapping[str, TensorEntry]) -> torch.Tensor:
    return function(lambda name: own[name].read())[0].detach()


def _mlp(head: str, last: int, activation: str, read: Read) -> torch.Tensor:
    import torch
    from torch.nn import functional

    value = read("embedding.weight").unsqueeze(0)
    for number in range(0, last + 1, 2):
        if number:
            value = functional.relu(value) if activation == "relu" else torch.tanh(value)
        value = functional.linear(value, read(f"{head}.{number}.weight"), read(f"{head}.{number}.bias"))
    return value


def _lstm(read: Read, layers: int) -> torch.Tensor:
    """Run the recurrent encoder. Its parameters require gradients as in training, or torch would use other kernels."""
    import torch

    value = read("embedding.weight").unsqueeze(0)
    hidden = read("lstm_head.weight_hh_l0").shape[1]
    lstm = torch.nn.LSTM(value.shape[-1], hidden, layers, bidirectional=True, batch_first=True, dtype=value.dtype)
    lstm.load_state_dict({name: read(f"lstm_head.{name}") for name in lstm.state_dict()})
    value = lstm(value)[0]
    for number in (0, 2):
        if number:
            value = torch.nn.functional.relu(value)
        value = torch.nn.functional.linear(value, read(f"mlp_head.{number}.weight"), read(f"mlp_head.{number}.bias"))
    return value


def _cpt(read: Read, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the prompt plus its change, whose rows are clipped to a length that depends on the kind of each token."""
    import torch

    rows, change = read("embedding.weight"), read("delta_embedding.weight").clone()
    mask = torch.tensor(config["cpt_tokens_type_mask"], dtype=torch.float32)
    width = torch.sqrt(torch.tensor([float(config.get("token_dim") or rows.shape[1]) / 2048]))
    form, given = (config[f"opt_projection_{name}epsilon"] * width for name in ("format_", ""))
    epsilon = torch.ones_like(mask) * 1e-10
    kind = mask.long()
    for remainder, value in ((1, form), (3, form), (2, given)):
        epsilon[(kind > 0) & (torch.remainder(kind, 4) == remainder)] = value
    length = torch.norm(change, p=2, dim=1)
    chosen = length > 0
    if torch.any(chosen):
        change[chosen] *= (epsilon[chosen] / length[chosen].clamp(min=epsilon[chosen])).view(-1, 1)
    return (rows + change).unsqueeze(0)


def best_vectors(state: Mapping[str, TensorEntry], config: Mapping[str, Any], adapter: str) -> list[ComputedEntry]:
    """Return the indices and weights of the best vectors, which VB-LoRA saves in place of its logits."""
    vectors, topk = int(config["num_vectors"]), int(config["topk"])
    dtype = next((n for n, bits in (("uint8", 8), ("int16", 15), ("int32", 31)) if vectors < 2**bits), "int64")
    entries = []
    for name, entry in state.items():
        if "vblora_logits" not in name or not name.endswith(f".{adapter}"):
            continue
        stem = name.removesuffix(f".{adapter}")
        indices, weights = (partial(_topk, entry, topk, which, dtype) for which in ("indices", "weights"))
        shape = (*entry.shape[:-1], topk)
        entries.append(computed(f"{stem}_topk_indices", BY_NAME[dtype], shape, indices, entry))
        entries.append(computed(f"{stem}_topk_weights", entry.dtype, (*shape[:-1], topk - 1), weights, entry))
    return entries


def _topk(entry: TensorEntry, topk: int, which: str, dtype: str) -> torch.Tensor:
    import torch

    logits, indices = entry.read().topk(topk)
    if which == "indices":
        return indices.to(getattr(torch, dtype))
    return torch.softmax(logits, dim=-1)[:, :, :-1].contiguous()


def without_pruned_ranks(
    entries: dict[str, TensorEntry], pattern: Mapping[str, list[bool]], adapter: str
) -> dict[str, TensorEntry]:
    """Return AdaLoRA's tensors, by the names that they are saved under, without the ranks that ``pattern`` prunes.

    Raises:
        MalformedError: The pattern names a tensor that is missing, or has another length than its rank.
    """
    result = dict(entries)
    for name, kept in pattern.items():
        parts = name.split(".")
        module = ".".join(parts[:-2] if parts[-1] == adapter else parts[:-1])
        for letter in "EAB":
            saved = f"base_model.model.{module}.lora_{letter}"
            entry = entries.get(saved)
            axis = 1 if letter == "B" else 0
            if entry is None or len(kept) < 1:
                raise MalformedError(
                    f"rank_pattern of adapter_config.json names {quote(name)}, and there is no {saved}"
                )
            if sum(kept) == entry.shape[axis]:
                continue
            if len(kept) != entry.shape[axis]:
                raise MalformedError(
                    f"rank_pattern of adapter_config.json has {count(len(kept), 'rank')} for {saved}, which has"
                    f" {entry.shape[axis]}"
                )
            shape = tuple(sum(kept) if i == axis else size for i, size in enumerate(entry.shape))
            result[saved] = computed(saved, entry.dtype, shape, partial(_ranks, entry, kept, axis), entry)
    return result


def _ranks(entry: TensorEntry, kept: list[bool], axis: int) -> torch.Tensor:
    import torch

    chosen = torch.tensor([bool(one) for one in kept])
    value = entry.read()
    return value[chosen] if axis == 0 else value[:, chosen]
