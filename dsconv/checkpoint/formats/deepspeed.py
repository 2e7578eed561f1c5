"""DeepSpeed checkpoints: which of their kinds lies in a folder."""

from __future__ import annotations

from pathlib import Path

from dsconv.checkpoint.tensormap import Checkpoint
from dsconv.errors import CheckpointNotFoundError, UnsupportedError
from dsconv.zero_utils.files import find_tag_folder


def detect(path: Path, tag: str | None) -> bool:
    """Raises CheckpointNotFoundError where it is DeepSpeed's and the tag that is meant is not there or not clear."""
    return path.is_dir() and find_tag_folder(path, tag) is not None


def read(path: Path, tag: str | None) -> Checkpoint:
    """Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the file."""
    folder = find_tag_folder(path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{path}: no DeepSpeed checkpoint")
    if folder.layers:
        raise UnsupportedError(f"{folder.path}: a pipeline checkpoint ({folder.layers[0].name} …); this version does not merge those")
    if folder.experts:
        from dsconv.checkpoint.formats.moe import read_moe

        return read_moe(folder)
    ranks = {mp for mp, _ in folder.optimizer} | set(folder.model) | {mp for mp, _ in folder.zero3}
    if len(ranks) > 1:
        raise UnsupportedError(f"{folder.path}: a tensor-parallel checkpoint of {len(ranks)} mp_ranks; this version does not merge those")
    if folder.optimizer:
        from dsconv.checkpoint.formats.zero import read_zero

        return read_zero(folder)
    from dsconv.checkpoint.formats.stage0 import read_stage0

    return read_stage0(folder)
