"""Geometry of pieces: where they lie in a full tensor, and parts of them, whatever format they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dsconv.checkpoint.map.regions import Region, Shape, Sizes, box, is_whole, width
from dsconv.checkpoint.map.tensors import Extent, Piece
from dsconv.errors import UnsupportedError
from dsconv.text import quote

Layout = Callable[[], tuple[Piece, ...]]


def row_major(shape: Shape) -> Shape:
    """Return the strides, in elements, of a contiguous tensor of ``shape``."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def flat_start(region: Region, shape: Shape) -> int | None:
    """Return where a region begins in the flat tensor if it is one run of it, else None.

    It is one if it holds one index of each of its first dimensions, neighbours of the next, and all of the rest.
    """
    if not shape:
        return 0
    cut = next((dim for dim, intervals in enumerate(region) if width(intervals) != 1), len(shape) - 1)
    if len(region[cut]) != 1 or any(region[dim] != ((0, shape[dim]),) for dim in range(cut + 1, len(shape))):
        return None
    return sum(region[dim][0][0] * stride for dim, stride in enumerate(row_major(shape)[: cut + 1]))


def arranged(pieces: Sequence[tuple[Sizes, Sizes, Piece]], shape: Shape) -> tuple[Piece, ...]:
    """Return pieces placed in a tensor of ``shape``: as flat ranges if all of them are, which is copied fastest.

    Args:
        pieces: The offsets and the sizes of the box that each piece fills, one number a dimension, and the piece.
        shape: The shape of the full tensor.
    """
    regions = [(box(offsets, sizes), piece) for offsets, sizes, piece in pieces]
    starts = [flat_start(region, shape) for region, _ in regions]
    if all(start is not None for start in starts):
        placed = [
            replace(piece, start=start) for start, (_, piece) in zip(starts, regions, strict=True) if start is not None
        ]
        return tuple(sorted(placed, key=lambda piece: piece.start))
    return tuple(replace(piece, region=None if is_whole(region, shape) else region) for region, piece in regions)


def slice_pieces(
    layout: Layout, start: int, numel: int, region: Region | None = None, name: str = ""
) -> tuple[Piece, ...]:
    """Return the pieces of flat elements [start, start + numel) of a tensor, counted from ``start``.

    Args:
        layout: What makes the tensor's pieces, which are flat ranges of it.
        start: The first element.
        numel: How many elements.
        region: The region of another tensor that these elements fill, where they do.
        name: The tensor, for messages.

    Raises:
        UnsupportedError: A part of a piece is wanted whose elements are not contiguous in the file.
    """
    found = []
    for piece in layout():
        low, high = max(start, piece.start), min(start + numel, piece.start + piece.numel)
        if low >= high:
            continue
        if (low, high) == (piece.start, piece.start + piece.numel):
            found.append(replace(piece, start=low - start, region=region))
            continue
        if piece.strides is not None:
            raise UnsupportedError(
                f"{piece.extent.record.path}: a shard of {quote(name)} is not contiguous, and only a part of it is used"
            )
        itemsize = piece.extent.nbytes // piece.numel
        extent = Extent(
            piece.extent.record, piece.extent.offset_bytes + (low - piece.start) * itemsize, (high - low) * itemsize
        )
        found.append(Piece(extent, low - start, high - low, region=region))
    return tuple(found)
