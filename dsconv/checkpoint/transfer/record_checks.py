"""Decide which checksums of records a copy computes, and which extra bytes it reads to complete them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, pairwise

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Record
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import Copy, Gather


def source_checks(copies: Iterable[Copy | Gather]) -> tuple[dict[Record, RunningChecksum], list[Copy]]:
    """Make the running checksums of the records that ``copies`` read.

    A record that is read twice in part, or through a non-contiguous view, is read again in full for its checksum.

    Returns:
        The checksums by record, and the extra copies, mostly of padding, that complete them.
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
    """Return the same record as a distinct key, whose checksum is fed by a read of its own."""
    return Record(record.path, record.offset_bytes, record.nbytes, record.crc32, record.name + " (whole)")
