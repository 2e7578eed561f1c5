"""Read tensors, or parts of them, through a tensor map into memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.regions import UNITS, count_before, scatter
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.storage.local import OpenFile, open_for_reading
from dsconv.errors import UnsupportedError, require_packages
from dsconv.text import quote

if TYPE_CHECKING:
    import torch

COMPARED_BYTES = 8 << 20  # of each of two tensors at a time


def new_block(nbytes: int) -> memoryview:
    """Return zeroed memory, of which the system gives only the pages that are written to: most blocks are not filled.

    Raises:
        MemoryError: There is not enough.
    """
    try:
        return memoryview(mmap.mmap(-1, nbytes))
    except OSError:
        raise MemoryError from None


class Sources:
    """Open files by path. The most recently used ones are kept open; leaving the context closes them. Each thread has
    its own.
    """

    LIMIT = 64  # a checkpoint may have thousands of files; a process may often open 1,024

    def __init__(self) -> None:
        self._open: dict[Path, OpenFile] = {}
        self._ahead: dict[tuple[Path, int, int], bytes] = {}

    def file(self, path: Path) -> OpenFile:
        file = self._open.pop(path, None)
        if file is None:
            while len(self._open) >= self.LIMIT:
                self._open.pop(next(iter(self._open))).close()
            file = open_for_reading(path)
        self._open[path] = file
        return file

    def read_into(self, path: Path, offset_bytes: int, view: memoryview) -> None:
        """Fill ``view`` from the file; raises MalformedError when the file ends before or cannot be read."""
        ahead = self._ahead.pop((path, offset_bytes, len(view)), None)
        if ahead is not None:
            view[:] = ahead
        else:
            self.file(path).read_into(offset_bytes, view)

    def read_runs(
        self, path: Path, offsets: Sequence[int], run_bytes: int, view: memoryview, places: Sequence[int]
    ) -> None:
        """Fill ``view`` as the file's ``OpenFile.read_runs`` does."""
        self.file(path).read_runs(offsets, run_bytes, view, places)

    def read_ahead(self, spans: Iterable[tuple[Path, int, int]]) -> None:
        """Get the bytes of each (path, offset, number of bytes) for ``read_into``. A store gets one request for all of
        them.
        """
        by_path: dict[Path, list[tuple[int, int]]] = {}
        for path, offset, nbytes in spans:
            by_path.setdefault(path, []).append((offset, nbytes))
        for path, wanted in by_path.items():
            for (offset, nbytes), data in zip(wanted, self.file(path).read_many(wanted), strict=True):
                self._ahead[path, offset, nbytes] = data

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gather_view(raw: memoryview, piece: Piece, itemsize: int) -> bytearray:
    """Return the elements of a non-contiguous piece in row-major order. ``raw`` is the extent's bytes."""
    import numpy as np

    if piece.strides is None:
        raise ValueError("a contiguous piece has nothing to gather")
    flat = np.frombuffer(raw, dtype=UNITS[itemsize])
    strides = tuple(step * itemsize for step in piece.strides)
    out = bytearray(piece.numel * itemsize)
    placed = np.frombuffer(out, dtype=flat.dtype).reshape(piece.shape)
    placed[...] = np.lib.stride_tricks.as_strided(flat, piece.shape, strides)
    return out


@dataclass(frozen=True)
class Part:
    """The part of a run of a tensor that one piece holds: elements [first, first + numel) of what the piece fills.

    ``first`` counts as the piece's ``start`` does.
    """

    piece: Piece
    first: int
    numel: int

    @property
    def in_place(self) -> bool:
        """Return whether the part's bytes lie together in the tensor as they do in the file."""
        return self.piece.region is None and self.piece.strides is None

    def span(self, itemsize: int) -> tuple[int, int]:
        """Return the offset in the file and the number of the bytes to read: all bytes of a non-contiguous piece."""
        extent = self.piece.extent
        if self.piece.strides is not None:
            return extent.offset_bytes, extent.nbytes
        return extent.offset_bytes + (self.first - self.piece.start) * itemsize, self.numel * itemsize

    def place(
        self, raw: memoryview, block: memoryview, block_start: int, shape: tuple[int, ...], itemsize: int
    ) -> None:
        """Put the bytes of ``span`` where they belong in ``block``, the tensor's elements from ``block_start`` on."""
        piece = self.piece
        if piece.strides is not None:
            skip = (self.first - piece.start) * itemsize
            raw = memoryview(gather_view(raw, piece, itemsize))[skip : skip + self.numel * itemsize]
        if piece.region is not None:
            scatter(block, block_start, raw, self.first, piece.region, shape, itemsize)
        else:
            block[(self.first - block_start) * itemsize : (self.first - block_start + self.numel) * itemsize] = raw


def parts_of(pieces: Iterable[Piece], shape: tuple[int, ...], start: int, stop: int) -> Iterator[Part]:
    """Yield the parts that make elements [start, stop) of a tensor of ``shape``."""
    for piece in pieces:
        low, high = start, stop
        if piece.region is not None:
            low, high = count_before(piece.region, shape, start), count_before(piece.region, shape, stop)
        low, high = max(low, piece.start), min(high, piece.start + piece.numel)
        if low < high:
            yield Part(piece, low, high - low)


def read_flat_into(
    entry: TensorEntry,
    start: int,
    view: memoryview,
    sources: Sources,
    pieces: tuple[Piece, ...] | None = None,
) -> None:
    """Fill ``view`` with the elements of ``entry`` from flat element ``start`` on, in row-major order.

    Args:
        entry: the tensor.
        start: the first element, counted in row-major order.
        view: room for a whole number of elements.
        sources: the open files of this thread.
        pieces: ``entry.pieces``, where the caller has made them already.

    Raises:
        MalformedError: a file ends before, or cannot be read.
    """
    itemsize = entry.dtype.itemsize
    for part in parts_of(entry.pieces if pieces is None else pieces, entry.shape, start, start + len(view) // itemsize):
        offset, nbytes = part.span(itemsize)
        raw = view[(part.first - start) * itemsize :][:nbytes] if part.in_place else memoryview(bytearray(nbytes))
        sources.read_into(part.piece.extent.record.path, offset, raw)
        if not part.in_place:
            part.place(raw, view, start, entry.shape, itemsize)


def read_tensor(entry: TensorEntry, index: Any = None) -> torch.Tensor:
    """Return ``entry`` as a new CPU tensor, or the part ``index`` of it. See ``TensorEntry.read``."""
    require_packages("reading a tensor into memory", "torch", "torch")
    import torch

    first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
    rows = entry.shape[0] if entry.shape else 1
    if isinstance(first, slice) and entry.shape and (first.step or 1) > 0:
        low, high, step = first.indices(rows)
        high = max(low, high)
        remaining: Any = (slice(None, None, step), *rest)
    elif isinstance(first, int) and not isinstance(first, bool) and entry.shape:
        if not -rows <= first < rows:
            raise IndexError(f"{quote(entry.name)} has {rows} rows; row {first} is out of range")
        low = first % rows
        high, remaining = low + 1, (0, *rest)
    else:
        low, high, remaining = 0, rows, index
    shape = (high - low, *entry.shape[1:]) if entry.shape else ()
    row_numel = entry.numel // rows if rows else 0
    dtype = getattr(torch, entry.dtype.name, None)
    if dtype is None:
        raise UnsupportedError(f"{quote(entry.name)} is of {entry.dtype}, which this release of torch does not have")
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        with Sources() as sources:
            read_flat_into(entry, low * row_numel, tensor_bytes(tensor), sources)
    return tensor if remaining is None else tensor[remaining]


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes, which are read in blocks."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = COMPARED_BYTES // a.dtype.itemsize
    pieces = a.pieces, b.pieces
    with Sources() as sources:
        for start in range(0, a.numel, step):
            nbytes = min(step, a.numel - start) * a.dtype.itemsize
            left, right = memoryview(bytearray(nbytes)), memoryview(bytearray(nbytes))
            read_flat_into(a, start, left, sources, pieces[0])
            read_flat_into(b, start, right, sources, pieces[1])
            if left != right:
                return False
    return True


def is_zero(entry: TensorEntry) -> bool:
    """Return whether every byte of a small tensor, which is read whole, is zero."""
    data = memoryview(bytearray(entry.nbytes))
    with Sources() as sources:
        read_flat_into(entry, 0, data, sources)
    return not any(data)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes."""
    import ctypes

    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def blocks(entry: TensorEntry, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, numel) of the consecutive flat blocks of ``entry`` of at most ``block_bytes``."""
    step = max(1, block_bytes // entry.dtype.itemsize)
    for start in range(0, entry.numel, step):
        yield start, min(step, entry.numel - start)
