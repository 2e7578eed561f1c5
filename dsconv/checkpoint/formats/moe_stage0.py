"""MoE checkpoints without ZeRO: the weights in ``module`` and the expert files, fp32 masters in ``expp_rank_N`` files.

Each expert-parallel rank, of the largest such group, writes its optimizer's state (DeepSpeed 0.19.8 ``runtime/engine.py``
``_save_moe_checkpoint``). Its masters carry no names (see stage0.py): each is given to a parameter of its shape and values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from dsconv.checkpoint.formats import autoep, stage0
from dsconv.checkpoint.formats.experts import (
    LOCAL,
    Assembly,
    ExpertLayer,
    ExpertTensor,
    cut,
    owner_of,
    role_of,
    warn_of_lost,
    with_experts,
)
from dsconv.checkpoint.formats.module_states import ModuleStates
from dsconv.checkpoint.standins import TensorRef
from dsconv.checkpoint.tensormap import Checkpoint, TensorEntry
from dsconv.checkpoint.torch_file import TorchFile
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
    stage0.refuse_zero(folder, states)
    entries = states.module_entries(exclude=set(), ties=states.ties())
    weights = Assembly()
    for tensor in tensors:
        weights.add(tensor.share, tensor.tensor.dtype, tensor.pieces, tensor.file.path)
    entries.update((entry.name, entry) for entry in weights.entries(role_of(states)))
    entries = {name: stage0._as_parameter(entry) for name, entry in entries.items()}
    masters = _masters(folder, states, entries, layers, tensors, weights, warnings)
    entries.update(masters)
    warn_of_lost(states, layers, entries, warnings)
    made = stage0.finish(folder, states, states.in_module_order(naming.renamed(entries)), len(masters), warnings)
    made.format = f"{made.format}, {naming.kind}"
    made.sources = tuple(sorted({*made.sources, *(folder.expert_optimizers.values() if masters else ())}))
    return with_experts(made, layers, None, tensors)


def _optimizers(folder: TagFolder, states: ModuleStates) -> list[TorchFile]:
    """The optimizer file of each expert-parallel rank. The main file repeats rank 0's, which shows that there must be some."""
    held = states.optimizer if isinstance(states.optimizer, dict) else {}
    ranks = range(1 + max(folder.expert_optimizers, default=0 if _groups(held) else -1))
    missing = [rank for rank in ranks if rank not in folder.expert_optimizers]
    if missing:
        raise MissingShardError(_lacks(folder, missing[0]))
    return [TorchFile(folder.expert_optimizers[rank]) for rank in ranks]


def _lacks(folder: TagFolder, rank: int) -> str:
    return (
        f"{folder.path}: missing expp_rank_{rank}_mp_rank_00_optim_states.pt, which holds the fp32 masters of that expert-parallel rank's "
        "experts. Copy it from the node that wrote it"
    )


def _groups(optimizer: dict[str, Any]) -> bool:
    return isinstance(optimizer.get("fp32_groups"), list) or isinstance(optimizer.get("fp32_groups_flat"), list)


def _match(file: TorchFile, weights: dict[str, TensorEntry]) -> tuple[dict[str, TensorRef], int]:
    """Each weight's master in the file, and how many masters are of no weight; nothing of fp32 training, which has none."""
    optimizer = file.root.get("optimizer") if isinstance(file.root, dict) else None
    if not isinstance(optimizer, dict):
        return {}, 0
    groups, flat = optimizer.get("fp32_groups"), optimizer.get("fp32_groups_flat")
    if isinstance(groups, list):
        return stage0.match(file, list(weights), weights, stage0.masters_of(groups))
    if isinstance(flat, list) and all(isinstance(t, TensorRef) for t in flat):
        return stage0.match_flat(file, list(weights), weights, flat)
    return {}, 0


def _masters(
    folder: TagFolder,
    states: ModuleStates,
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
    files = _optimizers(folder, states)
    for ep_rank, file in enumerate(files):
        own = {name: entry for layer in layers if isinstance(layer, autoep.AutoEPLayer) for name, entry in layer.stacks(ep_rank, tensors)}
        matched, missed = _match(file, whole | own)
        unknown = max(unknown, missed)
        for name, master in matched.items():
            layer = owner_of(layers, name)
            if isinstance(layer, autoep.AutoEPLayer):
                for share in layer.shares(name, master.shape, ep_rank, len(layer.placement)):
                    stacked.add(share, master.dtype, partial(cut, partial(file.pieces, master), share), file.path)
            elif name not in found:
                old = whole[name]
                found[name] = TensorEntry(name, master.dtype, old.shape, partial(file.pieces, master), old.aliases, old.role)
                found[name].layout()
    found.update((entry.name, entry) for entry in stacked.entries(lambda name: "parameter"))
    partly = [name for name, parts in stacked.parts.items() if set(parts) != set(weights.parts[name])]
    matches = {name: LOCAL.fullmatch(name) for name in whole}
    have = {(match["layer"], match["rest"]) for name, match in matches.items() if match and name in found}
    partly += [name for name, match in matches.items() if match and name not in found and (match["layer"], match["rest"]) in have]
    if partly:
        raise MissingShardError(f"{_lacks(folder, len(files))} (no master of {partly[0]!r} was found)")
    _copies(found, whole)
    if unknown:
        warnings.append(f"{unknown} fp32 masters of an optimizer file are of no weight that was saved: they were left out")
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
        return (entry.shape, entry.dtype.name, record.nbytes, record.crc32) if record and record.crc32 is not None else None

    masters = {key(whole[name]): entry for name, entry in found.items() if name in whole}
    for name, entry in whole.items():
        if name not in found and key(entry) in masters:
            found[name] = replace(masters[key(entry)], name=name, aliases=entry.aliases)
