"""Output into a store (``s3://bucket/model``): whole or absent there too, in memory of a few blocks.

Shards go up from their first byte to their last, a few at once, and are not to be seen until all of them are complete
and every source record has passed its checksum. Then they are put in place, the file that makes the folder a model
last, as on the disk (``staging.py``). A run that is killed leaves nothing that looks like a model: on S3, parts of an
upload that was never completed, which a lifecycle rule clears away; elsewhere, files in ``.dsconv-partial/``, which the
next run removes. Two runs into one folder are not kept apart: stores have no locks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.tensors import Record
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.transfer.checksums import RunningChecksum, crc32
from dsconv.checkpoint.transfer.copy import (
    BLOCK_BYTES,
    Caster,
    CopyRun,
    CopyStats,
    Target,
    copies_of,
    one_torch_thread,
    source_checks,
)
from dsconv.checkpoint.transfer.reading import Sources, blocks, parts_of, read_flat_into
from dsconv.convert.plan import Placed, Plan, Shard
from dsconv.convert.staging import MOVING, STAGING
from dsconv.errors import OutputError

READ_ONLY = ("http", "https", "hf")
MAX_STREAMS = 4  # of shards at once: each holds a block, and about two parts of its upload


class Upload:
    """One run's output in the folder ``target`` of a store. Use ``open_upload``."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.store = target.tree.store
        self.writers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def url(self, name: str) -> str:
        return f"{self.target}/{name}"

    def send(
        self, plan: Plan, workers: int, hashed: bool, advance: Callable[[int], None]
    ) -> tuple[dict[str, int], dict[str, str], CopyStats]:
        """Send all shards; returns the CRC-32 of each tensor, the sha256 of each file if ``hashed``, and what was done.

        Raises RemoteError, and MalformedError where a source record fails its checksum.
        """
        targets = {t.name: Target(t.name, t.dtype, _nowhere, RunningChecksum(t.nbytes)) for t in plan.placed}
        checks, padding = source_checks(chain.from_iterable(copies_of(t.entry, targets[t.name]) for t in plan.placed))
        run = CopyRun(workers, checks)
        casts = any(t.dtype != t.entry.dtype for t in plan.placed)
        digests: dict[str, str] = {}

        def send_one(shard: Shard) -> None:
            digests[shard.filename] = self._send_shard(shard, targets, run, hashed, advance)

        with (
            one_torch_thread() if casts else contextlib.nullcontext(),
            ThreadPoolExecutor(min(workers, MAX_STREAMS)) as pool,
        ):
            try:
                for future in [pool.submit(send_one, shard) for shard in plan.shards]:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        run.run(padding)
        run.check_records()
        return {name: target.checksum.value for name, target in targets.items()}, digests if hashed else {}, run.stats

    def _send_shard(
        self, shard: Shard, targets: dict[str, Target], run: CopyRun, hashed: bool, advance: Callable[[int], None]
    ) -> str:
        writer = self.store.create(self.url(shard.filename), shard.nbytes)
        with self._lock:
            self.writers[shard.filename] = writer
        digest = hashlib.sha256()
        caster = Caster()
        with Sources() as sources:
            for data in chain(
                [memoryview(shard.header)], self._data_of(shard.tensors, targets, run, sources, caster, advance)
            ):
                if self._stop.is_set():
                    return ""
                writer.write(data)
                if hashed:
                    digest.update(data)
        writer.finish()
        return digest.hexdigest()

    def _data_of(
        self,
        tensors: Iterable[Placed],
        targets: dict[str, Target],
        run: CopyRun,
        sources: Sources,
        caster: Caster,
        advance: Any,
    ) -> Iterator[memoryview]:
        """The tensors' bytes as they are written, in blocks that are valid until the next one."""
        buffer = bytearray(BLOCK_BYTES)

        def seen(record: Record, offset_bytes: int, raw: memoryview) -> None:
            with self._lock:
                run.stats.bytes_read += len(raw)
            check = run.checks.get(record)
            if check is not None:
                check.add(offset_bytes - record.offset_bytes, len(raw), crc32(raw))

        for batch in _batches(tensors):
            parts = [
                part
                for t, start, numel in batch
                for part in parts_of(t.entry.pieces, t.entry.shape, start, start + numel)
            ]
            spans = [(part.piece.extent.record.path, *part.span(batch[0][0].entry.dtype.itemsize)) for part in parts]
            if len(spans) > 1 and is_remote(spans[0][0]):
                sources.read_ahead(spans)
            for t, start, numel in batch:
                entry, target = t.entry, targets[t.name]
                nbytes = numel * entry.dtype.itemsize
                data = memoryview(buffer if nbytes <= BLOCK_BYTES else bytearray(nbytes))[:nbytes]
                read_flat_into(entry, start, data, sources, entry.pieces, seen)
                if t.dtype != entry.dtype:
                    data, overflowed = caster.cast(data, entry.dtype, t.dtype)
                    if overflowed:
                        with self._lock:
                            run.stats.overflowed[t.name] = run.stats.overflowed.get(t.name, 0) + overflowed
                target.checksum.add(start * t.dtype.itemsize, len(data), crc32(data))
                yield data
                advance(len(data))

    def commit(
        self, small: dict[str, bytes], files: list[str], index: tuple[str, bytes] | None, obsolete: Iterable[str]
    ) -> None:
        """Take away ``obsolete``, then put all in place: what is small, the shards, and the index last."""
        moving, old = f"{STAGING}/{MOVING}", list(obsolete)
        parts = files if index is not None else files[:-1]  # the last one makes it an output
        self.store.write(self.url(moving), json.dumps([*old[1:], *small, *parts]).encode())
        for name in old:
            self.store.remove(self.url(name))
        for name, data in small.items():
            self.store.write(self.url(name), data)
        for name in files:
            self.writers[name].commit()
            del self.writers[name]
        if index is not None:
            self.store.write(self.url(index[0]), index[1])
        self.store.remove(self.url(moving))

    def withdraw(self, names: Iterable[str]) -> None:
        """Take away what was put in place."""
        for name in names:
            self.store.remove(self.url(name))


def _batches(tensors: Iterable[Placed]) -> Iterator[list[tuple[Placed, int, int]]]:
    """Runs (tensor, start, numel) of tensors in order, in lists of at most BLOCK_BYTES, of one element size."""
    batch: list[tuple[Placed, int, int]] = []
    filled = 0
    for t in tensors:
        entry = t.entry
        # A non-contiguous tensor is read whole, as everywhere: in blocks it would be read over and over.
        step = entry.nbytes if any(piece.strides is not None for piece in entry.pieces) else BLOCK_BYTES
        for start, numel in blocks(entry, step):
            nbytes = numel * entry.dtype.itemsize
            if batch and (filled + nbytes > BLOCK_BYTES or entry.dtype.itemsize != batch[0][0].entry.dtype.itemsize):
                yield batch
                batch, filled = [], 0
            batch.append((t, start, numel))
            filled += nbytes
    if batch:
        yield batch


def _nowhere(data: memoryview, offset_bytes: int) -> None:
    raise AssertionError("what goes to a store is not written at places")


@contextlib.contextmanager
def open_upload(target: Path) -> Iterator[Upload]:
    """An upload into a folder of a store; what was sent and not put in place is discarded at the end.

    Raises OutputError where the store cannot be written to.
    """
    protocol = str(target).partition("://")[0]
    if protocol in READ_ONLY:
        raise OutputError(
            f"{target}: {protocol}:// is read only here; write to a folder or an object store, and upload that"
        )
    upload = Upload(target)
    for leftover in (target / STAGING).iterdir():
        if leftover.name != MOVING:  # which says what to make of the files beside it, until this run replaces them
            upload.store.remove(str(leftover))
    try:
        yield upload
    finally:
        for writer in upload.writers.values():
            writer.discard()
