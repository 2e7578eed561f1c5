"""Tensor-parallel checkpoints (AutoTP, Megatron-like): each mp rank's shard has a map of its own; the maps are joined.

DeepSpeed ``runtime/engine.py`` names the files of tensor-parallel rank t ``mp_rank_0t``, ZeRO's partitions
within it ``zero_pp_rank_D_mp_rank_0t``. ``param_shapes`` and ``module`` have the shapes of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

from dsconv.checkpoint.formats.deepspeed import consistency, rank_map, tp_plan_rules
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.ranks import read_rank, single_rank_checkpoint
from dsconv.checkpoint.formats.deepspeed.shards import Rules, join_shards, path_of
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import InconsistentCheckpointError, MissingShardError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import TagFolder


def read_tensor_parallel(folder: TagFolder) -> Checkpoint:
    """Read the tensor map of a folder with files of several model-parallel ranks.

    Raises:
        MissingShardError: A rank's file is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: How shards make a full tensor is not known.
    """
    warnings = list(folder.warnings)
    ranks = read_ranks(folder, warnings)
    if len(ranks) == 1:
        return single_rank_checkpoint(folder, ranks[0], warnings)
    shards = {rank: r.entries for rank, r in enumerate(ranks)}
    rules = rules_of(folder, ranks[0].states)
    entries = join_ranks(shards, rules)
    world = {"data_parallel": ranks[0].data_parallel, "model_parallel": len(ranks), "tensor_parallel": len(ranks)}
    ordered = ranks[0].states.in_module_order(entries)
    contents = rank_map.contents_of(ranks, ordered, f"{ranks[0].kind}, tensor parallel", warnings, world)
    checkpoint = rank_map.build_checkpoint(folder, ranks[0].states, contents)
    if not checkpoint.no_training:
        from dsconv.checkpoint.formats.deepspeed.joined_optimizer import join_training

        checkpoint.training = partial(join_training, folder, ranks, shards, entries, rules)
    return checkpoint


ReadRank = Callable[[TagFolder, int, list[str]], RankMap]


def read_ranks(folder: TagFolder, warnings: list[str], read_rank: ReadRank = read_rank) -> list[RankMap]:
    """Return the map of every model-parallel rank.

    Args:
        folder: The tag's folder.
        warnings: A warning is added where files of an older, larger world are ignored.
        read_rank: What reads one rank.

    Raises:
        MissingShardError: A rank has no files.
        InconsistentCheckpointError: The files are not from one save.
    """
    present = folder.mp_ranks
    first = read_rank(folder, present[0], warnings)
    world = first.model_parallel
    missing = list(islice((mp for mp in range(world) if mp not in present), 8))
    if missing:
        raise MissingShardError(
            f"{folder.path}: {first.states.path.name} says {counted(world, 'model-parallel rank')} (mp_world_size);"
            f" missing all files of rank {', '.join(map(str, missing))}: expected such as"
            f" *mp_rank_{missing[0]:02d}_*.pt. Copy them"
            " from the nodes that wrote them"
        )
    for mp in present[world:]:
        _refuse_unless_stale(folder, mp, world, first)
    if present[world:]:
        warnings.append(
            f"ignored the files of model-parallel rank {present[world]} and above, left over from an older save with"
            f" more ranks: this checkpoint has {world}"
        )
    ranks = [first] + [read_rank(folder, mp, warnings) for mp in range(1, world)]
    for other in ranks[1:]:
        _same_run(first, other)
    consistency.same_step([(p.file, p.state) for rank in ranks for p in rank.partitions])
    return ranks


def _refuse_unless_stale(folder: TagFolder, mp: int, world: int, first: RankMap) -> None:
    """Raise InconsistentCheckpointError unless a surplus rank's file itself says that its world was larger."""
    mine = folder.of_rank(mp)
    path: Path | None = next(iter((*mine.model.values(), *mine.zero3.values())), None)
    if path is None:
        return
    count = read_module_states(path).model_parallel
    if count <= mp:
        raise InconsistentCheckpointError(
            f"{path} is from rank {mp} and says {counted(count, 'model-parallel rank')}, {first.states.path} says"
            f" {world}: files from several saves lie in one folder, or were renamed. Restore the files of one save"
        )


def _same_run(first: RankMap, other: RankMap) -> None:
    """Raise InconsistentCheckpointError unless two ranks have the same step, world, stage and data-parallel degree."""
    for what, mine, theirs in (
        ("step", first.states.step, other.states.step),
        ("model-parallel world", first.model_parallel, other.model_parallel),
        ("kind", first.kind, other.kind),
        ("data-parallel world", first.data_parallel, other.data_parallel),
    ):
        if mine != theirs:
            raise InconsistentCheckpointError(
                f"{first.states.path} is of {what} {mine} and {other.states.path} of {what} {theirs}: files of two"
                " saves lie in one folder. Restore the files of one of them"
            )


def rules_of(folder: TagFolder, states: ModuleStates) -> Rules:
    """Return the trainer's own rules, or if it saved none those of the tensor-parallel plan for config.json's model."""
    info = states.universal_info
    if info is not None:
        return UniversalInfo(info, states.path, states.stored)
    return tp_plan_rules.PlanRules.find([folder.path, folder.save_dir], states.path)


def join_ranks(ranks: Mapping[int, Mapping[str, TensorEntry]], rules: Rules) -> dict[str, TensorEntry]:
    """Return the full tensors of shards by rank; raise InconsistentCheckpointError where ranks lack one or differ."""
    first = ranks[0]
    result: dict[str, TensorEntry] = {}
    known = set(first) | {alias for entry in first.values() for alias in entry.aliases}
    for rank, entries in ranks.items():
        strange = next((name for name in entries if name not in known), None)
        if strange is not None:
            path = path_of(entries[strange])
            raise InconsistentCheckpointError(
                f"tensor {quote(strange)} is on model-parallel rank {rank}{path} and not on rank 0: not one save"
            )
    with Sources() as sources:
        for name, entry in first.items():
            shards = {}
            for rank, entries in ranks.items():
                if name not in entries:
                    raise InconsistentCheckpointError(
                        f"tensor {quote(name)} is on model-parallel rank 0{path_of(entry)} and not on rank {rank}"
                    )
                shards[rank] = entries[name]
            result[name] = join_shards(name, shards, rules, entry.role, sources)
    return result
