"""The copy: the only place that moves tensor bytes from files to files.

A ``Copy`` says which bytes go where. Copies are sorted by where they lie on disk and cut into blocks; each of a few
workers reads a block with one positioned read, checks it, casts it if need be, and hands its parts to their targets.
Memory is workers × block, whatever the size of the model. A target that takes its bytes only from the first to the
last, such as a file in a store, gets them by ``CopyRun.run_in_order``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.regions import runs
from dsconv.checkpoint.map.tensors import Piece, Record, TensorEntry
from dsconv.checkpoint.storage.local import is_remote, stat_signature
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.checksums import RunningChecksum, crc32
from dsconv.checkpoint.transfer.nonfinite import count_nonfinite, sample_nonfinite
from dsconv.checkpoint.transfer.pool import Jobs, run_jobs
from dsconv.checkpoint.transfer.reading import Part, Sources, gather_view, new_block, parts_of
from dsconv.errors import MalformedError
from dsconv.text import quote

BLOCK_BYTES = 8 << 20  # the size of a worker's block, and of one request to a store
# A block of a local file is read, checked and written while it is in the core's own cache (0.44 s, not 0.54).
LOCAL_BLOCK_BYTES = 1 << 20
MAX_GAP_BYTES = 64 << 10  # unwanted bytes that are read rather than skipped, for one sequential read
MAX_DEFAULT_WORKERS = 8
# Targets that are filled in order at once. Each holds a block, and in a store about two parts of its upload.
MAX_STREAMS = 4
SHORT_RUN = 16  # elements


@dataclass(frozen=True)
class Target:
    """One output tensor. ``write`` takes bytes of ``dtype``, their offset in the tensor, and their CRC-32.

    ``spans`` are (file, first element, end) of what lies in each file, in order, where there may be several files.
    """

    name: str
    dtype: DType
    write: Callable[[memoryview, int, int], None]
    spans: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Copy:
    """``nbytes`` bytes at ``offset_bytes`` of a record's file. Without a target they are only checked.

    ``start`` is the first element of the target that they fill.
    """

    record: Record
    offset_bytes: int
    nbytes: int
    source_dtype: DType
    target: Target | None = None
    start: int = 0
    whole: Piece | None = None  # a non-contiguous piece, which is gathered in one go

    @property
    def path(self) -> Path:
        return self.record.path

    @property
    def spans(self) -> Iterator[tuple[Record, int, int, bool]]:
        """Yield (record, offset, bytes, whether each byte between is wanted) of what is read."""
        dense = self.whole is None or is_dense(self.whole, self.source_dtype.itemsize)
        yield self.record, self.offset_bytes, self.nbytes, dense


@dataclass(frozen=True)
class Gather:
    """A run of a target, from its element ``start`` on, that is put together from parts of pieces."""

    parts: tuple[Part, ...]
    source_dtype: DType
    target: Target
    shape: tuple[int, ...]
    start: int
    numel: int

    @property
    def path(self) -> Path:
        return self.parts[0].piece.extent.record.path

    @property
    def offset_bytes(self) -> int:
        return self.parts[0].span(self.source_dtype.itemsize)[0]

    @property
    def nbytes(self) -> int:
        return self.numel * self.source_dtype.itemsize

    @property
    def spans(self) -> Iterator[tuple[Record, int, int, bool]]:
        """Yield (record, offset, bytes, whether each byte between is wanted) of what is read."""
        for part in self.parts:
            itemsize = self.source_dtype.itemsize
            yield part.piece.extent.record, *part.span(itemsize), is_dense(part.piece, itemsize)


@dataclass
class CopyStats:
    """What a run did.

    Attributes:
        bytes_read: The bytes that were read.
        bytes_written: The bytes that were written.
        overflowed: By tensor, how many finite values became infinite in a cast.
        nonfinite: By tensor, how many stored values were seen that are NaN or infinite: of a tensor that is cast, all
            of them; of one that is copied as it is, those of a sample (``nonfinite.py``).
    """

    bytes_read: int = 0
    bytes_written: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)


class CopyRun:
    """Runs copies in a pool of threads.

    Args:
        workers: the number of threads.
        checks: the running checksums of the source records, by record.
        progress: called from any thread with the number of bytes that were written.
        signatures: those of ``Checkpoint``. They tell that a file without checksums has changed since it was opened.
    """

    def __init__(
        self,
        workers: int,
        checks: dict[Record, RunningChecksum],
        progress: Callable[[int], None] | None = None,
        signatures: Mapping[Path, object] | None = None,
    ) -> None:
        self.signatures = signatures or {}
        self.unchecked: set[Path] = set()
        self.workers = max(1, workers)
        self.checks = checks
        self.progress = progress
        self.stats = CopyStats()
        self._lock = threading.Lock()

    def run(self, copies: Iterable[Copy | Gather], streamed: Iterable[Copy] = ()) -> None:
        """Run all ``copies`` to the end, in the order in which they lie on disk.

        Args:
            copies: any number of copies, in any order.
            streamed: copies that are run before them, in their own order.

        Raises:
            The first error, once every worker has stopped: MalformedError where a source cannot be read, and what
            the targets raise.
        """
        ordered = sorted(copies, key=lambda c: (str(c.path), c.offset_bytes))
        run_jobs(chain(_blocks(streamed), _blocks(ordered)), self._work, self.workers)

    def run_in_order(self, streams: Iterable[Iterable[Gather]]) -> None:
        """Run each of ``streams`` from its first run to its last; a few streams are run at once.

        Args:
            streams: the runs that fill one file each, in the order of the file.

        Raises:
            What ``run`` raises.
        """
        run_jobs(streams, self._work_in_order, min(self.workers, MAX_STREAMS))

    def check_records(self) -> None:
        """Check the records that were read to the end against their CRC-32, and that files without one did not change.

        Raises:
            MalformedError: names the record that fails, or the file that was written to.
        """
        for record, check in self.checks.items():
            if record.crc32 is not None and check.complete and check.value != record.crc32:
                raise MalformedError(
                    f"{record.path}: record {quote(record.name)} fails its CRC-32 (expected {record.crc32:08x}, found"
                    f" {check.value:08x}): the file was damaged after it was saved, or written to while it was read."
                    " Restore it from another copy"
                )
        for path in sorted(self.unchecked):
            now = stat_signature(path)
            if now is None:
                raise MalformedError(f"{path}: it was deleted while it was read")
            if now != self.signatures.get(path, now):
                raise MalformedError(
                    f"{path}: it was written to while it was read: run again when nothing writes to it"
                )

    def _work(self, jobs: Jobs[list[Copy] | Gather]) -> None:
        buffer = new_block(BLOCK_BYTES)
        caster = Caster()
        with Sources() as sources:
            for block in jobs:
                if isinstance(block, Gather):
                    self._gather(block, buffer, sources, caster)
                else:
                    self._copy_block(block, buffer, sources, caster)

    def _work_in_order(self, streams: Jobs[Iterable[Gather]]) -> None:
        buffer = new_block(BLOCK_BYTES)
        caster = Caster()
        with Sources() as sources:
            for batch in chain.from_iterable(map(_batches, streams)):
                spans = [(record.path, at, nbytes) for gather in batch for record, at, nbytes, _ in gather.spans]
                if len(spans) > 1 and is_remote(spans[0][0]):
                    sources.read_ahead(spans)
                for gather in batch:
                    if streams.stopped:
                        return
                    self._gather(gather, buffer, sources, caster)

    def _copy_block(self, block: list[Copy], buffer: memoryview, sources: Sources, caster: Caster) -> None:
        first = block[0]
        if first.whole is not None:
            self._copy_view(first, first.whole, sources, caster)
            return
        base = first.offset_bytes
        span = block[-1].offset_bytes + block[-1].nbytes - base
        view = buffer[:span]
        sources.read_into(first.record.path, base, view)
        written = 0
        for copy in block:
            data = view[copy.offset_bytes - base : copy.offset_bytes - base + copy.nbytes]
            crc = crc32(data)
            check = self.checks.get(copy.record)
            if check is not None:
                check.add(copy.offset_bytes - copy.record.offset_bytes, copy.nbytes, crc)
            elif copy.record.crc32 is None:
                self.unchecked.add(copy.record.path)
            if copy.target is not None:
                written += self._write(copy.target, copy.source_dtype, copy.start, data, crc, caster)
        self._count(span, written)

    def _gather(self, gather: Gather, buffer: memoryview, sources: Sources, caster: Caster) -> None:
        """Read each part once, check it, and put it in its places of the block, which is then written as one."""
        itemsize, nbytes = gather.source_dtype.itemsize, gather.nbytes
        spans = list(gather.spans)
        wanted = nbytes + max(
            (length for part, (_, _, length, _) in zip(gather.parts, spans, strict=True) if not part.in_place),
            default=0,
        )
        # Larger only for a non-contiguous piece.
        room = buffer if wanted <= len(buffer) else memoryview(bytearray(wanted))
        block = room[:nbytes]
        for part, (record, offset, length, _) in zip(gather.parts, spans, strict=True):
            begin = (part.first - gather.start) * itemsize if part.in_place else nbytes
            raw = room[begin : begin + length]
            sources.read_into(record.path, offset, raw)
            check = self.checks.get(record)
            if check is not None:
                check.add(offset - record.offset_bytes, length, crc32(raw))
            elif record.crc32 is None:
                self.unchecked.add(record.path)
            if not part.in_place:
                part.place(raw, block, gather.start, gather.shape, itemsize)
        written = self._write(gather.target, gather.source_dtype, gather.start, block, crc32(block), caster)
        self._count(sum(length for _, _, length, _ in spans), written)

    def _copy_view(self, copy: Copy, piece: Piece, sources: Sources, caster: Caster) -> None:
        """Copy a non-contiguous piece. It is read whole: its memory is the one exception to the block's bound."""
        raw = memoryview(bytearray(copy.nbytes))
        sources.read_into(copy.record.path, copy.offset_bytes, raw)
        check = self.checks.get(copy.record)
        if check is not None:
            check.add(copy.offset_bytes - copy.record.offset_bytes, copy.nbytes, crc32(raw))
        elif copy.record.crc32 is None:
            self.unchecked.add(copy.record.path)
        data = memoryview(gather_view(raw, piece, copy.source_dtype.itemsize))
        step = BLOCK_BYTES // copy.source_dtype.itemsize * copy.source_dtype.itemsize
        written = 0
        for at in range(0, len(data), step):
            part = data[at : at + step]
            start = copy.start + at // copy.source_dtype.itemsize
            if copy.target is not None:
                written += self._write(copy.target, copy.source_dtype, start, part, crc32(part), caster)
        self._count(copy.nbytes, written)

    def _write(self, target: Target, source: DType, start: int, data: memoryview, crc: int, caster: Caster) -> int:
        cast = target.dtype != source
        if nonfinite := count_nonfinite(data, source) if cast else sample_nonfinite(data, source):
            with self._lock:
                self.stats.nonfinite[target.name] = self.stats.nonfinite.get(target.name, 0) + nonfinite
        if cast:
            data, overflowed = caster.cast(data, source, target.dtype)
            crc = crc32(data)
            if overflowed:
                with self._lock:
                    self.stats.overflowed[target.name] = self.stats.overflowed.get(target.name, 0) + overflowed
        target.write(data, start * target.dtype.itemsize, crc)
        return len(data)

    def _count(self, read: int, written: int) -> None:
        with self._lock:
            self.stats.bytes_read += read
            self.stats.bytes_written += written
        if self.progress is not None and written:
            self.progress(written)


def default_workers(ranks: int = 1) -> int:
    """Return one thread per core that this process may use, at most MAX_DEFAULT_WORKERS.

    Args:
        ranks: how many processes work on these cores. Each gets its share.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_DEFAULT_WORKERS, max(1, cores // ranks))


def _blocks(copies: Iterable[Copy | Gather]) -> Iterator[list[Copy] | Gather]:
    """Join copies, sorted by place, into blocks of one file that one read of at most a block covers."""
    block: list[Copy] = []
    for whole in copies:
        if isinstance(whole, Gather):
            yield whole
            continue
        for copy in _cut(whole):
            if block:
                base = block[0].offset_bytes
                end = max(block[-1].offset_bytes + block[-1].nbytes, base)
                near = (
                    copy.whole is None
                    and block[0].whole is None
                    and copy.record.path == block[0].record.path
                    and end <= copy.offset_bytes <= end + MAX_GAP_BYTES
                    and copy.offset_bytes + copy.nbytes - base <= _block_bytes(copy.path)
                )
                if not near:
                    yield block
                    block = []
            block.append(copy)
    if block:
        yield block


def _batches(stream: Iterable[Gather]) -> Iterator[list[Gather]]:
    """Divide a stream into lists of at most a block in all, whose bytes a store may be asked for at once."""
    batch: list[Gather] = []
    filled = 0
    for gather in stream:
        if batch and filled + gather.nbytes > BLOCK_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(gather)
        filled += gather.nbytes
    if batch:
        yield batch


def _block_bytes(path: Path) -> int:
    return BLOCK_BYTES if is_remote(path) else min(BLOCK_BYTES, LOCAL_BLOCK_BYTES)


def _cut(copy: Copy) -> Iterator[Copy]:
    limit = _block_bytes(copy.path)
    if copy.whole is not None or copy.nbytes <= limit:
        yield copy
        return
    itemsize = copy.source_dtype.itemsize
    step = limit // itemsize * itemsize
    for at in range(0, copy.nbytes, step):
        yield Copy(
            copy.record,
            copy.offset_bytes + at,
            min(step, copy.nbytes - at),
            copy.source_dtype,
            copy.target,
            copy.start + at // itemsize,
        )


def is_dense(piece: Piece, itemsize: int) -> bool:
    """Return whether each byte of the piece's extent is an element's: always, but for views that leave some out."""
    return piece.strides is None or piece.extent.nbytes == piece.numel * itemsize


def copies_of(entry: TensorEntry, target: Target) -> Iterator[Copy | Gather]:
    """Yield the copies that fill ``target`` from the pieces of its source, in any order."""
    pieces = entry.pieces
    if any(piece.region is not None for piece in pieces):
        yield from runs_of(entry, target)
        return
    for piece in pieces:
        whole = piece if piece.strides is not None else None
        yield Copy(
            piece.extent.record, piece.extent.offset_bytes, piece.extent.nbytes, entry.dtype, target, piece.start, whole
        )


def runs_of(entry: TensorEntry, target: Target, first: int = 0, end: int | None = None) -> Iterator[Gather]:
    """Yield the runs that fill ``target`` from its element ``first`` to ``end``, each of at most a block.

    Where pieces fill regions, a run leaves room in the block for one part beside it.
    """
    end = entry.numel if end is None else end
    pieces = entry.pieces
    step = BLOCK_BYTES // entry.dtype.itemsize
    regions = [piece.region for piece in pieces if piece.region is not None]
    if regions:
        step //= 2
        if min(runs(region, entry.shape)[0] for region in regions) < SHORT_RUN:
            step //= 8  # the places of very short runs take more memory than the runs
    if any(piece.strides is not None for piece in pieces):
        if not regions:  # each is read once, in full
            for part in parts_of(pieces, entry.shape, first, end):
                yield Gather((part,), entry.dtype, target, entry.shape, part.first, part.numel)
            return
        step = entry.numel
    step = max(1, step)
    for start in range(first, end, step):
        numel = min(step, end - start)
        yield Gather(
            tuple(parts_of(pieces, entry.shape, start, start + numel)), entry.dtype, target, entry.shape, start, numel
        )
