"""The fp32 masters of a model that ``deepspeed.initialize`` has wrapped.

A load must set them too, or the first step of the optimizer undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsconv.checkpoint.transfer.fill import Slot
from dsconv.errors import UnsupportedError
from dsconv.loaders.memory import slot_of


def master_slots(name: str, parameter: Any) -> Iterator[Slot]:
    """Yield the parts of a parameter's fp32 master that this rank's optimizer keeps; none without an optimizer.

    ZeRO-3: the partition, as the parameter's own (DeepSpeed ``runtime/zero/stage3.py``
    ``_get_fp32_opt_state_partition``). ZeRO-1 and 2: the fragment that ``_hp_mapping`` names
    (``utils/tensor_fragment.py``). Raises UnsupportedError for masters on NVMe and under ``round_robin_gradients``,
    where DeepSpeed maps fragments wrongly.
    """
    if not parameter.requires_grad:
        return
    stage3 = getattr(parameter, "_z3_optimizer", None)
    if stage3 is not None:
        group = stage3.grad_position[stage3.get_param_id(parameter)][0]
        if stage3._swappable_optimizer_subgroup(group):
            raise UnsupportedError(f"the master of {name} is on NVMe: load before deepspeed.initialize")
        master = stage3._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)[0].detach()
        start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
        held = max(0, min(master.numel(), parameter.ds_numel - start))
        yield slot_of(master[:held], tuple(parameter.ds_shape), min(start, parameter.ds_numel))
        return
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    optimizer = getattr(parameter, "_zero_optimizer", None)
    if getattr(optimizer, "round_robin_gradients", False):
        raise UnsupportedError(
            f"the master of {name} cannot be found under round_robin_gradients: load before deepspeed.initialize"
        )
    yield slot_of(mapping.get_hp_fragment().detach(), tuple(parameter.shape), mapping.lp_fragment_address.start)
