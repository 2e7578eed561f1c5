"""The arithmetic by which ZeRO cuts parameters into partitions.

Sources, DeepSpeed: ``runtime/zero/stage_1_and_2.py`` (groups flattened and padded to 2 × ranks;
``_get_groups_without_padding`` cuts the padding before saving), ``runtime/bf16_optimizer.py`` (keeps the padding),
``runtime/zero/partition_parameters.py`` (stage 3: every parameter cut into ceil(numel / ranks)), ``utils/groups.py``
``_create_expert_and_data_parallel`` (which ranks share experts).
"""

from __future__ import annotations

ALIGNMENT_FACTOR = 2  # nccl_start_alignment_factor, stage_1_and_2.py and bf16_optimizer.py, DeepSpeed


def share_numel(numel: int, world: int) -> int:
    """Return the elements of a stage-3 parameter that each rank holds, with the last rank's padding."""
    return -(-numel // world)


def group_padding_limit(world: int) -> int:
    """Return how many elements the padding of a stage-1/2 group stays below: it pads to a multiple of 2 × ranks."""
    return ALIGNMENT_FACTOR * world


def group_numel(numel: int, world: int) -> int:
    """Return the elements of a stage-1/2 group of ``numel``, with its padding."""
    factor = ALIGNMENT_FACTOR * world
    return -(-numel // factor) * factor


def overlapping_numel(numels: list[int], partition_numel: int) -> int:
    """Return the most elements that parameters which reach into one partition of a flat group have together."""
    found: dict[int, int] = {}
    start = 0
    for numel in numels:
        if numel:
            for partition in range(start // partition_numel, (start + numel - 1) // partition_numel + 1):
                found[partition] = found.get(partition, 0) + numel
        start += numel
    return max(found.values(), default=0)


def expert_replicas(world: int, ep_size: int, data_first: bool) -> list[list[int]]:
    """Return the ranks that hold each expert-parallel rank's experts, in the order in which they partition them.

    ``data_first`` is ``use_data_before_expert_parallelism`` of the config: neighbours are replicas of one another.
    Without it neighbours hold different experts. ``ep_size`` divides ``world``.
    """
    if data_first:
        replicas = world // ep_size
        return [list(range(ep_rank * replicas, (ep_rank + 1) * replicas)) for ep_rank in range(ep_size)]
    return [list(range(ep_rank, world, ep_size)) for ep_rank in range(ep_size)]
