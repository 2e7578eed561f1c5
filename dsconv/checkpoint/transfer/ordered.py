"""Make copies while they run, file by file, for layouts with so many pieces that a list would not fit in memory.

A list can be sorted by place and searched for gaps between the pieces. Here the layout knows both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.map.tensors import FileGroup, ProvenLayout, Record, TensorEntry
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import Copy, CopyRun, Gather, Target, copies_of
from dsconv.checkpoint.transfer.record_checks import share_checks, source_checks


@dataclass(frozen=True)
class Stream:
    """Tensors that lie in the same files, in the order in which they lie in each."""

    group: FileGroup
    members: Sequence[tuple[ProvenLayout, DType, Target]]

    def checks(self) -> dict[Record, RunningChecksum]:
        """Make the running checksums of the files' records, which ``copies`` complete."""
        records = (record for number in range(self.group.file_count) for record in self.group.records(number))
        return {record: RunningChecksum(record.nbytes) for record in records if record.crc32 is not None}

    def wanted(self) -> Iterator[Copy]:
        """Yield copies of the tensors' bytes alone, one file after the other."""
        for number in range(self.group.file_count):
            for layout, dtype, target in self.members:
                for piece in layout.pieces_in(number):
                    yield Copy(
                        piece.extent.record, piece.extent.offset_bytes, piece.extent.nbytes, dtype, target, piece.start
                    )

    def copies(self) -> Iterator[Copy]:
        """Yield copies of all of each file's records, one file after the other.

        Bytes that no tensor wants are read too, since a checksum covers a whole record.
        """
        raw = BY_NAME["uint8"]
        for number in range(self.group.file_count):
            ends = {record: record.offset_bytes for record in self.group.records(number)}
            for layout, dtype, target in self.members:
                for piece in layout.pieces_in(number):
                    record, at = piece.extent.record, piece.extent.offset_bytes
                    if ends[record] < at and record.crc32 is not None:
                        yield Copy(record, ends[record], at - ends[record], raw)
                    yield Copy(record, at, piece.extent.nbytes, dtype, target, piece.start)
                    ends[record] = at + piece.extent.nbytes
            for record, at in ends.items():
                if at < record.offset_bytes + record.nbytes and record.crc32 is not None:
                    yield Copy(record, at, record.offset_bytes + record.nbytes - at, raw)


def run_all(pairs: Iterable[tuple[TensorEntry, Target]], run: CopyRun) -> None:
    """Fill each target from its tensor, and check the source records on the way.

    Raises:
        What ``CopyRun.run`` and ``CopyRun.check_records`` raise.
    """
    streams, others = _grouped(pairs)
    copies = [copy for entry, target in others for copy in copies_of(entry, target)]
    checks, padding = source_checks(copies)
    run.checks.update(checks)
    for stream in streams:
        run.checks.update(stream.checks())
    run.run([*copies, *padding], (copy for stream in streams for copy in stream.copies()))
    run.check_records()


def run_share(whole: Iterable[tuple[TensorEntry, Target]], cut: Iterable[Gather], run: CopyRun) -> set[Record]:
    """Fill what is one process's share of several targets, and of others a run. Other processes read the other bytes.

    Args:
        whole: the targets that are filled from their first byte to their last.
        cut: runs of others.
        run: its ``checks`` then hold what was read of each record.

    Returns:
        The records that were read in a way that gives no checksum.

    Raises:
        What ``CopyRun.run`` and ``CopyRun.check_records`` raise.
    """
    streams, others = _grouped(whole)
    copies = [*cut, *(copy for entry, target in others for copy in copies_of(entry, target))]
    checks, scattered = share_checks(copies)
    run.checks.update(checks)
    for stream in streams:
        for record, check in stream.checks().items():
            run.checks.setdefault(record, check)
    run.run(copies, (copy for stream in streams for copy in stream.wanted()))
    run.check_records()
    return scattered


def _grouped(pairs: Iterable[tuple[TensorEntry, Target]]) -> tuple[list[Stream], list[tuple[TensorEntry, Target]]]:
    """Return those whose layouts have files of their own, as a stream for each group of files, and the others."""
    grouped: dict[FileGroup, list[tuple[ProvenLayout, DType, Target]]] = {}
    others: list[tuple[TensorEntry, Target]] = []
    for entry, target in pairs:
        layout = entry.layout
        if isinstance(layout, ProvenLayout) and layout.group is not None:
            grouped.setdefault(layout.group, []).append((layout, entry.dtype, target))
        else:
            others.append((entry, target))
    streams = [Stream(group, sorted(members, key=lambda member: member[0].begin)) for group, members in grouped.items()]
    return streams, others
