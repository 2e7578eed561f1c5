"""Partitions that ``offload_param`` keeps on NVMe: filled in the swapper's own buffers and written out by DeepSpeed.

DeepSpeed 0.19.8 ``runtime/swap_tensor/partitioned_param_swapper.py``. A rank's swapper has ``buffer_count`` buffers of
``buffer_size`` elements; that is the memory a load takes, whatever the size of the model. Its writes say nothing of a
disk that is full: space is reserved before, and files are measured after.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsconv.errors import OutputError, UnsupportedError


def check_nvme(nvme_path: str) -> None:
    """Raise OutputError where the folder cannot be made, UnsupportedError where DeepSpeed's async_io op cannot be
    loaded.

    The op is compiled when it is first used, for minutes.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        (Path(nvme_path) / "zero_stage_3").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{nvme_path}: offload_param's nvme_path cannot be made a folder: {error.strerror}") from None
    try:
        if not AsyncIOBuilder().is_compatible():  # asked first: load() compiles another op before it asks
            raise RuntimeError("async_io is not compatible")
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # noqa: BLE001 - the compiler's, the linker's and the loader's are of many kinds
        raise UnsupportedError(
            "offload_param to nvme needs DeepSpeed's async_io op, which cannot be loaded here: install libaio with its"
            " headers (Debian, Ubuntu: libaio-dev; RHEL: libaio-devel), ninja and a C++ compiler, or use device cpu."
            f" DeepSpeed says: {error}"
        ) from None


def move_to_nvme(param: Any) -> None:
    """Put an empty partition of ``ds_numel`` elements on NVMe: a file of zeros, which is what the checkpoint may lack.

    Raises UnsupportedError where it is larger than a buffer, OutputError where the disk has no room for it.
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
    """Whether a tensor of a model is a ZeRO-3 parameter whose partition's place is on NVMe."""
    return (
        getattr(tensor, "ds_tensor", None) is not None and getattr(tensor.ds_tensor, "final_location", None) == "nvme"
    )


@contextmanager
def in_buffers(params: Sequence[Any]) -> Iterator[None]:
    """Partitions on NVMe are buffers of the swapper in here; what these then hold is written to NVMe. Raises
    OutputError.
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
    """(Parameter, anything) in groups of as many as the swapper has free buffers for."""
    at = 0
    while at < len(swapped):
        free = max(1, swapped[at][0].nvme_swapper.available_swap_in_buffers())
        yield swapped[at : at + free]
        at += free
