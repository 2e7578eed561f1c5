"""Fill memory from a checkpoint: any part of any tensor. Each wanted byte is read once, and nothing else is read.

A ``Slot`` says which part of a tensor goes where in memory, as a range of a region, just as a ``Piece`` does for a
file. Where a slot and a piece meet, their common elements form runs that lie together on both sides; each run is one
positioned read, straight into the slot's memory, or through a block where it is cast or where runs are too short to be
read one by one.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.patches import Patch, single_rows
from dsconv.checkpoint.map.regions import UNITS, Region, intersect, put_runs, shape_of, width
from dsconv.checkpoint.map.tensors import Piece
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES, default_workers
from dsconv.checkpoint.transfer.pool import Jobs, run_jobs
from dsconv.checkpoint.transfer.reading import Sources, gather_view

SHORT_RUN_BYTES = 512  # a separate read of fewer bytes costs more than reading on to the next run


@dataclass(frozen=True)
class Slot:
    """Memory for elements [start, start + numel) of ``region`` (None: all) of a tensor of ``shape``, of ``dtype``.

    ``write`` takes bytes of ``dtype`` and the offset, in bytes of the slot, where they go; ``view`` is the slot's
    memory itself, where it can be read into directly.
    """

    shape: tuple[int, ...]
    dtype: DType
    start: int
    numel: int
    write: Callable[[memoryview, int], None]
    view: memoryview | None = None
    region: Region | None = None


@dataclass(frozen=True)
class Reads:
    """Runs of ``run`` elements of a piece: ``sources`` and ``targets`` are their places in the piece and in the
    slot.
    """

    piece: Piece
    dtype: DType
    slot: Slot
    run: int
    sources: Any
    targets: Any

    @property
    def nbytes(self) -> int:
        return self.run * len(self.sources) * self.dtype.itemsize


def reads_of(patches: Iterable[Patch], slot: Slot) -> Iterator[Reads]:
    """Yield what must be read to fill a slot of the tensor that the patches make."""
    if not slot.numel:
        return
    for patch in (simple for grouped in patches for simple in single_rows(grouped)):
        wanted = slot.region or tuple(((0, size),) if size else () for size in slot.shape)
        inside = intersect(wanted, tuple(((a, a + n),) for a, n in zip(patch.at, patch.sizes, strict=True)))
        if not all(inside) and slot.shape:
            continue
        for piece in patch.entry.pieces:
            yield from _meet(patch, piece, slot, wanted, inside)


def _meet(patch: Patch, piece: Piece, slot: Slot, wanted: Region, inside: Region) -> Iterator[Reads]:
    """Yield the runs that a piece of the patch's entry and the slot share."""
    import numpy as np

    shape = patch.entry.shape
    held = piece.region or tuple(((0, size),) for size in shape)
    # The common region in the entry's dimensions; those that the entry lacks have one index.
    shifts = {k: patch.at[d] - patch.source[k] for d, k in enumerate(patch.dims) if k is not None}
    dims = {k: d for d, k in enumerate(patch.dims) if k is not None}
    moved = tuple(
        tuple((a - shifts[k], b - shifts[k]) for a, b in inside[dims[k]])
        if k in dims
        else ((patch.source[k], patch.source[k] + 1),)
        for k in range(len(shape))
    )
    common = intersect(held, moved)
    if not all(common) and shape:
        return
    run = 1
    sources = targets = np.zeros(1, dtype=np.int64)
    held_stride = 1
    target_strides = _strides(shape_of(wanted))
    joined = True  # whether the dimensions so far are one run on both sides
    for k in range(len(shape) - 1, -1, -1):
        if k not in dims:  # one index of a dimension that the target lacks
            sources = sources + int(_ranks(held[k], np.array([patch.source[k]]))[0]) * held_stride
            held_stride *= width(held[k])
            continue
        d = dims[k]
        intervals, step = common[k], target_strides[d]
        unit = 1
        if joined:
            unit = math.gcd(*(b - a for a, b in intervals))
            joined = unit == width(held[k]) == width(wanted[d])
            if step != held_stride:  # a dimension of the target lies between
                unit, joined = 1, False
            run *= unit
        index = np.concatenate([np.arange(a, b, unit, dtype=np.int64) for a, b in intervals])
        sources = (_ranks(held[k], index) * held_stride)[:, None] + sources[None, :]
        targets = (_ranks(wanted[d], index + shifts[k]) * step)[:, None] + targets[None, :]
        sources, targets = sources.reshape(-1), targets.reshape(-1)
        held_stride *= width(held[k])
    for d, own in enumerate(patch.dims):
        if own is None:
            targets = targets + int(_ranks(wanted[d], np.array([patch.at[d]]))[0]) * target_strides[d]
    yield from _windowed(piece, patch.entry.dtype, slot, run, sources - piece.start, targets - slot.start)


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return strides


def _ranks(intervals: tuple[tuple[int, int], ...], index: Any) -> Any:
    """Return the place of each index among those that the intervals hold."""
    import numpy as np

    starts = np.array([a for a, _ in intervals], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum([b - a for a, b in intervals])[:-1]]).astype(np.int64)
    which = np.searchsorted(starts, index, side="right") - 1
    return before[which] + index - starts[which]


def _windowed(piece: Piece, dtype: DType, slot: Slot, run: int, sources: Any, targets: Any) -> Iterator[Reads]:
    """Cut runs to what the piece holds and the slot wants, and join runs that lie together on both sides."""
    import numpy as np

    low = np.maximum(0, np.maximum(-sources, -targets))
    high = np.minimum(run, np.minimum(piece.numel - sources, slot.numel - targets))
    full = (low == 0) & (high == run)
    for i in np.flatnonzero(~full & (low < high)):  # at most two at each end
        yield Reads(piece, dtype, slot, int(high[i] - low[i]), sources[i : i + 1] + low[i], targets[i : i + 1] + low[i])
    sources, targets = sources[full], targets[full]
    if len(sources) > 1 and bool((np.diff(sources) == run).all() and (np.diff(targets) == run).all()):
        yield Reads(piece, dtype, slot, run * len(sources), sources[:1], targets[:1])
    elif len(sources):
        yield Reads(piece, dtype, slot, run, sources, targets)


class Filling:
    """Carry out reads in a pool of threads. ``overflowed`` counts finite values that became infinite in a cast.

    Args:
        workers: the number of threads (default: this rank's share of the cores).
        progress: called from any thread with the number of bytes that were filled.
        buffer: makes the memory that blocks pass through, of a number of bytes.
    """

    def __init__(
        self,
        workers: int | None = None,
        progress: Callable[[int], None] | None = None,
        buffer: Callable[[int], Any] = bytearray,
    ) -> None:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
        self.workers = workers or default_workers(int(ranks) if ranks.isdecimal() and int(ranks) else 1)
        self.progress = progress
        self.buffer = buffer
        self.bytes_read = 0
        self.overflowed = 0
        self._lock = threading.Lock()

    def run(self, reads: Iterable[Reads]) -> None:
        """Fill all slots.

        Raises:
            The first error, once every worker has stopped: MalformedError where a source cannot be read.
        """
        ordered = sorted(
            reads, key=lambda r: (str(r.piece.extent.record.path), r.piece.extent.offset_bytes + int(r.sources[0]))
        )
        run_jobs((job for read in ordered for job in _jobs(read)), self._work, self.workers)

    def _work(self, jobs: Jobs[Reads]) -> None:
        room = memoryview(self.buffer(BLOCK_BYTES))
        caster = Caster()
        with Sources() as sources:
            for job in jobs:
                read, overflowed = _carry_out(job, sources, room, caster)
                with self._lock:
                    self.bytes_read += read
                    self.overflowed += overflowed
                if self.progress is not None:
                    self.progress(job.nbytes)


def _jobs(reads: Reads) -> Iterator[Reads]:
    """Yield the same reads in parts of at most a block."""
    room = max(1, BLOCK_BYTES // reads.dtype.itemsize)
    if reads.run > room:
        for source, target in zip(reads.sources, reads.targets, strict=True):
            for at in range(0, reads.run, room):
                step = min(room, reads.run - at)
                yield replace(reads, run=step, sources=source[None] + at, targets=target[None] + at)
        return
    step = room // reads.run
    for at in range(0, len(reads.sources), step):
        yield replace(reads, sources=reads.sources[at : at + step], targets=reads.targets[at : at + step])


def _carry_out(job: Reads, sources: Sources, room: memoryview, caster: Caster) -> tuple[int, int]:
    """Do one job of at most one block. Returns the number of bytes read, and of values that overflowed."""
    slot, itemsize, run_bytes = job.slot, job.dtype.itemsize, job.run * job.dtype.itemsize
    direct = slot.dtype == job.dtype and job.piece.strides is None
    if slot.view is not None and direct and (run_bytes >= SHORT_RUN_BYTES or len(job.sources) == 1):
        path, base = job.piece.extent.record.path, job.piece.extent.offset_bytes
        offsets, places = (base + job.sources * itemsize).tolist(), (job.targets * itemsize).tolist()
        if len(offsets) == 1:
            sources.read_into(path, offsets[0], slot.view[places[0] : places[0] + run_bytes])
        else:
            sources.read_runs(path, offsets, run_bytes, slot.view, places)
        return job.nbytes, 0
    data, read = _collect(job, sources, room)
    overflowed = 0
    if slot.dtype != job.dtype:
        data, overflowed = caster.cast(data, job.dtype, slot.dtype)
    _deliver(job, data)
    return read, overflowed


def _collect(job: Reads, sources: Sources, room: memoryview) -> tuple[memoryview, int]:
    """Return the job's elements, run after run, and the number of bytes that were read for them."""
    import numpy as np

    extent, itemsize = job.piece.extent, job.dtype.itemsize
    run_bytes = job.run * itemsize
    path = extent.record.path
    # Saved as a non-contiguous view: read whole, the one exception to the block's bound.
    if job.piece.strides is not None:
        raw = memoryview(bytearray(extent.nbytes))
        sources.read_into(path, extent.offset_bytes, raw)
        return _pick(gather_view(raw, job.piece, itemsize), 0, job, room), extent.nbytes
    if run_bytes < SHORT_RUN_BYTES and len(job.sources) > 1:
        low, high = int(job.sources.min()), int(job.sources.max()) + job.run
        if (high - low) * itemsize <= 8 * job.nbytes:  # so dense that one read with the gaps is less work
            raw = memoryview(bytearray((high - low) * itemsize))
            sources.read_into(path, extent.offset_bytes + low * itemsize, raw)
            return _pick(raw, low, job, room), len(raw)
    data = room[: job.nbytes]
    if len(job.sources) > 1 and bool((np.diff(job.sources) == job.run).all()):
        sources.read_into(path, extent.offset_bytes + int(job.sources[0]) * itemsize, data)
        return data, job.nbytes
    offsets = (extent.offset_bytes + job.sources * itemsize).tolist()
    sources.read_runs(path, offsets, run_bytes, data, range(0, job.nbytes, run_bytes))
    return data, job.nbytes


def _pick(raw: Any, low: int, job: Reads, room: memoryview) -> memoryview:
    """Return the runs out of ``raw``, the piece's elements from ``low`` on."""
    import numpy as np

    values = np.frombuffer(raw, dtype=UNITS[job.dtype.itemsize])
    data = room[: job.nbytes]
    out = np.frombuffer(data, dtype=values.dtype).reshape(-1, job.run)
    np.take(values, (job.sources - low)[:, None] + np.arange(job.run), out=out)
    return data


def _deliver(job: Reads, data: memoryview) -> None:
    """Put the runs of ``data``, in the slot's dtype, where they belong."""
    import numpy as np

    slot, itemsize = job.slot, job.slot.dtype.itemsize
    run_bytes = job.run * itemsize
    if len(job.targets) == 1 or bool((np.diff(job.targets) == job.run).all()):
        slot.write(data, int(job.targets[0]) * itemsize)
    elif slot.view is not None:
        out = np.frombuffer(slot.view, dtype=UNITS[itemsize])
        put_runs(out, job.targets, np.frombuffer(data, dtype=out.dtype).reshape(-1, job.run))
    else:
        for number, target in enumerate(job.targets.tolist()):
            slot.write(data[number * run_bytes : (number + 1) * run_bytes], target * itemsize)
