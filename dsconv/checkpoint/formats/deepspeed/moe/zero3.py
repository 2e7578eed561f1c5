"""AutoEP at ZeRO-3 (``checkpoint_format: zero3_partitioned``), which has no expert files.

Each rank's model states say which experts it has, and its optimizer file over which ranks each sub-group is cut
(DeepSpeed ``runtime/zero/stage3.py`` ``_zero3_partition_group_metadata``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

from dsconv.checkpoint.formats.deepspeed.fields import Shapes
from dsconv.checkpoint.formats.deepspeed.flat import EqualShares, RankFlats
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, Ties
from dsconv.checkpoint.formats.deepspeed.moe.autoep import AutoEPLayer, naming_of
from dsconv.checkpoint.formats.deepspeed.moe.experts import Assembly, ExpertLayer, contents_of, owner_of
from dsconv.checkpoint.formats.deepspeed.partitions import Partition, frozen_entry, master_entry, read_zero3_states
from dsconv.checkpoint.formats.deepspeed.rank_map import build_checkpoint
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import InconsistentCheckpointError, MalformedError
from dsconv.text import count, quote
from dsconv.zero_utils.partition import share_numel
from dsconv.zero_utils.tag_folder import TagFolder


def read_zero3_experts(folder: TagFolder, partitions: list[Partition], warnings: list[str]) -> Checkpoint:
    """Read the tensor map of AutoEP at ZeRO-3.

    Args:
        folder: The tag's folder.
        partitions: The optimizer file of each rank.
        warnings: What was found is added.

    Raises:
        MissingShardError: A rank's model states are missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: AutoEP was folded with tensor parallelism.
    """
    world = len(partitions)
    all_states = read_zero3_states(folder, world, every=lambda _: True)
    states = all_states[0]
    naming = naming_of(states, folder, warnings)
    if not naming.layers:
        raise MalformedError(
            f"{states.path}: no ds_autoep_layers, and {partitions[0].path.name} partitions experts over their own ranks"
        )
    layers = list(naming.layers.values())
    ep_ranks = [_ep_ranks(other, folder) for other in all_states]
    ties = states.ties()
    reading = _Reading(layers, ep_ranks, ties, world)
    groups = [_group_ranks(partition, rank, states, world) for rank, partition in enumerate(partitions)]
    for g, group in enumerate(states.param_shapes):
        for ranks in dict.fromkeys(groups[rank][g] for rank in range(world)):
            if any(groups[rank][g] != ranks for rank in ranks):
                raise InconsistentCheckpointError(
                    f"{partitions[ranks[0]].path} shares sub-group {g} with ranks {list(ranks)}; those say otherwise"
                )
            reading.add_group(g, group, [partitions[rank] for rank in ranks], ranks)
    entries, experts = reading.entries, reading.experts
    entries.update((entry.name, entry) for entry in experts.entries(lambda name: "parameter"))
    for name, shape in states.frozen_shapes.items():
        if name not in entries:
            entries[name] = frozen_entry(name, shape, all_states, world, ties)
    entries.update(states.module_entries(exclude=set(entries), ties=ties, only=set(states.buffer_names)))
    files = [*(partition.file for partition in partitions), *(other.file for other in all_states)]
    ep_size = max(len(layer.placement) for layer in layers if isinstance(layer, AutoEPLayer))
    named = naming.renamed(entries)
    contents = contents_of(states, "ZeRO-3, AutoEP", 3, layers, named, files, warnings, ep_size)
    return build_checkpoint(folder, states, contents)


def _ep_ranks(states: ModuleStates, folder: TagFolder) -> dict[str, int]:
    """Return {module: the rank among its expert-parallel ranks} of the rank whose model states these are."""
    layers = naming_of(states, folder, []).layers.values()
    return {layer.path: layer.ep_rank for layer in layers if isinstance(layer, AutoEPLayer)}


def _group_ranks(partition: Partition, rank: int, states: ModuleStates, world: int) -> list[tuple[int, ...]]:
    """Return the ranks that share each sub-group of this rank, in the order of their parts."""
    rows = partition.state.get("ds_zero_partition_groups")
    if not isinstance(rows, list) or len(rows) != len(partition.groups) or len(rows) != len(states.param_shapes):
        raise InconsistentCheckpointError(
            f"{partition.path} holds {count(len(partition.groups), 'sub-group')}, {states.path.name} lists"
            f" {len(states.param_shapes)}: the files are not from one save"
        )
    result = []
    for row in rows:
        ranks = row.get("partition_ranks") if isinstance(row, dict) else None
        if (
            not isinstance(ranks, list)
            or not all(type(r) is int and 0 <= r < world for r in ranks)
            or len(set(ranks)) != len(ranks)
            or rank not in ranks
            or row.get("partition_count") != len(ranks)
        ):
            raise MalformedError(
                f"{partition.path}: ds_zero_partition_groups has {safe_repr(row, 160)}; expected the ranks of {world}"
                " that share it"
            )
        result.append(tuple(ranks))
    return result


@dataclass
class _Reading:
    """What is read of AutoEP's sub-groups at ZeRO-3, and what tells where their tensors belong.

    ``ep_ranks`` has each rank's place among the expert-parallel ranks of each module. ``entries`` are the tensors
    outside of experts, ``experts`` those that several ranks hold together.
    """

    layers: list[ExpertLayer]
    ep_ranks: list[dict[str, int]]
    ties: Ties
    world: int
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    experts: Assembly = field(default_factory=Assembly)

    def add_group(self, g: int, group: Shapes, members: list[Partition], ranks: tuple[int, ...]) -> None:
        """Add sub-group ``g``, of which each member holds an equal share of every parameter."""
        flats = RankFlats([member.file for member in members], [[member.groups[g]] for member in members])
        wanted = sum(share_numel(math.prod(shape), len(members)) for shape in group.values())
        for member in members:
            if member.groups[g].numel != wanted:
                raise InconsistentCheckpointError(
                    f"{member.path} holds {member.groups[g].numel} elements of sub-group {g}; its parameters need"
                    f" {wanted} of each of {count(len(members), 'rank')}. The files are not from one save"
                )
        position = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            each = share_numel(numel, len(members))
            pieces = EqualShares(flats, position, each, numel)
            position += each
            layer = owner_of(self.layers, name)
            if not isinstance(layer, AutoEPLayer):
                if len(members) != self.world:
                    raise InconsistentCheckpointError(
                        f"{members[0].path}: {quote(name)} is not an expert's and is shared by {len(members)} of"
                        f" {count(self.world, 'rank')}"
                    )
                self.entries[name] = master_entry(
                    name, members[0].groups[g].dtype, shape, pieces, self.ties, "parameter"
                )
                continue
            places = {self.ep_ranks[rank].get(layer.path) for rank in ranks}
            place = next(iter(places))
            if len(places) != 1 or place is None:
                raise InconsistentCheckpointError(
                    f"{members[0].path} shares {quote(name)} with ranks {list(ranks)}, whose model states place them at"
                    f" expert-parallel ranks {sorted(map(str, places))}; expected one. Files of ranks were swapped,"
                    " or are from several saves"
                )
            for share in layer.shares(name, shape, place, len(layer.placement)):
                self.experts.add(
                    share,
                    members[0].groups[g].dtype,
                    partial(slice_pieces, pieces, share.start, share.numel, share.region),
                    members[0].path,
                )
