"""The arithmetic by which ZeRO cuts parameters into partitions.

Sources, DeepSpeed 0.19.8: ``runtime/zero/stage_1_and_2.py`` (groups flattened and padded to 2 × ranks;
``_get_groups_without_padding`` cuts the padding before saving), ``runtime/bf16_optimizer.py`` (keeps the padding),
``runtime/zero/partition_parameters.py`` (stage 3: every parameter cut into ceil(numel / ranks)).
"""

from __future__ import annotations

ALIGNMENT_FACTOR = 2  # nccl_start_alignment_factor, stage_1_and_2.py and bf16_optimizer.py, DeepSpeed 0.19.8


def share_numel(numel: int, world: int) -> int:
    """Elements of a stage-3 parameter that each rank holds, the last rank's padding counted."""
    return -(-numel // world)


def group_padding_limit(world: int) -> int:
    """A stage-1/2 group is padded by less than this many elements (to a multiple of 2 × ranks)."""
    return ALIGNMENT_FACTOR * world
