"""DeepSpeed checkpoints: which of their kinds lies in a folder."""

from __future__ import annotations

from pathlib import Path

from dsconv.checkpoint.tensormap import Checkpoint
from dsconv.errors import CheckpointNotFoundError
from dsconv.zero_utils.files import find_tag_folder


def detect(path: Path, tag: str | None) -> bool:
    """Raises CheckpointNotFoundError where it is DeepSpeed's and the tag that is meant is not there or not clear."""
    return path.is_dir() and find_tag_folder(path, tag) is not None


def read(path: Path, tag: str | None) -> Checkpoint:
    """Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the file."""
    folder = find_tag_folder(path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{path}: no DeepSpeed checkpoint")
    if folder.experts:
        from dsconv.checkpoint.formats.moe import read_moe

        return read_moe(folder)
    if folder.layers:
        from dsconv.checkpoint.formats.pipeline import read_pipeline

        return read_pipeline(folder)
    if len(folder.mp_ranks) > 1:
        from dsconv.checkpoint.formats.tensor_parallel import read_tensor_parallel

        return read_tensor_parallel(folder)
    if folder.optimizer:
        from dsconv.checkpoint.formats.zero import read_zero

        return read_zero(folder)
    from dsconv.checkpoint.formats.stage0 import read_stage0

    return read_stage0(folder)
