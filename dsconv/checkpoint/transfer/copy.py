"""The copy: the only place that moves tensor bytes from files to files.

A ``Copy`` says which bytes go where. Copies are sorted by where they lie on disk and cut into blocks; each of a few
workers reads a block with one positioned read, checks it, casts it if need be, and writes its parts with positioned
writes. Memory is workers × block, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.map.regions import runs
from dsconv.checkpoint.map.tensors import Piece, Record, TensorEntry
from dsconv.checkpoint.storage.local import is_remote, stat_signature
from dsconv.checkpoint.transfer.checksums import RunningChecksum, crc32
from dsconv.checkpoint.transfer.reading import Part, Sources, gather_view, parts_of
from dsconv.errors import MalformedError, OutputError

BLOCK_BYTES = 8 << 20  # what a worker holds, and what one request to a store asks for
LOCAL_BLOCK_BYTES = (
    1 << 20
)  # of a local file: read, checked and written while it is in the core's own cache (0.44 s, not 0.54)
# The page cache is filled in folios as large as a write allows, and where memory is fragmented the system first
# compacts it for the largest: 8 MB writes took 0.2 to 1.1 s for 1.4 GB here (Linux 6.18, ext4), 256 KB ones 0.22 to 0.3
# s.
WRITE_BYTES = 256 << 10
MAX_GAP_BYTES = 64 << 10  # bytes nobody wants that are read through rather than skipped, for one sequential read
MAX_DEFAULT_WORKERS = 8
SHORT_RUN = 16  # elements
CASTABLE = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class Target:
    """One output tensor: ``write`` puts bytes at an offset of it, ``checksum`` is that of what was written."""

    name: str
    dtype: DType
    write: Callable[[memoryview, int], None]
    checksum: RunningChecksum


@dataclass(frozen=True)
class Copy:
    """``nbytes`` bytes at ``offset_bytes`` of a record's file; without a target they are only checked.

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
        """(record, offset, bytes, whether each byte between is wanted) of what is read."""
        yield self.record, self.offset_bytes, self.nbytes, self.whole is None


@dataclass(frozen=True)
class Gather:
    """A run of a target, from its element ``start`` on, that is put together from parts of several regions."""

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
    def spans(self) -> Iterator[tuple[Record, int, int, bool]]:
        for part in self.parts:
            yield part.piece.extent.record, *part.span(self.source_dtype.itemsize), part.piece.strides is None


@dataclass
class CopyStats:
    """What a run did. ``overflowed`` counts, by tensor, finite values that became infinite in a cast."""

    bytes_read: int = 0
    bytes_written: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)


class CopyRun:
    """Runs copies with ``workers`` threads. ``checks`` are the running checksums of the source records, by record.

    ``stamps`` are those of ``Checkpoint``: they tell that a file without checksums has changed since it was opened.
    """

    def __init__(
        self,
        workers: int,
        checks: dict[Record, RunningChecksum],
        progress: Callable[[int], None] | None = None,
        stamps: Mapping[Path, object] | None = None,
    ) -> None:
        self.stamps = stamps or {}
        self.unchecked: set[Path] = set()
        self.workers = max(1, workers)
        self.checks = checks
        self.progress = progress
        self.stats = CopyStats()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def run(self, copies: Iterable[Copy | Gather], streamed: Iterable[Copy] = (), casts: bool = False) -> None:
        """Run all ``copies`` to the end, or raise the first error once every worker has stopped.

        ``streamed`` are run before them, in their order; with ``casts`` some of them change the dtype.
        """
        ordered = sorted(copies, key=lambda c: (str(c.path), c.offset_bytes))
        casts = casts or any(c.target is not None and c.target.dtype != c.source_dtype for c in ordered)
        with one_torch_thread() if casts else contextlib.nullcontext():
            self._run(chain(_blocks(streamed), _blocks(ordered)))

    def _run(self, pending: Iterator[list[Copy] | Gather]) -> None:
        threads = [threading.Thread(target=self._work, args=(pending,), daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop.set()
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error

    def check_records(self) -> None:
        """Raise MalformedError, naming it, if a record that was read to the end fails its CRC-32, or a file without
        one changed.
        """
        for record, check in self.checks.items():
            if record.crc32 is not None and check.complete and check.value != record.crc32:
                raise MalformedError(
                    f"{record.path}: record {record.name!r} fails its CRC-32 (expected {record.crc32:08x}, found"
                    f" {check.value:08x}): the file was damaged after it was saved, or written to while it was read."
                    " Restore it from another copy"
                )
        for path in sorted(self.unchecked):
            if stat_signature(path) != self.stamps.get(path, stat_signature(path)):
                raise MalformedError(
                    f"{path}: it was written to while it was read: run again when nothing writes there"
                )

    def _work(self, pending: Iterator[list[Copy]]) -> None:
        try:
            buffer = bytearray(BLOCK_BYTES)
            caster = Caster()
            with Sources() as sources:
                while not self._stop.is_set():
                    with self._lock:
                        block = next(pending, None)
                    if block is None:
                        return
                    if isinstance(block, Gather):
                        self._gather(block, memoryview(buffer), sources, caster)
                    else:
                        self._copy_block(block, memoryview(buffer), sources, caster)
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            with self._lock:
                self._error = self._error or error
            self._stop.set()

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
        itemsize = gather.source_dtype.itemsize
        nbytes = gather.numel * itemsize
        spans = list(gather.spans)
        wanted = nbytes + max(length for _, _, length, _ in spans)
        room = (
            buffer if wanted <= len(buffer) else memoryview(bytearray(wanted))
        )  # larger only for a non-contiguous piece
        block = room[:nbytes]
        for part, (record, offset, length, _) in zip(gather.parts, spans, strict=True):
            raw = room[nbytes : nbytes + length]
            sources.read_into(record.path, offset, raw)
            check = self.checks.get(record)
            if check is not None:
                check.add(offset - record.offset_bytes, length, crc32(raw))
            elif record.crc32 is None:
                self.unchecked.add(record.path)
            part.place(raw, block, gather.start, gather.shape, itemsize)
        written = self._write(gather.target, gather.source_dtype, gather.start, block, crc32(block), caster)
        self._count(sum(length for _, _, length, _ in spans), written)

    def _copy_view(self, copy: Copy, piece: Piece, sources: Sources, caster: Caster) -> None:
        """A non-contiguous tensor is read whole: its memory is the one exception to the block's bound."""
        assert copy.target is not None
        raw = memoryview(bytearray(copy.nbytes))
        sources.read_into(copy.record.path, copy.offset_bytes, raw)
        if copy.record.crc32 is None:
            self.unchecked.add(copy.record.path)
        data = memoryview(gather_view(raw, piece, copy.source_dtype.itemsize))
        step = BLOCK_BYTES // copy.source_dtype.itemsize * copy.source_dtype.itemsize
        written = 0
        for at in range(0, len(data), step):
            part = data[at : at + step]
            start = copy.start + at // copy.source_dtype.itemsize
            written += self._write(copy.target, copy.source_dtype, start, part, crc32(part), caster)
        self._count(copy.nbytes, written)

    def _write(self, target: Target, source: DType, start: int, data: memoryview, crc: int, caster: Caster) -> int:
        if target.dtype != source:
            data, overflowed = caster.cast(data, source, target.dtype)
            crc = crc32(data)
            if overflowed:
                with self._lock:
                    self.stats.overflowed[target.name] = self.stats.overflowed.get(target.name, 0) + overflowed
        offset = start * target.dtype.itemsize
        target.write(data, offset)
        target.checksum.add(offset, len(data), crc)
        return len(data)

    def _count(self, read: int, written: int) -> None:
        with self._lock:
            self.stats.bytes_read += read
            self.stats.bytes_written += written
        if self.progress is not None and written:
            self.progress(written)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads that start in here cast on one core each: every one of them would else use all cores at once."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Caster:
    """Casts blocks with torch, once and to nearest even, into a buffer of its own."""

    def __init__(self) -> None:
        self._out = bytearray()

    def cast(self, data: memoryview, source: DType, target: DType) -> tuple[memoryview, int]:
        """The cast bytes, valid until the next call, and how many finite values became infinite."""
        import torch

        numel = len(data) // source.itemsize
        if len(self._out) < numel * target.itemsize:
            self._out = bytearray(numel * target.itemsize)
        values = torch.frombuffer(data, dtype=getattr(torch, source.name))
        out = torch.frombuffer(self._out, dtype=getattr(torch, target.name), count=numel)
        out.copy_(values)
        overflowed = 0
        # The extremes tell whether a look at every element, which takes forty times as long, is worth it.
        if target.name in ("float16", "bfloat16") and not bool(
            torch.isfinite(torch.stack(torch.aminmax(values)).to(out.dtype)).all()
        ):
            overflowed = int((torch.isinf(out) & torch.isfinite(values)).sum())
        return memoryview(self._out)[: numel * target.itemsize], overflowed


def write_at(descriptor: int, base_bytes: int, data: memoryview, offset_bytes: int) -> None:
    """Write all of ``data``; a full disk or a failing one becomes OutputError."""
    while len(data):
        try:
            count = os.pwrite(descriptor, data[:WRITE_BYTES], base_bytes + offset_bytes)
        except OSError as error:
            raise OutputError(f"writing the output failed: {error.strerror}; nothing of it was kept") from None
        data, offset_bytes = data[count:], offset_bytes + count


def default_workers(ranks: int = 1) -> int:
    """One a core that this process may use, at most MAX_DEFAULT_WORKERS; of ``ranks`` that work on these cores, each
    its share.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_DEFAULT_WORKERS, max(1, cores // ranks))


def output_dtype(stored: DType, wanted: DType | None) -> DType:
    """What a tensor is written as: floats of 16 bits and more are cast when asked; integers, bools and fp8 never
    are.
    """
    return wanted if wanted is not None and stored.name in CASTABLE else stored


def _blocks(copies: Iterable[Copy | Gather]) -> Iterator[list[Copy] | Gather]:
    """Copies, sorted by place, joined into blocks of one file that one read of at most a block covers."""
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


def source_checks(copies: Iterable[Copy | Gather]) -> tuple[dict[Record, RunningChecksum], list[Copy]]:
    """Running checksums of the records that ``copies`` read, and the extra copies, of padding, that complete them.

    A record that is read twice in part, or through a non-contiguous view, is read once more in full for its checksum.
    """
    by_record: dict[Record, list[tuple[int, int]]] = {}
    scattered: set[Record] = set()
    for record, low, nbytes, wanted in chain.from_iterable(copy.spans for copy in copies):
        if record.crc32 is None:
            continue
        spans = by_record.setdefault(record, [])
        if not wanted:
            scattered.add(record)
        elif spans and spans[-1][1] == low:
            spans[-1] = (spans[-1][0], low + nbytes)
        else:
            spans.append((low, low + nbytes))
    raw = BY_NAME["uint8"]
    extra: list[Copy] = []
    for record, spans in by_record.items():
        spans.sort()
        begin, end = record.offset_bytes, record.offset_bytes + record.nbytes
        if record in scattered or any(a[1] > b[0] for a, b in pairwise(spans)):
            scattered.add(record)
            continue
        for low, high in zip([begin, *(high for _, high in spans)], [*(low for low, _ in spans), end], strict=True):
            if low < high:
                extra.append(Copy(record, low, high - low, raw))
    twins = [_twin(record) for record in scattered]
    checks = {r: RunningChecksum(r.nbytes) for r in (*by_record, *twins) if r not in scattered}
    return checks, extra + [Copy(twin, twin.offset_bytes, twin.nbytes, raw) for twin in twins]


def _twin(record: Record) -> Record:
    """The same record as a distinct key, whose checksum is fed by a read of its own."""
    return Record(record.path, record.offset_bytes, record.nbytes, record.crc32, record.name + " (whole)")


def copies_of(entry: TensorEntry, target: Target) -> Iterator[Copy | Gather]:
    """The copies that fill ``target`` from the pieces of its source."""
    pieces = entry.pieces
    if any(piece.region is not None for piece in pieces):
        yield from _gathers(entry, pieces, target)
        return
    for piece in pieces:
        whole = piece if piece.strides is not None else None
        yield Copy(
            piece.extent.record, piece.extent.offset_bytes, piece.extent.nbytes, entry.dtype, target, piece.start, whole
        )


def _gathers(entry: TensorEntry, pieces: tuple[Piece, ...], target: Target) -> Iterator[Gather]:
    """The target in runs, each with room for one part beside it in a block."""
    step = BLOCK_BYTES // 2 // entry.dtype.itemsize
    if min(runs(piece.region, entry.shape)[0] for piece in pieces if piece.region is not None) < SHORT_RUN:
        step //= 8  # the places of very short runs take more memory than the runs
    if any(piece.strides is not None for piece in pieces):
        step = entry.numel  # read once, in full
    step = max(1, step)
    for start in range(0, entry.numel, step):
        numel = min(step, entry.numel - start)
        yield Gather(
            tuple(parts_of(pieces, entry.shape, start, start + numel)), entry.dtype, target, entry.shape, start, numel
        )
