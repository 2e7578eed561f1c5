"""Sum up the values of a checkpoint: NaN, infinities, zeros, norms, and shards that hold the same bytes.

A model whose loss went to NaN, a layer that was never trained (all zeros) and a rank that saved another one's shard
look like any other checkpoint until somebody reads the values. This reads each byte once, in a few blocks of memory,
for the weights and for the optimizer's states.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.checkpoint.transfer.numbers import as_float64, is_number
from dsconv.checkpoint.transfer.reading import Sources, gather_view
from dsconv.convert.progress import Progress
from dsconv.errors import DsconvError
from dsconv.text import count

WEIGHTS = "weights"
STEP_BYTES = BLOCK_BYTES // 4
SMALLEST_REPEAT_BYTES = 128  # shorter shards may be equal by chance


@dataclass
class Values:
    """What the values of a tensor are.

    Attributes:
        name: The tensor's name.
        kind: ``weights``, or the name of an optimizer state, such as ``exp_avg``.
        dtype: The stored dtype.
        numel: The number of elements.
        nan: How many are NaN.
        infinite: How many are infinite.
        zeros: How many are zero.
        norm: The Euclidean norm of the finite ones.
        largest: The largest absolute value of the finite ones.
    """

    name: str
    kind: str
    dtype: str
    numel: int = 0
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    norm: float = 0.0
    largest: float = 0.0

    @property
    def nonfinite(self) -> int:
        return self.nan + self.infinite


@dataclass
class ValuesReport:
    """What ``values_of`` found.

    Attributes:
        tensors: The values of each tensor, weights first.
        repeated: Groups of places, such as ``model.norm.weight in rank_0.pt``, that hold the same bytes:
            SMALLEST_REPEAT_BYTES or more, which are not all one value. So do tied weights that are stored twice, and a
            rank that saved another one's shard.
        not_read: {name: why}, of tensors whose dtype is not read as numbers.
        no_optimizer: Why there are no optimizer states; "" where there are.
        nbytes: The bytes that were read.
    """

    tensors: list[Values] = field(default_factory=list)
    repeated: list[list[str]] = field(default_factory=list)
    not_read: dict[str, str] = field(default_factory=dict)
    no_optimizer: str = ""
    nbytes: int = 0

    @property
    def problems(self) -> list[str]:
        """Return what is wrong or suspicious, as sentences."""
        found = []
        for kind in dict.fromkeys(values.kind for values in self.tensors):
            bad = [values for values in self.tensors if values.kind == kind and values.nonfinite]
            if bad:
                nan, infinite = sum(v.nan for v in bad), sum(v.infinite for v in bad)
                found.append(
                    f"{kind}: {nan:,} NaN and {infinite:,} infinite values, in {len(bad):,} of"
                    f" {count(sum(v.kind == kind for v in self.tensors), 'tensor')}, first in {bad[0].name!r}"
                )
        found += [f"the same bytes lie in {' and in '.join(places)}" for places in self.repeated]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {**asdict(self), "problems": self.problems}


def values_of(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    names: set[str] | None = None,
    optimizer: bool = True,
    progress: Progress | None = None,
) -> ValuesReport:
    """Read all values of a checkpoint and sum them up, tensor by tensor.

    Args:
        source: What ``open_checkpoint`` takes, or a checkpoint that is open.
        names: The tensors to read, and whose states to read; all of them by default.
        optimizer: Read the optimizer's states too, where the checkpoint has some.
        progress: Called with ("values", bytes done, bytes in all).

    Returns:
        A row for each tensor and state, and which shards hold the same bytes.

    Raises:
        DsconvError: What ``open_checkpoint`` raises; MalformedError where a file cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    report = ValuesReport()
    work = [(WEIGHTS, entry) for entry in checkpoint.values() if names is None or entry.name in names]
    if optimizer:
        work += _states(checkpoint, names, report)
    total = sum(entry.nbytes for _, entry in work)
    places: dict[tuple[int, int, float], list[str]] = {}
    caster = Caster()
    with Sources() as sources:
        for kind, entry in work:
            if is_number(entry.dtype):
                report.tensors.append(_read(entry, kind, sources, caster, places))
                report.nbytes += entry.nbytes
            else:
                report.not_read[entry.name] = f"{entry.dtype} is not read as numbers"
            if progress is not None:
                progress("values", report.nbytes, total)
    report.repeated = [found for found in places.values() if len(found) > 1]
    return report


def _states(checkpoint: Checkpoint, names: set[str] | None, report: ValuesReport) -> Iterator[tuple[str, TensorEntry]]:
    if checkpoint.training is None:
        report.no_optimizer = checkpoint.no_training or "no optimizer states are read from this format"
        return
    try:
        states = checkpoint.training().states
    except DsconvError as error:
        report.no_optimizer = str(error)
        return
    for name, of_parameter in states.items():
        if names is None or name in names:
            yield from ((kind, entry) for kind, entry in of_parameter.items() if kind not in ("fp32", WEIGHTS))


def _read(
    entry: TensorEntry, kind: str, sources: Sources, caster: Caster, places: dict[tuple[int, int, float], list[str]]
) -> Values:
    import numpy as np

    found = Values(entry.name, kind, str(entry.dtype))
    squares = 0.0
    for piece in entry.pieces:
        crc, lowest, highest, of_piece = 0, math.inf, -math.inf, 0.0
        for data in _blocks(piece, entry.dtype.itemsize, sources):
            crc = crc32(data, crc)
            with np.errstate(all="ignore"):
                values = as_float64(data, entry.dtype, caster)
                lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
                found.numel += values.size
                found.zeros += int(values.size - np.count_nonzero(values))
                if not math.isfinite(lowest + highest):
                    found.nan += int(np.count_nonzero(np.isnan(values)))
                    found.infinite += int(np.count_nonzero(np.isinf(values)))
                    values = values[np.isfinite(values)]
                of_piece += float(np.dot(values, values))
                found.largest = max(found.largest, float(np.abs(values).max(initial=0.0)))
        squares += of_piece
        if piece.extent.nbytes >= SMALLEST_REPEAT_BYTES and lowest != highest:
            where = f"{entry.name} in {piece.extent.record.path.name}"
            places.setdefault((piece.extent.nbytes, crc, of_piece), []).append(where)
    found.norm = math.sqrt(squares)
    return found


def _blocks(piece: Piece, itemsize: int, sources: Sources) -> Iterator[memoryview]:
    """Yield the bytes of a piece in blocks; a non-contiguous one is read whole."""
    extent = piece.extent
    if piece.strides is not None:
        raw = memoryview(bytearray(extent.nbytes))
        sources.read_into(extent.record.path, extent.offset_bytes, raw)
        yield memoryview(gather_view(raw, piece, itemsize))
        return
    buffer = memoryview(bytearray(min(STEP_BYTES, extent.nbytes)))
    for start in range(0, extent.nbytes, STEP_BYTES):
        view = buffer[: min(STEP_BYTES, extent.nbytes - start)]
        sources.read_into(extent.record.path, extent.offset_bytes + start, view)
        yield view
