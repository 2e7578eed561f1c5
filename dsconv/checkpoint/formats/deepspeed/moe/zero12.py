"""MoE checkpoints with expert files: native ``deepspeed.moe.layer.MoE``, and AutoEP below ZeRO-3.

The main model states list the parameters of data-parallel rank 0, by the names that its own experts have there; every
rank has the same list with other experts behind it. So each optimizer group of experts is laid out once for each
expert-parallel rank, over the ranks that are replicas of one another, and given global names. That layout is proven by
the expert files: each stretch of the masters must begin, cast, as the expert's 16-bit weight does at that place.

Facts read from DeepSpeed 0.19.8: ``runtime/zero/stage_1_and_2.py`` and ``runtime/bf16_optimizer.py``
``_configure_moe_settings`` (an expert group is partitioned over its replicas only), ``runtime/engine.py``
``_get_non_moe_state_dict`` and ``_save_moe_checkpoint``, ``moe/utils.py``
``split_params_into_different_moe_groups_for_optimizer`` (the order of the expert groups is that of a set of strings, so
it may differ from rank to rank; each group carries its name).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.flat import flat_pieces
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states
from dsconv.checkpoint.formats.deepspeed.moe import autoep
from dsconv.checkpoint.formats.deepspeed.moe.experts import (
    Assembly,
    ExpertLayer,
    ExpertTensor,
    Pieces,
    finish,
    owner_of,
    read_layers,
    role_of,
    warn_of_lost,
)
from dsconv.checkpoint.formats.deepspeed.partitions import (
    Partition,
    alignment_paddings,
    check_group,
    master_entry,
    read_partitions,
)
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.errors import InconsistentCheckpointError, MissingShardError, UnsupportedError
from dsconv.zero_utils.config_keys import lookup
from dsconv.zero_utils.files import TagFolder
from dsconv.zero_utils.partition import expert_replicas

Owners = dict[tuple[str, Any], Partition]  # of a tensor and region: one rank that holds masters of it


def read_moe(folder: TagFolder) -> Checkpoint:
    """The tensor map of a checkpoint with expert files.

    Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the file.
    """
    if not folder.model:
        raise MissingShardError(
            f"{folder.path}: expert files without mp_rank_00_model_states.pt, which holds all but the experts"
        )
    warnings = list(folder.warnings)
    states = read_module_states(next(iter(folder.model.values())))
    naming = autoep.naming_of(states, folder, warnings)
    tensor_parallel = sorted({*folder.model, *(mp for mp, _ in folder.optimizer)})
    if len(tensor_parallel) > 1:
        raise UnsupportedError(
            f"{folder.path}: experts and tensor parallelism of {len(tensor_parallel)} mp_ranks; this version does not"
            " merge those together"
        )
    layers, tensors = read_layers(folder, states.raw.get("num_experts"), naming.layers, warnings)
    if folder.optimizer:
        return _read_zero12(folder, states, naming, layers, tensors, warnings)
    from dsconv.checkpoint.formats.deepspeed.moe.stage0 import read_moe_stage0

    return read_moe_stage0(folder, states, naming, layers, tensors, warnings)


def _without_masters(
    entries: dict[str, TensorEntry], tensors: list[ExpertTensor], masters: Assembly, role: Callable[[str], str]
) -> None:
    """Add the tensors of expert files of which the optimizer holds nothing: what was frozen, and buffers."""
    rest = Assembly()
    for tensor in tensors:
        if not masters.holds(tensor.share):
            if tensor.share.name in masters.parts:
                raise InconsistentCheckpointError(
                    f"{tensor.file.path}: the optimizer files hold masters of some experts of {tensor.share.name!r} and"
                    " not of this one's"
                )
            rest.add(tensor.share, tensor.tensor.dtype, tensor.pieces, tensor.file.path)
    entries.update((entry.name, entry) for entry in rest.entries(role))


# ZeRO-1 and 2
# ----------------------------------------------------------------------------------------------------------


def _group_keys(partition: Partition) -> list[tuple[str, int]] | None:
    """(the group's name, how many of that name came before), a group; None where the optimizer's state has no names."""
    base = partition.state.get("base_optimizer_state")
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or len(groups) != len(partition.groups):
        return None
    names = [str(group.get("name", "")) if isinstance(group, dict) else "" for group in groups]
    return [(name, names[:i].count(name)) for i, name in enumerate(names)]


def in_order_of(first: Partition, partition: Partition) -> Partition:
    """``partition`` with its groups in the order that ``first`` has them in; as it is where the two do not
    correspond.
    """
    wanted, have = _group_keys(first), _group_keys(partition)
    if wanted is None or have is None or wanted == have or sorted(wanted) != sorted(have):
        return partition
    order = [have.index(key) for key in wanted]
    lists = {
        key: [value[i] for i in order]
        for key in ("param_slice_mappings", "param_alignment_paddings")
        if isinstance(value := partition.state.get(key), (list, tuple)) and len(value) == len(order)
    }
    counts = tuple(partition.counts[i] for i in order) if len(partition.counts) == len(order) else partition.counts
    return replace(
        partition, groups=[partition.groups[i] for i in order], counts=counts, state={**partition.state, **lists}
    )


def _flat_group(
    folder: TagFolder, members: list[Partition], g: int, group: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Pieces]]:
    """Each parameter of group ``g``, which the members hold end to end, and what makes its pieces."""
    parts = [member.groups[g] for member in members]
    starts = [0, *accumulate(part.numel for part in parts)]
    files = [member.file for member in members]
    position = 0
    for (name, shape), padding in zip(group.items(), alignment_paddings(members[0], g, group), strict=True):
        numel = math.prod(shape)
        if position + numel > starts[-1]:
            raise InconsistentCheckpointError(
                f"{folder.path}: parameter {name!r} of group {g} ends at element {position + numel}; the {len(members)}"
                f" optimizer files from {members[0].path.name} on hold {starts[-1]} together. A file is of another"
                " save, or of another model"
            )
        yield name, partial(flat_pieces, files, parts, starts, position, numel)
        position += numel + padding
    check_group(folder, g, position, [part.numel for part in parts])


def _replicas_of_group(
    folder: TagFolder,
    states: ModuleStates,
    first: Partition,
    g: int,
    group: dict[str, tuple[int, ...]],
    layers: list[ExpertLayer],
    world: int,
) -> list[list[int]] | None:
    """Whose ranks hold group ``g``, by expert-parallel rank; None for a group of no experts."""
    owned = [name for name in group if owner_of(layers, name) is not None]
    if not owned and first.counts[g] == world:
        return None
    replicas = first.counts[g]
    if len(owned) != len(group) or world % replicas:
        raise InconsistentCheckpointError(
            f"{first.path}: group {g} is partitioned over {replicas} of {world} ranks, and {len(owned)} of its"
            f" {len(group)} parameters are experts'; expected experts only. The optimizer files and the model states"
            " are not of one save"
        )
    data_first = lookup(states.raw, "ds_config.use_data_before_expert_parallelism") is True
    return expert_replicas(world, world // replicas, data_first)


def _read_zero12(
    folder: TagFolder,
    states: ModuleStates,
    naming: autoep.Naming,
    layers: list[ExpertLayer],
    tensors: list[ExpertTensor],
    warnings: list[str],
) -> Checkpoint:
    ranks = states.raw.get("dp_world_size")  # where only experts are trained, no group is partitioned over all ranks
    partitions = read_partitions(folder, warnings, in_order_of, ranks if type(ranks) is int else 1)
    first, world, shapes = partitions[0], len(partitions), states.param_shapes
    if len(shapes) != len(first.groups) or len(shapes) != len(first.counts):
        raise InconsistentCheckpointError(
            f"{states.path} lists {len(shapes)} parameter groups, {first.path} holds {len(first.groups)}"
        )
    entries: dict[str, TensorEntry] = {}
    masters, owners = Assembly(), Owners()
    ties = states.ties()
    lengths: list[list[int]] = []
    for g, group in enumerate(shapes):
        lengths.append([p.groups[g].numel for p in partitions])
        replicas = _replicas_of_group(folder, states, first, g, group, layers, world)
        if replicas is None:
            for name, pieces in _flat_group(folder, partitions, g, group):
                entries[name] = master_entry(name, first.groups[g].dtype, group[name], pieces, ties, "parameter")
            continue
        for ep_rank, ranks in enumerate(replicas):
            members = [partitions[rank] for rank in ranks]
            for name, pieces in _flat_group(folder, members, g, group):
                layer = owner_of(layers, name)
                assert layer is not None  # _replicas_of_group looked
                for share in layer.shares(name, group[name], ep_rank, len(replicas)):
                    masters.add(
                        share,
                        members[0].groups[g].dtype,
                        partial(slice_pieces, pieces, share.start, share.numel, share.region),
                        members[0].path,
                    )
                    owners[share.name, share.region] = members[0]
    if first.state.get("param_slice_mappings") is not None:
        for rank, partition in enumerate(partitions):
            consistency.slice_mappings(partition.path, partition.state, shapes, lengths, rank)
    _masters_match_experts(masters, owners, tensors)
    entries.update((entry.name, entry) for entry in masters.entries(lambda name: "parameter"))
    _without_masters(entries, tensors, masters, role_of(states))
    entries.update(states.module_entries(exclude=set(entries), ties=ties))
    _frozen_fragments(states, layers, entries, ties)
    consistency.masters_match_module(states, entries, warnings)
    warn_of_lost(states, layers, entries, warnings)
    stage = first.state.get("zero_stage")
    kind = f"ZeRO-{stage}" if stage else "ZeRO-1 (BF16_Optimizer)"
    files = [*(partition.file for partition in partitions), *(tensor.file for tensor in tensors)]
    ep_size = max(world // count for count in first.counts)
    kind = f"{kind}, {naming.kind}"
    return finish(folder, states, naming.renamed(entries), kind, stage or 1, ep_size, layers, files, warnings)


def _frozen_fragments(
    states: ModuleStates, layers: list[ExpertLayer], entries: dict[str, TensorEntry], ties: dict[str, list[str]]
) -> None:
    """Add frozen weights that ``module`` lacks (see warn_of_lost); ZeRO-2 keeps them a second time, whole."""
    for name, fragment in states.frozen_fragments.items():
        if name not in entries and owner_of(layers, name) is None and isinstance(fragment, TensorRef):
            entries[name] = master_entry(
                name, fragment.dtype, fragment.shape, partial(states.file.pieces, fragment), ties, "frozen"
            )


def _masters_match_experts(masters: Assembly, owners: Owners, tensors: list[ExpertTensor]) -> None:
    """Prove which rank's masters are which expert's. What an expert's file holds must be its masters, cast."""
    held = {(tensor.share.name, tensor.share.region) for tensor in tensors}
    for name, parts in masters.parts.items():
        for region in parts:
            if (name, region) not in held:
                raise InconsistentCheckpointError(
                    f"{owners[name, region].path} holds masters of {name!r}, which no expert file holds: they are not"
                    " of one save"
                )
    differing: dict[Any, ExpertTensor] = {}
    for tensor in tensors:
        pieces = masters.parts.get(tensor.share.name, {}).get(tensor.share.region)
        dtype = masters.dtypes.get(tensor.share.name)
        if pieces is None or dtype is None:
            continue
        if not all(consistency.begins_alike(piece, dtype, tensor.file, tensor.tensor) for piece in pieces()):
            differing.setdefault(tensor.file.path, tensor)
    if differing:
        tensor = next(iter(differing.values()))
        owner = owners[tensor.share.name, tensor.share.region]
        raise InconsistentCheckpointError(
            f"{len(differing)} expert files, such as {tensor.file.path}, do not hold what the masters of"
            f" {owner.path.name} and its replicas do: {tensor.key!r} differs. An expert or optimizer file is of another"
            " save, or files of ranks were swapped: restore the files of one save"
        )
