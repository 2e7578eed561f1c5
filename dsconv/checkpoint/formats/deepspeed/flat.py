"""Flat tensors laid end to end, and which parts of them a parameter is: the layouts of ZeRO."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Extent, Piece, ProvenLayout, Record, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous
from dsconv.errors import InconsistentCheckpointError, MalformedError
from dsconv.text import count, quote


def flat_pieces(
    files: Sequence[TorchFile], parts: Sequence[TensorRef], starts: Sequence[int], begin: int, numel: int
) -> tuple[Piece, ...]:
    """Stage 1/2: elements [begin, begin + numel) of the parts laid end to end, each cut or not where the next one
    begins.

    ``starts`` are the positions of the masters' parts and their end. The optimizer's other states lie as the masters
    do, but keep the padding that masters are saved without (DeepSpeed ``stage_1_and_2.py`` ``state_dict``).
    """
    pieces = []
    rank = bisect_right(starts, begin) - 1
    position = begin
    while position < begin + numel:
        stop = min(begin + numel, starts[rank + 1])
        if stop > position:
            extent = files[rank].extent(parts[rank], position - starts[rank], stop - position)
            pieces.append(Piece(extent, position - begin, stop - position))
            position = stop
        rank += 1
    return tuple(pieces)


class RankFlats:
    """Stage 3: the flat tensors of each rank, one per sub-group, laid end to end.

    ``starts[rank]`` are the positions of its parts and their end; ranks whose parts are of the same lengths, as all of
    one save are, share one list. Raises MalformedError or InconsistentCheckpointError unless each part is one run of
    its storage and of the dtype of the others: the half of the proof of ``EqualShares`` that is the same for every
    parameter.

    ``alone``: nothing but ``EqualShares`` of these reads their records, and the parts follow each other in each file.
    """

    def __init__(self, files: Sequence[TorchFile], parts: Sequence[Sequence[TensorRef]], alone: bool = False) -> None:
        self.files = files
        self.alone = alone
        self.parts = parts
        self.dtype = next((part.dtype for of_rank in parts for part in of_rank), BY_NAME["float32"])
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.starts: list[tuple[int, ...]] = []
        for file, of_rank in zip(files, parts, strict=True):
            starts = (0, *accumulate(part.numel for part in of_rank))
            self.starts.append(known.setdefault(starts, starts))
            extents: list[Extent] = []
            for part in of_rank:
                if not is_contiguous(part.shape, part.strides):
                    raise MalformedError(
                        f"{file.path}: a flat tensor of shape {list(part.shape)} is no single run of its storage"
                    )
                extents.append(file.extent(part, 0, part.numel))  # raises where the storage is shorter
                if part.numel and part.dtype != self.dtype:
                    raise InconsistentCheckpointError(
                        f"{file.path} holds {part.dtype} masters, {files[0].path} {self.dtype}"
                    )
            self.alone = self.alone and all(a.offset_bytes + a.nbytes <= b.offset_bytes for a, b in pairwise(extents))
        self.alike = len(known) == 1
        self.totals = [starts[-1] for starts in self.starts]
        self.shortest = min(self.totals)

    @property
    def file_count(self) -> int:
        return len(self.files)

    def records(self, number: int) -> list[Record]:
        """The records of a rank's flat tensors."""
        records = (self.files[number].extent(part, 0, part.numel).record for part in self.parts[number] if part.numel)
        return list(dict.fromkeys(records))

    def pieces_of(self, parts: Sequence[Sequence[TensorRef]], begin: int, share: int, numel: int) -> tuple[Piece, ...]:
        """``EqualShares``' pieces, of ``parts`` that lie as these do: the masters, or another state of the
        optimizer.
        """
        holders = range(min(len(self.files), -(-numel // share) if share else 0))
        return tuple(piece for rank in holders for piece in self.pieces_of_rank(rank, parts[rank], begin, share, numel))

    def pieces_of_rank(
        self, rank: int, parts: Sequence[TensorRef], begin: int, share: int, numel: int
    ) -> tuple[Piece, ...]:
        first = rank * share
        wanted = min(share, numel - first)
        if wanted <= 0:
            return ()
        mine = flat_pieces([self.files[rank]] * len(parts), parts, self.starts[rank], begin, wanted)
        return tuple(Piece(piece.extent, first + piece.start, piece.numel) for piece in mine)


@dataclass(frozen=True)
class EqualShares(ProvenLayout):
    """Stage 3: rank r holds elements [r × share, (r + 1) × share) of ``numel``, at ``begin`` of its sub-groups laid end
    to end.

    1,000 ranks and 100,000 parameters have 10⁸ pieces, so what ``prove_tiling`` finds out of them is proven without
    them. The ranks' ranges follow each other from 0 on, whatever the numbers; so they tile the parameter if together
    they reach its end. And each range is on disk if the rank's flat tensors, of which ``RankFlats`` knows that they are
    whole, go on to its end.
    """

    ranks: RankFlats
    begin: int
    share: int
    numel: int

    def __call__(self) -> tuple[Piece, ...]:
        return self.ranks.pieces_of(self.ranks.parts, self.begin, self.share, self.numel)

    @property
    def group(self) -> RankFlats | None:
        return self.ranks if self.ranks.alone else None

    def pieces_in(self, number: int) -> tuple[Piece, ...]:
        return self.ranks.pieces_of_rank(number, self.ranks.parts[number], self.begin, self.share, self.numel)

    @property
    def count(self) -> int:
        if not self.numel:
            return 0
        full, rest = divmod(self.numel, self.share)
        starts = self.ranks.starts
        if self.ranks.alike:
            cuts = full * self._cuts(starts[0], self.share) if full else 0
        else:
            cuts = sum(self._cuts(of_rank, self.share) for of_rank in starts[:full])
        return cuts + (self._cuts(starts[full], rest) if rest else 0)

    def _cuts(self, starts: tuple[int, ...], wanted: int) -> int:
        """The pieces of a rank: sub-groups that hold some of ``wanted`` elements from ``begin`` on."""
        first, last = bisect_right(starts, self.begin) - 1, bisect_right(starts, self.begin + wanted - 1) - 1
        return sum(starts[i] < starts[i + 1] for i in range(first, last + 1))

    def prove(self, entry: TensorEntry) -> None:
        ranks = self.ranks
        if entry.numel != self.numel or not 0 <= self.numel <= self.share * len(ranks.files):
            raise InconsistentCheckpointError(
                f"tensor {quote(entry.name)}: shape {list(entry.shape)} needs {entry.numel} elements;"
                f" {count(len(ranks.files), 'rank', 'holds')} {self.share} each of {self.numel}"
            )
        if entry.dtype != ranks.dtype:
            raise InconsistentCheckpointError(
                f"tensor {quote(entry.name)}: {entry.dtype} is expected, and the masters are {ranks.dtype}"
            )
        needed = self.begin + min(self.share, self.numel)
        if self.begin < 0 or needed > ranks.shortest:
            short = ranks.totals.index(ranks.shortest)
            raise InconsistentCheckpointError(
                f"tensor {quote(entry.name)} in {ranks.files[short].path}: its share ends at element {needed}; the"
                f" file's flat tensors have {ranks.totals[short]}"
            )
