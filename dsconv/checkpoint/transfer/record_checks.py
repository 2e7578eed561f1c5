"""Decide which checksums of records a copy computes, and which extra bytes it reads to complete them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Record
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import Copy, Gather

RAW = BY_NAME["uint8"]

Fragments = list[tuple[int, int, int]]  # (first byte, end, CRC-32), counted from the start of a record


def source_checks(copies: Iterable[Copy | Gather]) -> tuple[dict[Record, RunningChecksum], list[Copy]]:
    """Make the running checksums of the records that ``copies`` read.

    A record that is read twice in part, or through a non-contiguous view, is read again in full for its checksum.

    Returns:
        The checksums by record, and the extra copies, mostly of padding, that complete them.
    """
    by_record, scattered = _spans(copies)
    extra = [copy for record, spans in by_record.items() if record not in scattered for copy in _between(record, spans)]
    return _with_twins((r for r in by_record if r not in scattered), extra, scattered)


def share_checks(copies: Iterable[Copy | Gather]) -> tuple[dict[Record, RunningChecksum], set[Record]]:
    """Make the running checksums of the records of which ``copies`` read a part. Others read the rest.

    Returns:
        The checksums by record, and the records that are read twice in part, or through a non-contiguous view: they
        have none.
    """
    by_record, scattered = _spans(copies)
    return {record: RunningChecksum(record.nbytes) for record in by_record if record not in scattered}, scattered


def joined_checks(
    fragments: Mapping[Record, list[Fragments | None]],
) -> tuple[dict[Record, RunningChecksum], list[Copy]]:
    """Join what several processes read of each record.

    Args:
        fragments: what each of them read of a record; None where it read in a way that gives no checksum.

    Returns:
        The checksums by record, and the copies that complete them: of what nobody read, and of whole records that were
        read twice in part.
    """
    checks: dict[Record, RunningChecksum] = {}
    extra: list[Copy] = []
    scattered: set[Record] = set()
    for record, found in fragments.items():
        joined = sorted(fragment for part in found if part is not None for fragment in part)
        if None in found or any(a[1] > b[0] for a, b in pairwise(joined)):
            scattered.add(record)
            continue
        check = checks[record] = RunningChecksum(record.nbytes)
        for start, end, crc in joined:
            check.add(start, end - start, crc)
        at = record.offset_bytes
        extra += _between(record, [(at + start, at + end) for start, end, _ in joined])
    twins, whole = _with_twins((), extra, scattered)
    return {**checks, **twins}, whole


def _spans(copies: Iterable[Copy | Gather]) -> tuple[dict[Record, list[tuple[int, int]]], set[Record]]:
    """Return the sorted spans that are read of each record with a checksum, and the records that are read oddly."""
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
    for record, spans in by_record.items():
        spans.sort()
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            scattered.add(record)
    return by_record, scattered


def _between(record: Record, spans: list[tuple[int, int]]) -> Iterator[Copy]:
    """Yield copies of what of a record is not in ``spans``, which are sorted."""
    begin, end = record.offset_bytes, record.offset_bytes + record.nbytes
    for low, high in zip([begin, *(high for _, high in spans)], [*(low for low, _ in spans), end], strict=True):
        if low < high:
            yield Copy(record, low, high - low, RAW)


def _with_twins(
    records: Iterable[Record], extra: list[Copy], scattered: Iterable[Record]
) -> tuple[dict[Record, RunningChecksum], list[Copy]]:
    twins = [_twin(record) for record in scattered]
    checks = {record: RunningChecksum(record.nbytes) for record in (*records, *twins)}
    return checks, extra + [Copy(twin, twin.offset_bytes, twin.nbytes, RAW) for twin in twins]


def _twin(record: Record) -> Record:
    """Return the same record as a distinct key, whose checksum is fed by a read of its own."""
    return Record(record.path, record.offset_bytes, record.nbytes, record.crc32, record.name + " (whole)")
