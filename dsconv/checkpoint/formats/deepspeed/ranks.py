"""One model-parallel rank, whatever its files are: with ZeRO or without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap, to_checkpoint
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.errors import MissingShardError
from dsconv.zero_utils.files import TagFolder

if TYPE_CHECKING:
    from dsconv.checkpoint.map.training import Training


def read_rank(folder: TagFolder, mp: int, warnings: list[str]) -> RankMap:
    """The map of rank ``mp``, with or without ZeRO; raises what ``zero.read_rank`` and ``stage0.read_rank`` raise."""
    mine = folder.of_rank(mp)
    if mine.optimizer:
        from dsconv.checkpoint.formats.deepspeed import zero

        return zero.read_rank(mine, warnings)
    from dsconv.checkpoint.formats.deepspeed import stage0

    return stage0.read_rank(mine, warnings)


def of_one_rank(folder: TagFolder, rank: RankMap, warnings: list[str]) -> Checkpoint:
    """The checkpoint of a model that was not cut; raises MissingShardError where the file says that it was."""
    if rank.model_parallel > 1:
        missing = next(mp for mp in range(rank.model_parallel) if mp not in folder.mp_ranks)
        raise MissingShardError(
            f"{rank.states.path} is one of {rank.model_parallel} model-parallel ranks (mp_world_size), and"
            f" {folder.path} holds the files of one. Copy the others, such as *mp_rank_{missing:02d}_*.pt, from the"
            " nodes that wrote them"
        )
    checkpoint = to_checkpoint(folder, [rank], rank.states.in_module_order(rank.entries), rank.kind, warnings)
    if not checkpoint.no_training:
        checkpoint.training = partial(read_training, folder, rank)
    return checkpoint


def read_training(folder: TagFolder, rank: RankMap) -> Training:
    """The optimizer of a rank whose files are ``folder``; raises what both readers of it raise."""
    from dsconv.checkpoint.formats.deepspeed import stage0_optimizer, zero_optimizer

    if rank.partitions:
        return zero_optimizer.read_training(folder, rank.states, rank.partitions, rank.stage, rank.places)
    return stage0_optimizer.read_training(folder, rank)
