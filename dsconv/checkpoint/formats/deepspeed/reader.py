"""DeepSpeed checkpoints: which of their kinds lies in a folder."""

from __future__ import annotations

from dsconv.checkpoint.formats.deepspeed.partitions import (
    read_partitions,
)
from dsconv.checkpoint.formats.deepspeed.ranks import of_one_rank
from dsconv.checkpoint.formats.deepspeed.stage0 import read_rank
from dsconv.checkpoint.formats.deepspeed.zero import _map_of
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import (
    CheckpointNotFoundError,
)
from dsconv.zero_utils.files import TagFolder, find_tag_folder


def detect(root: Root, tag: str | None) -> bool:
    """Raises CheckpointNotFoundError where it is DeepSpeed's and the tag that is meant is not there or not clear."""
    return root.path.is_dir() and find_tag_folder(root.path, tag) is not None


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the
    file.
    """
    folder = find_tag_folder(root.path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{root.path}: no DeepSpeed checkpoint")
    root.fetch(folder.files)
    if folder.experts:
        from dsconv.checkpoint.formats.deepspeed.moe.zero12 import read_moe

        return read_moe(folder)
    if folder.layers:
        from dsconv.checkpoint.formats.deepspeed.pipeline import read_pipeline

        return read_pipeline(folder)
    if len(folder.mp_ranks) > 1:
        from dsconv.checkpoint.formats.deepspeed.tensor_parallel import read_tensor_parallel

        return read_tensor_parallel(folder)
    if folder.optimizer:
        return read_zero(folder)

    return read_stage0(folder)


def read_zero(folder: TagFolder) -> Checkpoint:
    """The tensor map of a ZeRO checkpoint of one model-parallel rank whose optimizer files are there.

    Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the file.
    """
    warnings = list(folder.warnings)
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        from dsconv.checkpoint.formats.deepspeed.moe.autoep import read_zero3_experts

        return read_zero3_experts(folder, partitions, warnings)
    return of_one_rank(folder, _map_of(folder, partitions, warnings), warnings)


def read_stage0(folder: TagFolder) -> Checkpoint:
    """The tensor map of a checkpoint of one model-parallel rank without ZeRO optimizer files.

    Raises MissingShardError where the model states say that there should be some.
    """
    warnings = list(folder.warnings)
    return of_one_rank(folder, read_rank(folder, warnings), warnings)
