"""The report of a load, and the check of what a strict load requires."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.errors import InconsistentCheckpointError
from dsconv.loaders.mapping import Matched
from dsconv.text import clean, count

SHOWN = 10


@dataclass
class LoadReport:
    """What a load did on this rank.

    Attributes:
        source: The checkpoint.
        format: Its format.
        loaded: Tensors of the model that were filled.
        bytes_read: Bytes that this rank read.
        seconds: How long the load took.
        missing: Tensors that the checkpoint lacks; they were initialised as transformers does.
        unexpected: Tensors that the model lacks; they were not read.
        mismatched: (shape in the checkpoint, shape in the model) of tensors whose shapes differ.
        computed: Tensors that were computed from whole ones, which every rank read in full, and why.
        overflowed: Values that became infinite in a cast.
        warnings: What else was noticed.
    """

    source: str
    format: str
    loaded: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    overflowed: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """Return the text that is printed: what was loaded, and the names that did not match.

        It is safe to show: names come from the checkpoint.
        """
        read = f"this rank read {self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"
        lines = [f"loaded {count(self.loaded, 'tensor')} of {self.source} ({self.format}): {read}"]
        for what, names in (
            ("missing, initialised anew", self.missing),
            ("unexpected, not read", self.unexpected),
            ("with another shape", [f"{name} {list(a)} for {list(b)}" for name, (a, b) in self.mismatched.items()]),
        ):
            if names:
                lines.append(f"  {len(names)} {what}: {_some(names)}")
        if self.overflowed:
            lines.append(f"  {count(self.overflowed, 'value', 'is')} too large for the dtype and became infinite")
        return "\n".join(map(clean, [*lines, *(f"  {warning}" for warning in self.warnings)]))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_strict(matched: Matched, missing: Iterable[str], unexpected: Iterable[str], where: str) -> None:
    """Raise InconsistentCheckpointError, with the names, unless the checkpoint fits the model."""
    problems = []
    if matched.mismatched:
        shapes = [
            f"{name} is {list(a)}, the model has {list(b)}" for name, (a, b) in sorted(matched.mismatched.items())
        ]
        problems.append(f"{count(len(shapes), 'tensor')} with another shape: {_some(shapes)}")
    for what, names in (("the model has", sorted(missing)), ("the checkpoint has", sorted(unexpected))):
        if names:
            other = "the checkpoint lacks" if what == "the model has" else "the model lacks"
            problems.append(f"{count(len(names), 'tensor')} that {what} and {other}: {_some(names)}")
    if problems:
        raise InconsistentCheckpointError(
            f"{where} does not fit the model: {'; '.join(problems)}. strict=False loads what fits"
        )
