"""MoE checkpoints without ZeRO: the weights in ``module`` and the expert files, fp32 masters in ``expp_rank_N`` files.

Each expert-parallel rank, of the largest such group, writes its optimizer's state (DeepSpeed 0.19.8
``runtime/engine.py`` ``_save_moe_checkpoint``). Its masters carry no names: each is given to a parameter of its shape
and values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.moe import autoep
from dsconv.checkpoint.formats.deepspeed.moe.experts import (
    LOCAL,
    Assembly,
    ExpertLayer,
    ExpertTensor,
    finish,
    owner_of,
    role_of,
    warn_of_lost,
)
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extent
from dsconv.errors import MissingShardError
from dsconv.zero_utils.files import TagFolder


def read_moe_stage0(
    folder: TagFolder,
    states: ModuleStates,
    naming: autoep.Naming,
    layers: list[ExpertLayer],
    tensors: list[ExpertTensor],
    warnings: list[str],
) -> Checkpoint:
    """The tensor map, as read_moe. Raises MissingShardError where an optimizer file is not there."""
    if states.param_shapes:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is of a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there"
            " are none. Copy them from the nodes that wrote them"
        )
    entries = states.module_entries(exclude=set(), ties=states.ties())
    weights = Assembly()
    for tensor in tensors:
        weights.add(tensor.share, tensor.tensor.dtype, tensor.pieces, tensor.file.path)
    entries.update((entry.name, entry) for entry in weights.entries(role_of(states)))
    # What was frozen is not said.
    entries = {
        name: entry if entry.role == "buffer" else replace(entry, role="parameter") for name, entry in entries.items()
    }
    optimizers = _optimizers(folder, states)
    masters = _masters(folder, optimizers, entries, layers, tensors, weights, warnings)
    entries.update(masters)
    warn_of_lost(states, layers, entries, warnings)
    files = [*(optimizers if masters else ()), *(tensor.file for tensor in tensors)]
    return finish(
        folder, states, naming.renamed(entries), f"DeepSpeed stage 0, {naming.kind}", 0, None, layers, files, warnings
    )


def _optimizers(folder: TagFolder, states: ModuleStates) -> list[TorchFile]:
    """The optimizer file of each expert-parallel rank. The main file repeats rank 0's, which shows that there must
    be some.
    """
    held = states.optimizer if isinstance(states.optimizer, dict) else {}
    ranks = range(1 + max(folder.expert_optimizers, default=0 if _groups(held) else -1))
    missing = [rank for rank in ranks if rank not in folder.expert_optimizers]
    if missing:
        raise MissingShardError(_lacks(folder, missing[0]))
    return [TorchFile(folder.expert_optimizers[rank]) for rank in ranks]


def _lacks(folder: TagFolder, rank: int) -> str:
    return (
        f"{folder.path}: missing expp_rank_{rank}_mp_rank_00_optim_states.pt, which holds the fp32 masters of that"
        " expert-parallel rank's experts. Copy it from the node that wrote it"
    )


def _groups(optimizer: dict[str, Any]) -> bool:
    return isinstance(optimizer.get("fp32_groups"), list) or isinstance(optimizer.get("fp32_groups_flat"), list)


def _match(file: TorchFile, weights: dict[str, TensorEntry]) -> tuple[dict[str, TensorRef], int]:
    """Each weight's master in the file, and how many masters are of no weight; nothing of fp32 training, which has
    none.
    """
    optimizer = file.root.get("optimizer") if isinstance(file.root, dict) else None
    if not isinstance(optimizer, dict):
        return {}, 0
    groups, flats = optimizer.get("fp32_groups"), optimizer.get("fp32_groups_flat")
    if isinstance(groups, list):
        return _match_tensors(
            file, weights, [t for group in groups if isinstance(group, list) for t in group if isinstance(t, TensorRef)]
        )
    if isinstance(flats, list) and all(isinstance(t, TensorRef) for t in flats):
        return _match_flat(file, weights, flats)
    return {}, 0


def _match_tensors(
    file: TorchFile, weights: dict[str, TensorEntry], tensors: list[TensorRef]
) -> tuple[dict[str, TensorRef], int]:
    """Give each master the next free weight, in the weights' order, of its shape and values (FP16_UnfusedOptimizer)."""
    names = list(weights)
    index = {name: i for i, name in enumerate(names)}
    matched: dict[str, TensorRef] = {}
    position = unknown = 0
    for master in tensors:
        candidates = (name for name in names[position:] + names[:position] if name not in matched)
        name = next((name for name in candidates if _agrees(file, master, weights[name])), None)
        if name is None:
            unknown += 1
            continue
        matched[name] = master
        position = index[name] + 1
    return matched, unknown


def _match_flat(
    file: TorchFile, weights: dict[str, TensorEntry], flats: list[TensorRef]
) -> tuple[dict[str, TensorRef], int]:
    """The same for groups flattened into one tensor each (FP16_Optimizer): cut a group as its next weight is found."""
    matched: dict[str, TensorRef] = {}
    for flat in flats:
        offset = 0
        while offset < flat.numel:
            for name, weight in weights.items():
                if name in matched or not 0 < weight.numel <= flat.numel - offset:
                    continue
                strides = tuple(math.prod(weight.shape[dim + 1 :]) for dim in range(len(weight.shape)))
                view = TensorRef(flat.storage, flat.dtype, flat.offset + offset, weight.shape, strides)
                if _agrees(file, view, weight):
                    matched[name] = view
                    offset += weight.numel
                    break
            else:
                return {}, 1
    return matched, 0


def _agrees(file: TorchFile, master: TensorRef, weight: TensorEntry) -> bool:
    """Whether a master in ``file`` has the weight's shape and, cast, its first elements."""
    if master.shape != weight.shape or not weight.numel or not is_contiguous(master.shape, master.strides):
        return master.shape == weight.shape
    piece = file.pieces(master)[0]
    first = weight.pieces[0]
    count = min(4 * consistency.SAMPLES, first.numel)
    high = consistency.decode(read_extent(replace(piece.extent, nbytes=count * master.dtype.itemsize)), master.dtype)
    low = consistency.decode(read_extent(replace(first.extent, nbytes=count * weight.dtype.itemsize)), weight.dtype)
    if first.strides is not None or high is None or low is None:
        return True
    return all(consistency.cast(h, weight.dtype) == w or h != h for h, w in zip(high, low, strict=True))


def _masters(
    folder: TagFolder,
    files: list[TorchFile],
    entries: dict[str, TensorEntry],
    layers: list[ExpertLayer],
    tensors: list[ExpertTensor],
    weights: Assembly,
    warnings: list[str],
) -> dict[str, TensorEntry]:
    """Entries read from masters, by name; empty where there are none."""
    stacked_names = {tensor.share.name for tensor in tensors if tensor.share.region is not None}
    whole = {name: entry for name, entry in entries.items() if entry.role == "parameter" and name not in stacked_names}
    found: dict[str, TensorEntry] = {}
    stacked = Assembly()
    unknown = 0
    for ep_rank, file in enumerate(files):
        own = {
            name: entry
            for layer in layers
            if isinstance(layer, autoep.AutoEPLayer)
            for name, entry in layer.stacks(ep_rank, tensors)
        }
        matched, missed = _match(file, whole | own)
        unknown = max(unknown, missed)
        for name, master in matched.items():
            layer = owner_of(layers, name)
            if isinstance(layer, autoep.AutoEPLayer):
                for share in layer.shares(name, master.shape, ep_rank, len(layer.placement)):
                    stacked.add(
                        share,
                        master.dtype,
                        partial(slice_pieces, partial(file.pieces, master), share.start, share.numel, share.region),
                        file.path,
                    )
            elif name not in found:
                old = whole[name]
                found[name] = TensorEntry(
                    name, master.dtype, old.shape, partial(file.pieces, master), old.aliases, old.role
                )
                found[name].layout()
    found.update((entry.name, entry) for entry in stacked.entries(lambda name: "parameter"))
    partly = [name for name, parts in stacked.parts.items() if set(parts) != set(weights.parts[name])]
    matches = {name: LOCAL.fullmatch(name) for name in whole}
    have = {(match["layer"], match["rest"]) for name, match in matches.items() if match and name in found}
    partly += [
        name
        for name, match in matches.items()
        if match and name not in found and (match["layer"], match["rest"]) in have
    ]
    if partly:
        raise MissingShardError(f"{_lacks(folder, len(files))} (no master of {partly[0]!r} was found)")
    _copies(found, whole)
    if unknown:
        warnings.append(
            f"{unknown} fp32 masters of an optimizer file are of no weight that was saved: they were left out"
        )
    lacking = [name for name in (*whole, *stacked_names) if name not in found]
    if found and lacking:
        warnings.append(
            f"{len(lacking)} parameters, the first {lacking[0]!r}, have no fp32 master in the optimizer files: "
            "their 16-bit weights were taken"
        )
    return found


def _copies(found: dict[str, TensorEntry], whole: dict[str, TensorEntry]) -> None:
    """Give a weight without a master that of the weight whose bytes it has, by the CRC-32 of its record.

    These checkpoints hold tied weights twice, and do not say that they are tied.
    """

    def key(entry: TensorEntry) -> Any:
        record = entry.pieces[0].extent.record if entry.pieces else None
        return (
            (entry.shape, entry.dtype.name, record.nbytes, record.crc32)
            if record and record.crc32 is not None
            else None
        )

    masters = {key(whole[name]): entry for name, entry in found.items() if name in whole}
    for name, entry in whole.items():
        if name not in found and key(entry) in masters:
            found[name] = replace(masters[key(entry)], name=name, aliases=entry.aliases)
