"""Divide an output among parts, by bytes.

The bytes of all tensors are taken as one line, in the order of the files. Each part gets one run of this line, so it
writes whole files and at most two that it shares. A file is cut at multiples of CUT_BYTES only, so that two machines
never write to one page of it: a client of NFS may write back the whole page, with what it had read of the other's
bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.computed import ComputedEntry
from dsconv.convert.destination import Destination, FileRange, FillingFile
from dsconv.convert.parts import Part
from dsconv.errors import UnsupportedError
from dsconv.text import quote

CUT_BYTES = 64 << 10  # the largest page that Linux has


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output, and the ranges of files that it fills, in the order of its bytes."""

    entry: TensorEntry
    target: Target
    ranges: tuple[FileRange, ...]

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.target.dtype.itemsize


@dataclass(frozen=True)
class FileShare:
    """What a part writes of a file.

    Attributes:
        filling: the file.
        nbytes: how many bytes of tensors.
        first: whether the first of them is among these; the part then writes the file's head too.
        whole: whether all of them are.
    """

    filling: FillingFile
    nbytes: int
    first: bool
    whole: bool


@dataclass(frozen=True)
class Share:
    """One part of an output.

    Attributes:
        nbytes: how many bytes of tensors it has.
        files: what it writes of each file.
        whole: the tensors that it writes as a whole.
        cut: (entry, target, first element, end) of the tensors of which it writes a run.
    """

    nbytes: int
    files: list[FileShare]
    whole: list[tuple[TensorEntry, Target]]
    cut: list[tuple[TensorEntry, Target, int, int]]


class Division:
    """An output, divided into parts. Every process that plans the same output divides it alike.

    Args:
        destination: the output. Its ``targets`` are asked for here.
        of: the number of parts.

    Attributes:
        files: all files, by name.
        tensors: all tensors, in the order of the files.
        cuts: where the parts begin, and the end, in bytes of tensors.

    Raises:
        UnsupportedError: a tensor of it has to be computed.
    """

    def __init__(self, destination: Destination, of: int) -> None:
        self.files = {file.name: FillingFile(file) for file in destination.files}
        self.tensors = list(_planned(destination, self.files))
        ends = list(accumulate(filling.file.data_bytes for filling in self.files.values()))
        self._begins = dict(zip(self.files, [0, *ends], strict=False))
        self._nbytes = ends[-1] if ends else 0
        self.cuts = [0, *self._cut(of), self._nbytes]

    def share(self, part: Part) -> Share:
        """Return what ``part`` writes."""
        low, high = self.cuts[part.number - 1], self.cuts[part.number]
        share = Share(high - low, [], [], [])
        for name, filling in self.files.items():
            begin, nbytes = self._begins[name], filling.file.data_bytes
            is_first = low <= begin < high or (begin == self._nbytes and part.number == part.of)
            mine = max(0, min(high, begin + nbytes) - max(low, begin))
            if mine or (is_first and not nbytes):
                share.files.append(FileShare(filling, mine, is_first, is_first and mine == nbytes))
        position = 0
        for tensor in self.tensors:
            begin, position = position, position + tensor.nbytes
            first, end = max(low, begin), min(high, position)
            if first >= end:
                continue
            if (first, end) == (begin, position):
                share.whole.append((tensor.entry, tensor.target))
            else:
                itemsize = tensor.target.dtype.itemsize
                share.cut.append((tensor.entry, tensor.target, (first - begin) // itemsize, (end - begin) // itemsize))
        return share

    def shared_files(self) -> list[FillingFile]:
        """Return the files that several parts write to."""
        found = []
        for name, filling in self.files.items():
            begin = self._begins[name]
            after = bisect_right(self.cuts, begin)
            if after < len(self.cuts) and self.cuts[after] < begin + filling.file.data_bytes:
                found.append(filling)
        return found

    def _cut(self, of: int) -> list[int]:
        """Return where each part but the first begins: at the first place that may be cut, from the even share on."""
        wanted = [self._nbytes * number // of for number in range(1, of)]
        cuts: list[int] = []
        position = 0
        for tensor in self.tensors:
            for filled in tensor.ranges:
                is_first = position == self._begins[filled.file.file.name]
                while len(cuts) < len(wanted) and wanted[len(cuts)] < position + filled.nbytes:
                    inside = max(0, wanted[len(cuts)] - position)
                    at = _cut_in(filled, inside, tensor.target.dtype.itemsize, is_first)
                    if at is None:
                        break
                    cuts.append(position + at)
                position += filled.nbytes
        return cuts + [self._nbytes] * (len(wanted) - len(cuts))


def _cut_in(filled: FileRange, inside: int, itemsize: int, is_first: bool) -> int | None:
    """Return the first place of a range, from ``inside`` on, at which its file may be cut; None if there is none."""
    if is_first and not inside:
        return 0  # between two files
    at = -(-(filled.offset_bytes + inside) // CUT_BYTES) * CUT_BYTES - filled.offset_bytes
    return at if at < filled.nbytes and at % itemsize == 0 else None


def _planned(destination: Destination, files: Mapping[str, FillingFile]) -> Iterator[PlannedTensor]:
    """Yield the tensors with the ranges that were asked for each. Raises UnsupportedError."""
    seen = dict.fromkeys(files, 0)
    ends: dict[str, int] = {}
    order = {name: number for number, name in enumerate(files)}
    last = 0
    for begins_in, entry, target in destination.targets(files):
        if isinstance(entry, ComputedEntry):
            raise UnsupportedError(
                f"{quote(entry.name)} is computed, and only tensors that are copied are divided among parts: leave out"
                " --part"
            )
        ranges: list[FileRange] = []
        for name in [span[0] for span in target.spans] or [begins_in]:
            ranges += files[name].ranges[seen[name] :]
            seen[name] = len(files[name].ranges)
        tensor = PlannedTensor(entry, target, tuple(ranges))
        for filled in ranges:
            name = filled.file.file.name
            if order[name] < last or filled.offset_bytes < ends.get(name, 0):
                raise _not_in_order(name)
            last, ends[name] = order[name], filled.offset_bytes + filled.nbytes
        if sum(filled.nbytes for filled in ranges) != tensor.nbytes:
            raise _not_in_order(begins_in)
        yield tensor
    for filling in files.values():
        if sum(filled.nbytes for filled in filling.ranges) != filling.file.data_bytes:
            raise _not_in_order(filling.file.name)


def _not_in_order(name: str) -> UnsupportedError:
    return UnsupportedError(f"{name}: a kind of output whose tensors are not in the order of its files has no parts")
