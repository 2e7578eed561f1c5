"""Geometry of pieces: cut, arranged and joined, whatever format they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dsconv.checkpoint.map.regions import Region, Shape, Sizes, box, is_whole
from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.errors import UnsupportedError


def arranged(pieces: Sequence[tuple[Sizes, Sizes, Piece]], shape: Sizes) -> tuple[Piece, ...]:
    """Pieces of (offsets, sizes) placed in a tensor of ``shape``: as flat ranges where all are, which is copied
    fastest.
    """
    if all(_is_flat(sizes, shape) for _, sizes, _ in pieces):
        placed = [replace(piece, start=_flat_start(offsets, shape)) for offsets, _, piece in pieces]
        return tuple(sorted(placed, key=lambda piece: piece.start))
    regions = ((box(offsets, sizes), piece) for offsets, sizes, piece in pieces)
    return tuple(replace(piece, region=None if is_whole(region, shape) else region) for region, piece in regions)


def _is_flat(sizes: Sizes, shape: Sizes) -> bool:
    """Whether a box of ``sizes`` is one run of elements: one row of this, some of that, all of the rest."""
    cut = next((dim for dim, size in enumerate(sizes) if size != 1), len(sizes))
    return sizes[cut + 1 :] == shape[cut + 1 :]


def _flat_start(offsets: Sizes, shape: Sizes) -> int:
    start = 0
    for offset, size in zip(offsets, shape, strict=True):
        start = start * size + offset
    return start


def flat_start(region: Region, shape: Shape) -> int | None:
    """Where the region starts if it is one run of the flat full tensor, else None."""
    cut = next((d for d, size in enumerate(shape) if region[d] != ((0, size),)), None)
    if cut is None:
        return 0
    tail_is_whole = all(region[d] == ((0, shape[d]),) for d in range(cut + 1, len(shape)))
    if math.prod(shape[:cut]) != 1 or len(region[cut]) != 1 or not tail_is_whole:
        return None
    return region[cut][0][0] * math.prod(shape[cut + 1 :])


def pieces_of(entry: TensorEntry, start: int, numel: int) -> list[Piece]:
    """The pieces of flat elements [start, start + numel) of an entry whose pieces are flat ranges, counted from
    ``start``.
    """
    found = []
    itemsize = entry.dtype.itemsize
    for piece in entry.pieces:
        low, high = max(start, piece.start), min(start + numel, piece.start + piece.numel)
        if low >= high:
            continue
        if (low, high) == (piece.start, piece.start + piece.numel):
            found.append(replace(piece, start=low - start))
            continue
        if piece.strides is not None:
            raise UnsupportedError(
                f"{piece.extent.record.path}: a shard of {entry.name!r} is not contiguous and is used in parts"
            )
        offset = piece.extent.offset_bytes + (low - piece.start) * itemsize
        found.append(Piece(Extent(piece.extent.record, offset, (high - low) * itemsize), low - start, high - low))
    return found


def slice_pieces(
    layout: Callable[[], tuple[Piece, ...]], start: int, numel: int, region: Region | None
) -> tuple[Piece, ...]:
    """Return the pieces of elements [start, start + numel) of a rank's own tensor, as pieces of ``region``."""
    pieces = []
    for piece in layout():
        low, high = max(piece.start, start), min(piece.start + piece.numel, start + numel)
        if low < high:
            itemsize = piece.extent.nbytes // piece.numel
            extent = Extent(
                piece.extent.record, piece.extent.offset_bytes + (low - piece.start) * itemsize, (high - low) * itemsize
            )
            pieces.append(Piece(extent, low - start, high - low, region=region))
    return tuple(pieces)
