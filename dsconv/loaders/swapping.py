"""Partitions that ``offload_param`` keeps on NVMe: a load fills the swapper's own buffers and DeepSpeed writes them.

The rules are those of DeepSpeed ``runtime/swap_tensor/partitioned_param_swapper.py``. A rank's swapper has
``buffer_count`` buffers of ``buffer_size`` elements. That is the memory a load takes, whatever the size of the model.
The swapper's writes do not report a full disk, so space is reserved before and file sizes are checked after.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsconv.errors import OutputError, UnsupportedError
from dsconv.urls import local_path


def check_nvme(nvme_path: str) -> None:
    """Check that partitions can be kept in the folder ``nvme_path``.

    DeepSpeed's async_io op is compiled on first use, which takes minutes.

    Raises:
        OutputError: The folder cannot be created.
        UnsupportedError: The op cannot be loaded.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme_path = str(local_path(nvme_path, "offload_param's nvme_path"))
    try:
        (Path(nvme_path) / "zero_stage_3").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{nvme_path}: offload_param's nvme_path cannot be created: {error.strerror}") from None
    try:
        if not AsyncIOBuilder().is_compatible():  # asked first, since load() compiles another op before it asks
            raise RuntimeError("async_io is not compatible")
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # noqa: BLE001 - compilers, linkers and loaders fail in many ways
        raise UnsupportedError(
            "offload_param to nvme needs DeepSpeed's async_io op, which cannot be loaded here: install libaio with its"
            " headers (Debian, Ubuntu: libaio-dev; RHEL: libaio-devel), ninja and a C++ compiler, or use device cpu."
            f" DeepSpeed says: {error}"
        ) from None


def move_to_nvme(param: Any) -> None:
    """Put a partition of ``ds_numel`` zeros on NVMe. Tensors that the checkpoint lacks keep them.

    Raises:
        UnsupportedError: The partition is larger than a buffer of the swapper.
        OutputError: The disk has no room for it.
    """
    from deepspeed.runtime.zero.config import OffloadDeviceEnum

    swapper, numel = param.nvme_swapper, param.ds_tensor.ds_numel
    if numel > swapper.elements_per_buffer:
        raise UnsupportedError(
            f"a partition of a parameter of shape {list(param.ds_shape)} has {numel} elements, which a buffer of"
            f" offload_param cannot hold: set its buffer_size ({swapper.elements_per_buffer}) to {numel} or more"
        )
    nbytes = _file_bytes(param)
    try:
        with Path(swapper.get_path(param)).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise OutputError(
            f"{swapper.swap_folder}: no room for a partition of {nbytes} bytes at offload_param's nvme_path:"
            f" {error.strerror}"
        ) from None
    swapper.param_id_to_numel[param.ds_id] = numel
    param.ds_tensor.final_location = OffloadDeviceEnum.nvme
    swapper.remove_partition_and_release_buffers([param])


def _file_bytes(param: Any) -> int:
    swapper = param.nvme_swapper
    return int(swapper._io_aligned_numel(param.ds_tensor.ds_numel) * swapper.swap_element_size)


def is_swapped(tensor: Any) -> bool:
    """Return whether a tensor of a model is a ZeRO-3 parameter whose partition is kept on NVMe."""
    return (
        getattr(tensor, "ds_tensor", None) is not None and getattr(tensor.ds_tensor, "final_location", None) == "nvme"
    )


@contextmanager
def in_buffers(params: Sequence[Any]) -> Iterator[None]:
    """Hold partitions that are kept on NVMe in the swapper's buffers, and write the buffers to NVMe at the end.

    Raises OutputError.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    swapper = params[0].nvme_swapper
    swapper.synchronize_reads()
    swapper.synchronize_writes()
    for param in params:
        if param.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE:
            param.ds_tensor.data = swapper.get_buffer(param, param.ds_tensor.ds_numel).data
            param.ds_tensor.status = PartitionedParamStatus.AVAILABLE
    try:
        yield
        swapper.swap_out_and_release(list(params))
    finally:
        swapper.remove_partition_and_release_buffers(params)
    for param in params:
        path, nbytes = Path(swapper.get_path(param)), _file_bytes(param)
        if path.stat().st_size < nbytes:
            raise OutputError(f"{path}: DeepSpeed wrote {path.stat().st_size} of {nbytes} bytes: the disk is full")


def batches(swapped: Sequence[tuple[Any, Any]]) -> Iterator[Sequence[tuple[Any, Any]]]:
    """Yield the (parameter, anything) pairs in groups for which the swapper has free buffers."""
    at = 0
    while at < len(swapped):
        free = max(1, swapped[at][0].nvme_swapper.available_swap_in_buffers())
        yield swapped[at : at + free]
        at += free
