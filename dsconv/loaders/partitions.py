"""ZeRO-3 partitions: allocate an empty one, and tell which part of the full parameter it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsconv.checkpoint.transfer.fill import Slot
from dsconv.loaders.memory import slot_of
from dsconv.loaders.swapping import move_to_nvme


def allocate_partition(init: Any, param: Any) -> None:
    """Give a parameter empty partitions, hpZ's too, where ``_partition_param`` (DeepSpeed) would put them.

    Raises:
        UnsupportedError: The partition is larger than a buffer of the swapper.
        OutputError: NVMe cannot be written.
    """
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.config import OffloadDeviceEnum

    nvme = init.remote_device == OffloadDeviceEnum.nvme
    aligned = init._aligned_size(param)
    numel = aligned // init._partition_world_size(param)

    def new(numel: int, where: Any) -> Any:
        tensor = torch.empty(numel, dtype=param.dtype, device=where)
        if where == OffloadDeviceEnum.cpu and init.pin_memory:
            tensor = get_accelerator().pin_memory(tensor)
        tensor.requires_grad = False
        tensor.ds_numel = numel
        tensor.status = PartitionedParamStatus.AVAILABLE
        tensor.final_location = None
        return tensor

    if nvme and init.param_swapper.swappable_tensor(numel=numel):
        param.ds_tensor = new(0, "cpu")
        param.ds_tensor.ds_numel = numel
        move_to_nvme(param)
    elif param.ds_persist:
        param.ds_tensor = new(numel, init.local_device)
    else:
        param.ds_tensor = new(numel, OffloadDeviceEnum.cpu if nvme else init.remote_device)
    param.ds_numel_aligned = aligned
    if init.zero_param_process_group is not None:
        param.ds_secondary_tensor = new(aligned // init.num_ranks_in_param_group, init.remote_device)
        param.ds_secondary_start = init.rank_in_group * param.ds_secondary_tensor.ds_numel


def held_numel(param: Any) -> int:
    """Return how many elements of a ZeRO-3 parameter this rank's partition holds, without padding."""
    start = param.ds_zero_partition_rank * param.ds_tensor.ds_numel
    return int(max(0, min(param.ds_tensor.ds_numel, param.ds_numel - start)))


def partition_slots(param: Any) -> Iterator[Slot]:
    """Yield a ZeRO-3 parameter's slots on this rank: its partition and, with hpZ, the secondary one.

    Padding is set to zero.
    """
    shape = tuple(param.ds_shape)
    start = param.ds_zero_partition_rank * param.ds_tensor.ds_numel
    parts = [(param.ds_tensor, start)]
    if param.ds_secondary_tensor is not None:
        parts.append((param.ds_secondary_tensor, getattr(param, "ds_secondary_start", 0)))
    for tensor, first in parts:
        held = max(0, min(tensor.numel(), param.ds_numel - first))
        flat = tensor.detach().view(-1)
        flat[held:].zero_()
        yield slot_of(flat[:held], shape, min(first, param.ds_numel))
