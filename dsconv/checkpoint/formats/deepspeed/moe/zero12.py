"""MoE checkpoints with expert files: of native ``deepspeed.moe.layer.MoE``, and of AutoEP below ZeRO-3.

The main model states list the parameters of data-parallel rank 0, by the names that its own experts have there; every
rank has the same list with other experts behind it. So each optimizer group of experts is laid out once for each
expert-parallel rank, over the ranks that are replicas of one another, and given global names. That layout is proven by
the expert files: each stretch of the masters must begin, cast, as the expert's 16-bit weight does at that place.

Facts read from DeepSpeed: ``runtime/zero/stage_1_and_2.py`` and ``runtime/bf16_optimizer.py``
``_configure_moe_settings`` (an expert group is partitioned over its replicas only), ``runtime/engine.py``
``_get_non_moe_state_dict`` and ``_save_moe_checkpoint``, ``moe/utils.py``
``split_params_into_different_moe_groups_for_optimizer`` (the order of the expert groups is that of a set of strings, so
it may differ from rank to rank; each group carries its name).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import (
    ModuleStates,
    Ties,
    states_of,
    warn_of_absent,
    warn_of_unlisted,
)
from dsconv.checkpoint.formats.deepspeed.moe import autoep
from dsconv.checkpoint.formats.deepspeed.moe.experts import (
    Assembly,
    ExpertLayer,
    ExpertTensor,
    contents_of,
    owner_of,
    read_layers,
    role_of,
    warn_of_lost,
)
from dsconv.checkpoint.formats.deepspeed.partitions import (
    Partition,
    master_entry,
    read_partitions,
    unwrapped_mappings,
    walk_group,
)
from dsconv.checkpoint.formats.deepspeed.rank_map import build_checkpoint
from dsconv.checkpoint.formats.deepspeed.values import prefix_matches
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.errors import InconsistentCheckpointError, MissingShardError, UnsupportedError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.partition import expert_replicas
from dsconv.zero_utils.tag_folder import TagFolder

Owners = dict[tuple[str, Any], Partition]  # one rank that holds masters of a tensor's region


def read_moe(folder: TagFolder) -> Checkpoint:
    """Read the tensor map of a checkpoint with expert files.

    Raises:
        MissingShardError: A file is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: The checkpoint has a feature that dsconv does not read.
    """
    if not folder.model:
        raise MissingShardError(
            f"{folder.path}: expert files without mp_rank_00_model_states.pt, which holds all but the experts"
        )
    warnings = list(folder.warnings)
    states = states_of(folder, next(iter(folder.model.values())))
    naming = autoep.naming_of(states, folder, warnings)
    tensor_parallel = sorted({*folder.model, *(mp for mp, _ in folder.optimizer)})
    if len(tensor_parallel) > 1:
        raise UnsupportedError(
            f"{folder.path}: experts and tensor parallelism of {len(tensor_parallel)} mp_ranks; this version does not"
            " merge those together"
        )
    layers, tensors = read_layers(folder, states, naming.layers, warnings)
    found = autoep.Experts(states, naming, layers, tensors)
    if folder.optimizer:
        return _read_zero12(folder, found, warnings)
    from dsconv.checkpoint.formats.deepspeed.moe.stage0 import read_moe_stage0

    return read_moe_stage0(folder, found, warnings)


def _without_masters(
    entries: dict[str, TensorEntry], tensors: list[ExpertTensor], masters: Assembly, role: Callable[[str], str]
) -> None:
    """Add the tensors of expert files for which the optimizer holds nothing: what was frozen, and buffers."""
    rest = Assembly()
    for tensor in tensors:
        if not masters.holds(tensor.share):
            if tensor.share.name in masters.parts:
                raise InconsistentCheckpointError(
                    f"{tensor.file.path}: the optimizer files hold masters of some experts of"
                    f" {quote(tensor.share.name)} and not of this one's"
                )
            rest.add(tensor.share, tensor.tensor.dtype, tensor.pieces, tensor.file.path)
    entries.update((entry.name, entry) for entry in rest.entries(role))


def _group_keys(partition: Partition) -> list[tuple[str, int]] | None:
    """Return the name of each group and how many of that name came before; None if groups have no names."""
    base = partition.state.get("base_optimizer_state")
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or len(groups) != len(partition.groups):
        return None
    names = [str(group.get("name", "")) if isinstance(group, dict) else "" for group in groups]
    return [(name, names[:i].count(name)) for i, name in enumerate(names)]


def in_order_of(first: Partition, partition: Partition) -> Partition:
    """Return ``partition`` with its groups in the order of ``first``'s; as it is where the two do not correspond."""
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


def _replicas_of_group(
    states: ModuleStates, first: Partition, g: int, layers: list[ExpertLayer], world: int
) -> list[list[int]] | None:
    """Return the ranks that hold group ``g`` for each expert-parallel rank; None for a group without experts."""
    group = states.param_shapes[g]
    owned = [name for name in group if owner_of(layers, name) is not None]
    if not owned and first.counts[g] == world:
        return None
    replicas = first.counts[g]
    if len(owned) != len(group) or world % replicas:
        raise InconsistentCheckpointError(
            f"{first.path}: group {g} is partitioned over {replicas} of {counted(world, 'rank')}, and experts own"
            f" {len(owned)} of its {counted(len(group), 'parameter')}; expected all. The optimizer files and the model"
            " states are not from one save"
        )
    data_first = states.config.get("use_data_before_expert_parallelism") is True
    return expert_replicas(world, world // replicas, data_first)


def _read_zero12(folder: TagFolder, found: autoep.Experts, warnings: list[str]) -> Checkpoint:
    states, layers, tensors = found.states, found.layers, found.tensors
    # Where only experts are trained, no group is partitioned over all ranks.
    partitions = read_partitions(folder, warnings, in_order_of, states.data_parallel)
    first, world, shapes = partitions[0], len(partitions), states.param_shapes
    if len(shapes) != len(first.groups) or len(shapes) != len(first.counts):
        raise InconsistentCheckpointError(
            f"{states.path} lists {counted(len(shapes), 'parameter group')}, {first.path} holds {len(first.groups)}"
        )
    entries: dict[str, TensorEntry] = {}
    masters, owners = Assembly(), Owners()
    ties = states.ties()
    lengths: list[list[int]] = []
    for g, group in enumerate(shapes):
        lengths.append([p.groups[g].numel for p in partitions])
        replicas = _replicas_of_group(states, first, g, layers, world)
        if replicas is None:
            parts = [p.groups[g] for p in partitions]
            for name, place in walk_group(folder, partitions, g, group):
                layout = partial(place.layout, parts)
                entries[name] = master_entry(name, parts[0].dtype, place.shape, layout, ties, "parameter")
            continue
        for ep_rank, ranks in enumerate(replicas):
            members = [partitions[rank] for rank in ranks]
            parts = [member.groups[g] for member in members]
            for name, place in walk_group(folder, members, g, group):
                layer = owner_of(layers, name)
                if layer is None:
                    raise InconsistentCheckpointError(f"{first.path}: {quote(name)} of group {g} is not an expert's")
                for share in layer.shares(name, place.shape, ep_rank, len(replicas)):
                    layout = partial(
                        slice_pieces, partial(place.layout, parts), share.start, share.numel, share.region, name
                    )
                    masters.add(share, parts[0].dtype, layout, members[0].path)
                    owners[share.name, share.region] = members[0]
    if first.state.get("param_slice_mappings") is not None:
        for rank, partition in enumerate(unwrapped_mappings(states, partitions)):
            consistency.slice_mappings(partition.path, partition.state, shapes, lengths, rank)
    _masters_match_experts(masters, owners, tensors)
    entries.update((entry.name, entry) for entry in masters.entries(lambda name: "parameter"))
    _without_masters(entries, tensors, masters, role_of(states))
    entries.update(states.module_entries(exclude=set(entries), ties=ties))
    _frozen_fragments(states, layers, entries, ties)
    consistency.masters_match_module(states, entries, warnings)
    warn_of_unlisted(states, warnings, found.naming.is_second)
    warn_of_absent(states, entries, warnings)
    warn_of_lost(states, layers, entries, warnings)
    kind = f"ZeRO-{first.stage}" if first.stage else "ZeRO-1 (BF16_Optimizer)"
    files = [*(partition.file for partition in partitions), *(tensor.file for tensor in tensors)]
    ep_size = max(world // count for count in first.counts)
    contents = contents_of(
        states,
        f"{kind}, {found.naming.kind}",
        first.stage or 1,
        layers,
        found.naming.renamed(entries),
        files,
        warnings,
        ep_size,
    )
    return build_checkpoint(folder, states, contents)


def _frozen_fragments(
    states: ModuleStates, layers: list[ExpertLayer], entries: dict[str, TensorEntry], ties: Ties
) -> None:
    """Add frozen weights that ``module`` lacks (see ``warn_of_lost``); ZeRO-2 keeps them a second time, whole."""
    for name, fragment in states.frozen_fragments.items():
        if name not in entries and owner_of(layers, name) is None and isinstance(fragment, TensorRef):
            entries[name] = master_entry(
                name, fragment.dtype, fragment.shape, partial(states.file.pieces, fragment), ties, "frozen"
            )


def _masters_match_experts(masters: Assembly, owners: Owners, tensors: list[ExpertTensor]) -> None:
    """Prove which rank's masters are which expert's: what an expert's file holds must be its masters, cast."""
    held = {(tensor.share.name, tensor.share.region) for tensor in tensors}
    for name, parts in masters.parts.items():
        for region in parts:
            if (name, region) not in held:
                raise InconsistentCheckpointError(
                    f"{owners[name, region].path} holds masters of {quote(name)}, which no expert file holds: they are"
                    " not of one save"
                )
    differing: dict[Any, ExpertTensor] = {}
    for tensor in tensors:
        pieces = masters.parts.get(tensor.share.name, {}).get(tensor.share.region)
        dtype = masters.dtypes.get(tensor.share.name)
        if pieces is None or dtype is None:
            continue
        if not all(prefix_matches(piece, dtype, tensor.file, tensor.tensor) for piece in pieces()):
            differing.setdefault(tensor.file.path, tensor)
    if differing:
        tensor = next(iter(differing.values()))
        owner = owners[tensor.share.name, tensor.share.region]
        raise InconsistentCheckpointError(
            f"{counted(len(differing), 'expert file', 'does')} not hold what the masters of {owner.path.name} and its"
            f" replicas do, such as {tensor.file.path}: {quote(tensor.key)} differs. An expert or optimizer file is"
            " from another save, or ranks' files were swapped: restore the files of one save"
        )
