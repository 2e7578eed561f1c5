"""What the converters report: the fields that all of them have, and the rows of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.convert.destination import PartReport, Written
from dsconv.text import count, quote


@dataclass(kw_only=True)
class Report:
    """What a converter did, or with ``dry_run`` would do. Sizes are in bytes.

    ``overflowed`` counts, by tensor, finite values that a cast made infinite. ``nonfinite`` counts, by tensor, the NaN
    and infinite values that were seen on the way: all of them in a tensor that was cast, and those of a sample in one
    that was copied as it is, so a tensor that is absent may still hold some. ``plan`` has a row for each tensor or file
    of a dry run. ``part`` is what became of the part that was written, with ``--part``: what the copy did is then that
    part's, and all other sizes and counts are the whole output's.
    """

    source: str
    output: str
    format: str
    step: int | None
    tensors: int
    parameters: int
    nbytes: int
    dry_run: bool = False
    bytes_read: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    part: PartReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def note_copy(self, written: Written) -> None:
        """Take over what a copy did, with a warning where values are not finite, or became infinite."""
        self.bytes_read = written.bytes_read
        self.part = written.part
        self.nonfinite = dict(sorted(written.nonfinite.items()))
        self.overflowed = dict(sorted(written.overflowed.items()))
        if self.nonfinite:
            self.warnings.append(
                f"NaN or infinite values lie in {len(self.nonfinite)} of {count(self.tensors, 'tensor')}, first in"
                f" {quote(next(iter(self.nonfinite)))}; dsconv inspect --values counts them"
            )
        if self.overflowed:
            self.warnings.append(
                f"{count(sum(self.overflowed.values()), 'value')} in {count(len(self.overflowed), 'tensor')} became"
                f" infinite, too large for the dtype, first in {quote(next(iter(self.overflowed)))}"
            )

    def note_part(self, written: Written) -> None:
        """Take over what became of a part of the output, unless this process wrote all of it, or completed it."""
        if written.part is not None and not written.part.by_this:
            self.note_copy(written)
        self.part = written.part


def tensor_row(name: str, entry: TensorEntry, dtype: DType, file: str, offset_bytes: int) -> dict[str, Any]:
    """Return the row of a plan for one tensor that is written as ``dtype``, from ``offset_bytes`` of ``file`` on."""
    return {
        "file": file,
        "name": name,
        "dtype": str(dtype),
        "shape": list(entry.shape),
        "stored_dtype": str(entry.dtype),
        "offset": offset_bytes,
        "bytes": entry.numel * dtype.itemsize,
        "pieces": entry.piece_count,
        "role": entry.role,
    }
