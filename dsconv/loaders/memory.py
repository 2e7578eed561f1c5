"""Present a tensor's memory, on the CPU or a device, as slots that a load fills."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.regions import Region
from dsconv.checkpoint.transfer.fill import Slot
from dsconv.checkpoint.transfer.reading import tensor_bytes


def slot_of(memory: torch.Tensor, shape: tuple[int, ...], start: int = 0, region: Region | None = None) -> Slot:
    """Return a slot for elements [start, start + memory.numel()) of ``region`` of a tensor.

    On the CPU, bytes are read straight into the memory. On a device they pass through a block.

    Args:
        memory: The memory to fill, which must be contiguous.
        shape: The shape of the full tensor.
        start: The first element, counted within the region.
        region: The region; None stands for the whole tensor.
    """
    dtype = BY_NAME[str(memory.dtype).removeprefix("torch.")]
    if memory.numel() == 0:
        return Slot(shape, dtype, start, 0, _to_nowhere, None, region)
    if memory.device.type == "cpu":
        view = tensor_bytes(memory)
        return Slot(shape, dtype, start, memory.numel(), partial(_to_view, view), view, region)
    flat = memory.detach().view(-1).view(torch.uint8)
    return Slot(shape, dtype, start, memory.numel(), partial(_to_device, flat), None, region)


def _to_nowhere(data: memoryview, offset_bytes: int) -> None:
    raise RuntimeError("an empty slot was written to")


def _to_view(view: memoryview, data: memoryview, offset_bytes: int) -> None:
    view[offset_bytes : offset_bytes + len(data)] = data


_streams = threading.local()


def _to_device(flat: torch.Tensor, data: memoryview, offset_bytes: int) -> None:
    """Copy a block to the device on this worker's own stream, so that other workers read meanwhile."""
    source = torch.frombuffer(data, dtype=torch.uint8)
    target = flat[offset_bytes : offset_bytes + len(data)]
    if flat.device.type != "cuda":
        target.copy_(source)
        return
    stream = getattr(_streams, "stream", None)
    if stream is None or stream.device != flat.device:
        stream = _streams.stream = torch.cuda.Stream(flat.device)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    stream.synchronize()  # the worker's next read reuses the block


def block_maker(devices: set[str]) -> Any:
    """Return the function that makes blocks: in pinned memory if a CUDA device is filled."""
    if "cuda" in devices and torch.cuda.is_available():
        return _pinned
    return bytearray


def _pinned(nbytes: int) -> Any:
    return tensor_bytes(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
