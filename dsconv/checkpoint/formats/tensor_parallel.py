"""Tensor-parallel checkpoints (AutoTP, Megatron-like): each mp rank's shard is a map of its own, and the maps are joined.

DeepSpeed 0.19.8 ``runtime/engine.py`` names the files of tensor-parallel rank t ``mp_rank_0t``, ZeRO's partitions within it
``zero_pp_rank_D_mp_rank_0t``. ``param_shapes`` and ``module`` have the shapes of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from dsconv.checkpoint.formats import crosscheck, rank_map, shard_copies, tp_plan
from dsconv.checkpoint.formats.joining import Join, Shape, joined, replicated
from dsconv.checkpoint.formats.module_states import ModuleStates, read_module_states
from dsconv.checkpoint.formats.rank_map import RankMap
from dsconv.checkpoint.formats.universal_info import UniversalInfo
from dsconv.checkpoint.reading import Sources
from dsconv.checkpoint.tensormap import Checkpoint, TensorEntry
from dsconv.errors import InconsistentCheckpointError, MissingShardError, UnsupportedError
from dsconv.zero_utils.files import TagFolder


class Rules(Protocol):
    """What says how the shards of a parameter make the full one."""

    def join(self, name: str, shapes: Sequence[Shape]) -> Join: ...


def read_tensor_parallel(folder: TagFolder) -> Checkpoint:
    """Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, naming file and tensor."""
    warnings = list(folder.warnings)
    ranks = read_ranks(folder, warnings)
    if len(ranks) == 1:
        return rank_map.of_one_rank(folder, ranks[0], warnings)
    shards = {rank: r.entries for rank, r in enumerate(ranks)}
    rules = rules_of(folder, ranks[0].states)
    entries = join_ranks(shards, rules)
    world = {"data_parallel": ranks[0].data_parallel, "model_parallel": len(ranks), "tensor_parallel": len(ranks)}
    ordered = ranks[0].states.in_module_order(entries)
    checkpoint = rank_map.to_checkpoint(folder, ranks, ordered, f"{ranks[0].kind}, tensor parallel", warnings, world)
    if not checkpoint.no_training:
        from dsconv.checkpoint.formats.joined_training import join_training

        checkpoint.training = partial(join_training, folder, ranks, shards, entries, rules)
    return checkpoint


ReadRank = Callable[[TagFolder, int, list[str]], RankMap]


def read_ranks(folder: TagFolder, warnings: list[str], read_rank: ReadRank = rank_map.read_rank) -> list[RankMap]:
    """The map of every model-parallel rank; missing ones, those of a larger world and those of another save are told apart."""
    present = folder.mp_ranks
    first = read_rank(folder, present[0], warnings)
    world = first.model_parallel
    missing = list(islice((mp for mp in range(world) if mp not in present), 8))
    if missing:
        raise MissingShardError(
            f"{folder.path}: {first.states.path.name} says {world} model-parallel ranks (mp_world_size); missing all files of rank "
            f"{', '.join(map(str, missing))}: expected such as *mp_rank_{missing[0]:02d}_*.pt. Copy them from the nodes that wrote them"
        )
    for mp in present[world:]:
        _refuse_unless_stale(folder, mp, world, first)
    if present[world:]:
        warnings.append(
            f"ignored the files of model-parallel rank {present[world]} and above, left over from an older save with more ranks: "
            f"this checkpoint has {world}"
        )
    ranks = [first] + [read_rank(folder, mp, warnings) for mp in range(1, world)]
    for other in ranks[1:]:
        _same_run(first, other)
    crosscheck.same_step([(p.file, p.state) for rank in ranks for p in rank.partitions])
    return ranks


def _refuse_unless_stale(folder: TagFolder, mp: int, world: int, first: RankMap) -> None:
    """A rank that should not be there is left over only if it says itself that its world was larger."""
    mine = folder.of_rank(mp)
    path: Path | None = next(iter((*mine.model.values(), *mine.zero3.values())), None)
    if path is None:
        return
    count = read_module_states(path).raw.get("mp_world_size")
    if type(count) is not int or count <= mp:
        raise InconsistentCheckpointError(
            f"{path} is of rank {mp} and says {count} model-parallel ranks, {first.states.path} says {world}: files of several saves "
            "lie in one folder, or were renamed. Restore the files of one save"
        )


def _same_run(first: RankMap, other: RankMap) -> None:
    """Two ranks must be of one save: step, world, ZeRO stage and data-parallel degree."""
    for what, mine, theirs in (
        ("step", first.states.step, other.states.step),
        ("model-parallel world", first.model_parallel, other.model_parallel),
        ("kind", first.kind, other.kind),
        ("data-parallel world", first.data_parallel, other.data_parallel),
    ):
        if mine != theirs:
            raise InconsistentCheckpointError(
                f"{first.states.path} is of {what} {mine} and {other.states.path} of {what} {theirs}: files of two saves lie in one "
                "folder. Restore the files of one of them"
            )


def rules_of(folder: TagFolder, states: ModuleStates) -> Rules:
    """The trainer's own rules; for a checkpoint without them the model's tensor-parallel plan, from config.json."""
    info = states.raw.get("universal_checkpoint_info")
    if isinstance(info, dict):
        return UniversalInfo(info, states.path)
    return tp_plan.PlanRules.find([folder.path, folder.save_dir, folder.save_dir.parent], states.path)


def join_ranks(ranks: Mapping[int, Mapping[str, TensorEntry]], rules: Rules) -> dict[str, TensorEntry]:
    """The full tensors of shards by rank; raises InconsistentCheckpointError, by name, where copies differ."""
    first = ranks[0]
    result: dict[str, TensorEntry] = {}
    known = set(first) | {alias for entry in first.values() for alias in entry.aliases}
    for rank, entries in ranks.items():
        strange = next((name for name in entries if name not in known), None)
        if strange is not None:
            path = path_of(entries[strange])
            raise InconsistentCheckpointError(f"tensor {strange!r} is on model-parallel rank {rank}{path} and not on rank 0: not one save")
    with Sources() as sources:
        for name, entry in first.items():
            shards = {}
            for rank, entries in ranks.items():
                if name not in entries:
                    raise InconsistentCheckpointError(f"tensor {name!r} is on model-parallel rank 0{path_of(entry)} and not on rank {rank}")
                shards[rank] = entries[name]
            result[name] = join_shards(name, shards, rules, entry.role, sources)
    return result


def join_shards(
    name: str, shards: Mapping[int, TensorEntry], rules: Rules, role: str, sources: Sources, what: str = "tensor "
) -> TensorEntry:
    """The full tensor of one tensor's shards by rank, or with ``what`` of something that lies as the tensor ``name`` does."""
    first = shards[0]
    filled = [shard for shard in shards.values() if shard.numel] or [first]
    if len({shard.dtype for shard in filled}) > 1:
        dtypes = ", ".join(f"{shard.dtype} on rank {rank}{path_of(shard)}" for rank, shard in shards.items() if shard.numel)
        raise InconsistentCheckpointError(f"{what}{name!r} has another dtype on other model-parallel ranks: {dtypes}")
    shapes = [shards[rank].shape for rank in range(len(shards))]
    if role == "buffer":
        if len(set(shapes)) > 1:
            raise UnsupportedError(f"buffer {name!r} has shapes {[list(s) for s in shapes[:8]]} on the tensor-parallel ranks")
        join = replicated(shapes[0], len(shapes))
    else:
        join = rules.join(name, shapes)
    for owner, copy in join.copies:
        if not shard_copies.same(shards[owner.rank], owner.start, shards[copy.rank], copy.start, owner.numel, sources):
            paths = f"rank {owner.rank}{path_of(shards[owner.rank])} and rank {copy.rank}{path_of(shards[copy.rank])}"
            if join.averaged:
                raise UnsupportedError(
                    f"{what}{name!r} differs between {paths}, and the trainer means the average of them: that is a value no file "
                    "holds. Convert with the trainer's own tool"
                )
            raise InconsistentCheckpointError(
                f"{what}{name!r} should be the same on all tensor-parallel ranks and differs between {paths}: the files are of "
                "different saves, or the ranks drifted apart in training"
            )
    # A shard without elements is nobody's to train: what the others say counts.
    role = next((shard.role for shard in filled if shard.role == "parameter"), filled[0].role)
    return joined(name, shards, join, role, first.aliases)


def path_of(entry: TensorEntry) -> str:
    """`` (file)`` of the first bytes of an entry, for a message."""
    pieces = entry.pieces
    return f" ({pieces[0].extent.record.path})" if pieces else ""
