"""DeepSpeed checkpoints: which of their kinds lies in a folder, and the reader for it.

The readers are imported where one is needed: every folder of another format is looked at here too.
"""

from __future__ import annotations

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import CheckpointNotFoundError
from dsconv.zero_utils.tag_folder import TagFolder, find_tag_folder


def detect(root: Root, tag: str | None) -> bool:
    """Return whether ``root`` holds a DeepSpeed checkpoint.

    Raises:
        CheckpointNotFoundError: It does, and the tag that is meant is not there or not clear.
    """
    return root.path.is_dir() and find_tag_folder(root.path, tag) is not None


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the tensor map of the checkpoint at ``root``.

    Raises:
        MissingShardError: One of its files is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: The checkpoint is of a kind that dsconv does not read.
    """
    folder = find_tag_folder(root.path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{root.path}: no DeepSpeed checkpoint")
    root.fetch(folder.files)
    return read_folder(folder)


def read_own_weights(root: Root, tag: str | None) -> Checkpoint:
    """Read the model's own 16-bit weights, which need no optimizer files, in the place of fp32 masters.

    Raises what ``read`` raises; UnsupportedError at ZeRO-3, whose model states hold no whole weights.
    """
    folder = find_tag_folder(root.path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{root.path}: no DeepSpeed checkpoint")
    folder = folder.with_own_weights()
    root.fetch(folder.files)
    return read_folder(folder)


def read_folder(folder: TagFolder) -> Checkpoint:
    """Read the tensor map of a tag's folder; raise what ``read`` raises."""
    from dsconv.checkpoint.formats.deepspeed.precisions import with_one_kind

    folder = with_one_kind(folder)
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
    """Read a ZeRO checkpoint of one model-parallel rank whose optimizer files are there; raise what ``read`` raises."""
    from dsconv.checkpoint.formats.deepspeed import zero
    from dsconv.checkpoint.formats.deepspeed.partitions import read_partitions
    from dsconv.checkpoint.formats.deepspeed.ranks import single_rank_checkpoint

    warnings = list(folder.warnings)
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        from dsconv.checkpoint.formats.deepspeed.moe.zero3 import read_zero3_experts

        return read_zero3_experts(folder, partitions, warnings)
    return single_rank_checkpoint(folder, zero.map_of(folder, partitions, warnings), warnings)


def read_stage0(folder: TagFolder) -> Checkpoint:
    """Read a checkpoint of one model-parallel rank without optimizer files.

    Raises:
        MissingShardError: The model states say that there should be some.
    """
    from dsconv.checkpoint.formats.deepspeed import stage0
    from dsconv.checkpoint.formats.deepspeed.ranks import single_rank_checkpoint

    warnings = list(folder.warnings)
    return single_rank_checkpoint(folder, stage0.read_rank(folder, warnings), warnings)
