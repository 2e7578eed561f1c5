"""The files of one model-parallel rank, read by whichever reader they are for: with ZeRO or without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap, build_checkpoint, contents_of
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.errors import MissingShardError
from dsconv.text import count
from dsconv.zero_utils.tag_folder import TagFolder

if TYPE_CHECKING:
    from dsconv.checkpoint.map.training import Training


def read_rank(folder: TagFolder, mp: int, warnings: list[str]) -> RankMap:
    """Return the map of model-parallel rank ``mp``; raise what ``zero.read_rank`` and ``stage0.read_rank`` raise."""
    mine = folder.of_rank(mp)
    if mine.optimizer:
        from dsconv.checkpoint.formats.deepspeed import zero

        return zero.read_rank(mine, warnings)
    from dsconv.checkpoint.formats.deepspeed import stage0

    return stage0.read_rank(mine, warnings)


def single_rank_checkpoint(folder: TagFolder, rank: RankMap, warnings: list[str]) -> Checkpoint:
    """Return the checkpoint of a model that was not cut.

    Raises:
        MissingShardError: The file says that the model was cut over several ranks.
    """
    if rank.model_parallel > 1:
        missing = next(mp for mp in range(rank.model_parallel) if mp not in folder.mp_ranks)
        raise MissingShardError(
            f"{rank.states.path} is one of {count(rank.model_parallel, 'model-parallel rank')} (mp_world_size), and"
            f" {folder.path} holds the files of one. Copy the others, such as *mp_rank_{missing:02d}_*.pt, from the"
            " nodes that wrote them"
        )
    entries = rank.states.in_module_order(rank.entries)
    checkpoint = build_checkpoint(folder, rank.states, contents_of([rank], entries, rank.kind, warnings))
    if not checkpoint.no_training:
        checkpoint.training = partial(read_training, folder, rank)
    return checkpoint


def read_training(folder: TagFolder, rank: RankMap) -> Training:
    """Return the optimizer of a rank whose files are ``folder``; raise what its two readers raise."""
    from dsconv.checkpoint.formats.deepspeed import stage0_optimizer, zero_optimizer

    if rank.partitions:
        return zero_optimizer.read_training(folder, rank)
    return stage0_optimizer.read_training(folder, rank)
