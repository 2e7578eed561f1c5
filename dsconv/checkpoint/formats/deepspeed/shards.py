"""How the tensor-parallel shards of one parameter make the full one: the geometry, whichever rules it follows.

A shard lies along one dimension of the full tensor in *runs*: indices [start, stop) of that dimension, one after
another. One run is a plain row- or column-parallel weight; several are a weight of fused parts, each cut by itself.
Runs of the first dimension are flat ranges of the full tensor, and are read as such; others are regions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Protocol

from dsconv.checkpoint.formats import copies
from dsconv.checkpoint.map.pieces import flat_start, slice_pieces
from dsconv.checkpoint.map.regions import Interval, Region, Shape, box, merged, numel_of
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.text import quote


@dataclass(frozen=True)
class ShardRange:
    """Put elements [start, start + numel) of rank ``rank``'s shard into ``region`` of the full tensor, in row-major
    order.
    """

    rank: int
    start: int
    region: Region

    @property
    def numel(self) -> int:
        return numel_of(self.region)


@dataclass(frozen=True)
class Join:
    """List the blocks that make up the full tensor, and blocks of other ranks that must be equal to one of them.

    ``averaged`` says that the trainer lets the copies differ and means their average.
    """

    shape: Shape
    blocks: tuple[ShardRange, ...]
    copies: tuple[tuple[ShardRange, ShardRange], ...] = ()
    averaged: bool = False


def replicated(shape: Shape, ranks: int, averaged: bool = False) -> Join:
    """Return the join of a tensor that every rank holds whole."""
    whole = [ShardRange(rank, 0, box([0] * len(shape), shape)) for rank in range(ranks)]
    return Join(shape, (whole[0],), tuple((whole[0], other) for other in whole[1:]), averaged)


def concatenated(shapes: Sequence[Shape], dim: int, where: str) -> Join:
    """Return the join of shards one after another along ``dim``.

    Raises:
        InconsistentCheckpointError: The shapes do not fit.
    """
    widths = [[_width(shape, dim, shapes, where) for shape in shapes]]
    return in_parts(shapes, dim, widths, where)


def in_parts(
    shapes: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]], where: str, total: int | None = None
) -> Join:
    """Return the join of parts one after another along ``dim``, each cut by itself.

    Args:
        shapes: The shape of each rank's shard.
        dim: The dimension that is cut.
        widths: How many indices of each part each rank holds: ``widths[part][rank]``.
        where: The parameter, for messages.
        total: The number of indices that are not padding; None for all.

    Raises:
        InconsistentCheckpointError: A shard has another width.
    """
    runs: list[list[Interval]] = [[] for _ in shapes]
    start = 0
    for part in widths:
        for rank, size in enumerate(part):
            runs[rank].append((start, start + size))
            start += size
    full = list(shapes[0])
    _width(shapes[0], dim, shapes, where)
    full[dim] = start
    for rank, shape in enumerate(shapes):
        if shape[dim] != sum(b - a for a, b in runs[rank]):
            raise InconsistentCheckpointError(
                f"{where}: rank {rank}'s shard has shape {list(shape)}; by the checkpoint's metadata it should have"
                f" {sum(b - a for a, b in runs[rank])} along dimension {dim}. A shard is from another save, or ranks"
                " were swapped"
            )
    return along(tuple(full), dim, runs, where, total)


def along(full: Shape, dim: int, runs: Sequence[Sequence[Interval]], where: str, total: int | None = None) -> Join:
    """Return the join of shards that are ``full`` with dimension ``dim`` cut to runs of indices.

    Args:
        full: The shape of the full tensor, with its padding.
        dim: The dimension that is cut.
        runs: The runs of each rank, in the order in which its shard holds them. A run that an earlier rank has too is
            a copy.
        where: The parameter, for messages.
        total: The number of indices that are not padding; None for all.

    Raises:
        UnsupportedError: A dimension behind the first is permuted.
    """
    kept = full[dim] if total is None else min(full[dim], total)
    shape = (*full[:dim], kept, *full[dim + 1 :])
    outer, inner = math.prod(full[:dim]), math.prod(full[dim + 1 :])
    owners: dict[tuple[Interval, ...], ShardRange] = {}
    blocks: list[ShardRange] = []
    copies: list[tuple[ShardRange, ShardRange]] = []
    for rank, mine in enumerate(runs):
        start = 0
        groups: list[tuple[Interval, ...]] = [(run,) for run in mine] if outer == 1 else [tuple(mine)]
        if outer != 1 and any(a[1] > b[0] for a, b in pairwise(mine)):
            raise UnsupportedError(
                f"{where}: rank {rank} holds the indices of dimension {dim} in another order than the full tensor"
            )
        for group in groups:
            region = tuple(
                (
                    merged([(a, min(b, kept)) for a, b in group if a < kept])
                    if d == dim
                    else (((0, size),) if size else ())
                )
                for d, size in enumerate(full)
            )
            block = ShardRange(rank, start, region)
            start += inner * sum(b - a for a, b in group)
            if not block.numel:
                continue
            if group in owners:
                copies.append((owners[group], block))
            else:
                owners[group] = block
                blocks.append(block)
    return Join(shape, tuple(blocks), tuple(copies))


def _width(shape: Shape, dim: int, shapes: Sequence[Shape], where: str) -> int:
    """Return a shard's width in dimension ``dim``; raise InconsistentCheckpointError unless all else is alike."""
    first = shapes[0]
    if (
        dim >= len(first)
        or len(shape) != len(first)
        or any(a != b for d, (a, b) in enumerate(zip(shape, first, strict=True)) if d != dim)
    ):
        raise InconsistentCheckpointError(
            f"{where}: shards of shapes {', '.join(str(list(s)) for s in shapes[:8])} cannot be joined along dimension"
            f" {dim}: they are not from one save, or not cut that way"
        )
    return shape[dim]


def joined(
    name: str, shards: Mapping[int, TensorEntry], join: Join, role: str, aliases: tuple[str, ...]
) -> TensorEntry:
    """Return the full tensor of ``shards``, which are the entries by rank and, if they have elements, of one dtype."""
    filled = [shards[block.rank] for block in join.blocks]
    dtype = filled[0].dtype if filled else next(iter(shards.values())).dtype
    return TensorEntry(name, dtype, join.shape, partial(_pieces, shards, join), aliases, role)


def _pieces(shards: Mapping[int, TensorEntry], join: Join) -> tuple[Piece, ...]:
    def of_block(block: ShardRange) -> tuple[Piece, ...]:
        shard = shards[block.rank]
        return slice_pieces(shard.layout, block.start, block.numel, name=shard.name)

    starts = [flat_start(block.region, join.shape) for block in join.blocks]
    if any(start is None for start in starts):
        return tuple(replace(piece, region=block.region) for block in join.blocks for piece in of_block(block))
    found = [
        replace(piece, start=start + piece.start)
        for start, block in zip(starts, join.blocks, strict=True)
        if start is not None
        for piece in of_block(block)
    ]
    return tuple(sorted(found, key=lambda piece: piece.start))


class Rules(Protocol):
    """Say how the shards of a parameter make the full one."""

    def join(self, name: str, shapes: Sequence[Shape]) -> Join:
        """Return the join of shards of ``shapes``, one per rank, to the parameter ``name``; raise if it is unknown."""
        ...


def join_shards(
    name: str, shards: Mapping[int, TensorEntry], rules: Rules, role: str, sources: Sources, what: str = "tensor "
) -> TensorEntry:
    """Return the full tensor of one tensor's shards.

    Args:
        name: The tensor's name, by which the rules know it.
        shards: Its shard of each rank.
        rules: What says how they make the full tensor.
        role: The tensor's role; buffers are the same on all ranks.
        sources: Open files, to compare copies.
        what: What the shards are, for messages: the tensor, or something that lies as it does.

    Raises:
        InconsistentCheckpointError: The shards are not from one save.
        UnsupportedError: The rules do not tell how they make the full tensor.
    """
    first = shards[0]
    filled = [shard for shard in shards.values() if shard.numel] or [first]
    if len({shard.dtype for shard in filled}) > 1:
        dtypes = ", ".join(
            f"{shard.dtype} on rank {rank}{path_of(shard)}" for rank, shard in shards.items() if shard.numel
        )
        raise InconsistentCheckpointError(
            f"{what}{quote(name)} has another dtype on other model-parallel ranks: {dtypes}"
        )
    shapes = [shards[rank].shape for rank in range(len(shards))]
    if role == "buffer":
        if len(set(shapes)) > 1:
            raise UnsupportedError(
                f"buffer {quote(name)} has shapes {[list(s) for s in shapes[:8]]} on the tensor-parallel ranks"
            )
        join = replicated(shapes[0], len(shapes))
    else:
        join = rules.join(name, shapes)
    for owner, copy in join.copies:
        if not copies.same(shards[owner.rank], owner.start, shards[copy.rank], copy.start, owner.numel, sources):
            paths = f"rank {owner.rank}{path_of(shards[owner.rank])} and rank {copy.rank}{path_of(shards[copy.rank])}"
            if join.averaged:
                raise UnsupportedError(
                    f"{what}{quote(name)} differs between {paths}, and the trainer uses their average, which no file"
                    " holds. Convert with the trainer's own tool"
                )
            raise InconsistentCheckpointError(
                f"{what}{quote(name)} should be the same on all tensor-parallel ranks and differs between {paths}: the"
                " files are from different saves, or the ranks drifted apart in training"
            )
    # A shard without elements is nobody's to train: what the others say counts.
    role = next((shard.role for shard in filled if shard.role == "parameter"), filled[0].role)
    return joined(name, shards, join, role, first.aliases)


def path_of(entry: TensorEntry) -> str:
    """Return `` (file)`` with the file of an entry's first bytes, for a message."""
    pieces = entry.pieces
    return f" ({pieces[0].extent.record.path})" if pieces else ""
