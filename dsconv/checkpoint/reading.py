"""Reading tensors, or parts of them, through a tensor map into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.tensormap import Piece, TensorEntry
from dsconv.checkpoint.torch_file import open_for_reading
from dsconv.errors import MalformedError

if TYPE_CHECKING:
    import torch


class Sources:
    """Open descriptors by path, the most recently used ones kept; a context manager that closes them."""

    LIMIT = 64  # a checkpoint may have thousands of files; a process may often open 1,024

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            while len(self._open) >= self.LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = open_for_reading(path)
        self._open[path] = descriptor
        return descriptor

    def read_into(self, path: Path, offset_bytes: int, view: memoryview) -> None:
        """Fill ``view`` from the file; raises MalformedError when the file ends before or cannot be read."""
        descriptor = self.descriptor(path)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise MalformedError(f"{path}: reading {len(view)} bytes at {offset_bytes} failed: {error.strerror}") from None
            if count == 0:
                raise MalformedError(f"{path}: truncated: expected {len(view)} bytes at offset {offset_bytes}, found {done}")
            done += count

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gather_view(raw: memoryview, piece: Piece, itemsize: int) -> bytearray:
    """The elements of a non-contiguous piece in row-major order. ``raw`` is the extent's bytes."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    assert piece.strides is not None
    flat = torch.frombuffer(raw, dtype=kinds[itemsize])
    out = bytearray(piece.numel * itemsize)
    torch.frombuffer(out, dtype=kinds[itemsize]).view(piece.shape).copy_(flat.as_strided(piece.shape, piece.strides))
    return out


def read_flat_into(entry: TensorEntry, start: int, view: memoryview, sources: Sources, pieces: tuple[Piece, ...] | None = None) -> None:
    """Fill ``view`` with the elements of ``entry`` from flat element ``start`` on, in row-major order."""
    itemsize = entry.dtype.itemsize
    stop = start + len(view) // itemsize
    for piece in entry.pieces if pieces is None else pieces:
        low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
        if low >= high:
            continue
        target = view[(low - start) * itemsize : (high - start) * itemsize]
        skip = (low - piece.start) * itemsize
        if piece.strides is None:
            sources.read_into(piece.extent.record.path, piece.extent.offset_bytes + skip, target)
        else:
            raw = memoryview(bytearray(piece.extent.nbytes))
            sources.read_into(piece.extent.record.path, piece.extent.offset_bytes, raw)
            target[:] = gather_view(raw, piece, itemsize)[skip : skip + len(target)]


def read_tensor(entry: TensorEntry, index: Any = None) -> torch.Tensor:
    """``entry`` as a new CPU tensor, or the part ``index`` of it. See ``TensorEntry.read``."""
    import torch

    first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
    rows = entry.shape[0] if entry.shape else 1
    if isinstance(first, slice) and entry.shape and (first.step or 1) > 0:
        low, high, step = first.indices(rows)
        high = max(low, high)
        remaining: Any = (slice(None, None, step), *rest)
    elif isinstance(first, int) and not isinstance(first, bool) and entry.shape:
        if not -rows <= first < rows:
            raise IndexError(f"{entry.name!r} has {rows} rows; row {first} is out of range")
        low = first % rows
        high, remaining = low + 1, (0, *rest)
    else:
        low, high, remaining = 0, rows, index
    shape = (high - low, *entry.shape[1:]) if entry.shape else ()
    row_numel = entry.numel // rows if rows else 0
    tensor = torch.empty(shape, dtype=getattr(torch, entry.dtype.name))
    if tensor.numel():
        with Sources() as sources:
            read_flat_into(entry, low * row_numel, tensor_bytes(tensor), sources)
    return tensor if remaining is None else tensor[remaining]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    import ctypes

    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def blocks(entry: TensorEntry, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, numel) of the consecutive flat blocks of ``entry`` of at most ``block_bytes``."""
    step = max(1, block_bytes // entry.dtype.itemsize)
    for start in range(0, entry.numel, step):
        yield start, min(step, entry.numel - start)
