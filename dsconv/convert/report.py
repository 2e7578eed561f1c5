"""What the converters report: the fields that all of them have, and the rows of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.text import quote


@dataclass(kw_only=True)
class Report:
    """What a converter did, or with ``dry_run`` would do. Sizes are in bytes.

    ``overflowed`` counts, by tensor, finite values that a cast made infinite. ``plan`` has a row for each tensor or
    file of a dry run.
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
    warnings: list[str] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def note_copy(self, bytes_read: int, overflowed: dict[str, int]) -> None:
        """Take over what a copy did, with a warning where values became infinite."""
        self.bytes_read = bytes_read
        self.overflowed = dict(sorted(overflowed.items()))
        if self.overflowed:
            self.warnings.append(
                f"{sum(self.overflowed.values())} values in {len(self.overflowed)} tensors are too large for the dtype"
                f" and became infinite, first in {quote(next(iter(self.overflowed)))}"
            )


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
