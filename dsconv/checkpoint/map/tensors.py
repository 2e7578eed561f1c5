"""The tensor map: what a sharded checkpoint holds and where its bytes lie, without the bytes.

The words are those of docs/architecture.md: an ``Extent`` is bytes on disk, a ``Piece`` says which part of the full
tensor they fill, a ``TensorEntry`` is a name with its pieces, and a ``Checkpoint`` is a read-only mapping of entries.
A layout makes its pieces when asked and keeps only the numbers that they follow from, so that the map of a checkpoint
of many ranks stays small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.regions import Region, check_inside, numel_of, prove_cover
from dsconv.errors import InconsistentCheckpointError
from dsconv.text import quote

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Record:
    """Bytes that were written as one and may carry a checksum: a storage in a ``.pt``, a tensor of a safetensors file.

    ``offset_bytes`` counts from the start of the file at ``path``.
    """

    path: Path
    offset_bytes: int
    nbytes: int
    crc32: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Extent:
    """A byte range of a record: ``nbytes`` bytes from ``offset_bytes``, counted from the start of ``record.path``."""

    record: Record
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """An extent, and the elements of the full tensor that it fills.

    These are [start, start + numel) of ``region``, counted in row-major order; ``region`` None is the whole tensor.
    ``strides`` is set only for a tensor that was saved as a non-contiguous view: the extent then spans the view, and
    the elements of ``shape`` are picked from it, ``strides`` elements apart.
    """

    extent: Extent
    start: int
    numel: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None
    region: Region | None = None


class FileGroup(Protocol):
    """Files, numbered from 0, that hold the tensors of one layout; ``records`` gives a file's records in order."""

    @property
    def file_count(self) -> int: ...

    def records(self, number: int) -> list[Record]: ...


class ProvenLayout(ABC):
    """A layout of so many pieces that they are counted, and proved to tile, by arithmetic instead of one by one.

    ``group`` is the files in which all of them lie. In each file, the layouts of a group lie in the order of ``begin``.
    It is None if other tensors share the records.
    """

    begin: int

    @property
    @abstractmethod
    def group(self) -> FileGroup | None: ...

    @abstractmethod
    def pieces_in(self, number: int) -> tuple[Piece, ...]:
        """Return the pieces in one file of the group, in the order of their bytes."""

    @abstractmethod
    def __call__(self) -> tuple[Piece, ...]: ...

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of pieces."""

    @abstractmethod
    def prove(self, entry: TensorEntry) -> None:
        """Raise InconsistentCheckpointError unless the pieces cover ``entry`` exactly once, with bytes that exist."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: The name under which the checkpoint holds it.
        dtype: The stored dtype.
        shape: The full shape, whatever the shards hold.
        layout: Returns the pieces; a ``ProvenLayout`` where there are very many.
        aliases: Other names of the same data (tied weights).
        role: What it was in training: parameter, frozen or buffer.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    layout: Callable[[], tuple[Piece, ...]] = field(repr=False)
    aliases: tuple[str, ...] = ()
    role: str = "parameter"  # parameter, frozen or buffer

    # How ``read`` reads; ``dsconv.checkpoint.opening`` hands it in, since the map knows where bytes lie and no more.
    reader: ClassVar[Callable[[TensorEntry, Any], torch.Tensor]]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces; those of one region are in the order of the ranges that they fill."""
        return self.layout()

    @property
    def piece_count(self) -> int:
        return self.layout.count if isinstance(self.layout, ProvenLayout) else len(self.pieces)

    def read(self, index: Any = None) -> torch.Tensor:
        """Return the tensor as a new CPU tensor, or ``tensor[index]``.

        Only the rows that a slice or number in the first dimension selects are read. Checksums are not checked, since
        they cover whole records.

        Raises:
            MalformedError: A file ends early or cannot be read.
        """
        return type(self).reader(self, index)


def prove_tiling(entry: TensorEntry) -> None:
    """Raise InconsistentCheckpointError unless the pieces of ``entry`` cover it exactly once."""
    if isinstance(entry.layout, ProvenLayout):
        entry.layout.prove(entry)
        return
    filled: dict[Region | None, int] = {}
    for piece in entry.pieces:
        where = f"tensor {quote(entry.name)} in {piece.extent.record.path}"
        position = filled.get(piece.region, 0)
        if piece.start != position:
            kind = "a hole" if piece.start > position else "an overlap"
            raise InconsistentCheckpointError(
                f"{where}: {kind} at element {min(piece.start, position)}; the checkpoint's files do not fit together"
            )
        span = piece.extent.nbytes // entry.dtype.itemsize
        if piece.strides is None and span != piece.numel:
            raise InconsistentCheckpointError(f"{where}: a piece of {piece.numel} elements has {span} on disk")
        if piece.region is not None and not position:
            check_inside(piece.region, entry.shape, where)
        filled[piece.region] = position + piece.numel
    if set(filled) <= {None}:
        if filled.get(None, 0) != entry.numel:
            raise InconsistentCheckpointError(
                f"tensor {quote(entry.name)}: shape {list(entry.shape)} needs {entry.numel} elements, found"
                f" {filled.get(None, 0)}"
            )
        return
    regions = []
    for region, count in filled.items():
        if region is None or count != numel_of(region):
            raise InconsistentCheckpointError(
                f"tensor {quote(entry.name)}: a shard has {count} of the elements that it should have"
            )
        regions.append(region)
    prove_cover(regions, entry.shape, entry.name)
