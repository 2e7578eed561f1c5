"""``diff``: how far apart are two checkpoints, of any formats, tensor by tensor and layer by layer?

``verify`` proves that two checkpoints are equal. ``diff`` measures by how much they are not: what training changed,
which layers a fine-tune touched, what a cast cost. Both stream, in a few blocks of memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.opening import open_two
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.checkpoint.transfer.numbers import as_float64, is_number
from dsconv.checkpoint.transfer.reading import Sources, blocks, read_flat_into
from dsconv.convert.progress import Progress

if TYPE_CHECKING:
    import numpy as np

NUMBERED = re.compile(r"(.*?\.\d+)\.")  # a name up to its first number: the layer


@dataclass
class Distance:
    """How far ``b`` is from ``a``, over the elements of a tensor or of a layer.

    Attributes:
        name: The tensor's name, or the layer's.
        numel: The number of elements that were compared.
        changed: The number of elements whose values differ. NaN equals NaN.
        max_abs: The largest ``|b - a|``; infinite where exactly one of the two is NaN or infinite.
        max_relative: The largest ``|b - a| / |a|`` of elements that are not zero in ``a``.
        l2: The Euclidean norm of ``b - a``.
        relative_l2: ``l2`` over the norm of ``a``; None if ``a`` is all zeros.
        cosine: The cosine of the angle between the two; None if one of them is all zeros.
    """

    name: str
    numel: int = 0
    changed: int = 0
    max_abs: float = 0.0
    max_relative: float = 0.0
    l2: float = 0.0
    relative_l2: float | None = 0.0
    cosine: float | None = 1.0

    @property
    def changed_fraction(self) -> float:
        return self.changed / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "changed_fraction": self.changed_fraction}
        endless = [key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
        return found | dict.fromkeys(endless)  # JSON has neither infinity nor NaN


@dataclass
class DiffReport:
    """What ``diff`` found. ``tensors`` and ``layers`` are sorted: the largest relative change comes first.

    Attributes:
        a: The first checkpoint.
        b: The second one.
        tensors: The distance of each tensor that both have in one shape and that can be compared by value.
        layers: The same, summed over the tensors of each numbered layer; what has no number is a layer of its own.
        only_in_a: Names that only ``a`` has.
        only_in_b: Names that only ``b`` has.
        not_compared: {name: why}, of tensors whose shapes differ or whose dtype is not read as numbers here.
        nbytes: Bytes that were read.
    """

    a: str
    b: str
    tensors: list[Distance] = field(default_factory=list)
    layers: list[Distance] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def equal(self) -> bool:
        """Return whether both have the same tensors with the same values."""
        return not (self.only_in_a or self.only_in_b or self.not_compared) and not any(t.changed for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "equal": self.equal}
        return {**found, **{key: [d.to_dict() for d in getattr(self, key)] for key in ("tensors", "layers")}}


class _Sums:
    """Running sums over the elements of a tensor, or of several."""

    def __init__(self, name: str) -> None:
        self.found = Distance(name)
        self.of_a = self.of_b = self.of_product = self.of_difference = 0.0

    def add(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        """Take in a block of values, as float64."""
        import numpy as np

        with np.errstate(all="ignore"):
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            self.found.numel += a.size
            self.found.changed += int(a.size - np.count_nonzero(same))
            self.of_a += float(np.dot(a, a))
            self.of_b += float(np.dot(b, b))
            self.of_product += float(np.dot(a, b))
            if same.all():
                return
            difference = np.abs(np.where(same, 0.0, b - a))
            difference[np.isnan(difference)] = np.inf
            self.found.max_abs = max(self.found.max_abs, float(difference.max()))
            held = a != 0
            relative = difference[held] / np.abs(a[held])
            self.found.max_relative = max(self.found.max_relative, float(relative.max(initial=0.0)))
            self.of_difference += float(np.dot(difference, difference))

    def add_sums(self, other: _Sums) -> None:
        """Take in what another counted."""
        mine, theirs = self.found, other.found
        mine.numel += theirs.numel
        mine.changed += theirs.changed
        mine.max_abs = max(mine.max_abs, theirs.max_abs)
        mine.max_relative = max(mine.max_relative, theirs.max_relative)
        self.of_a += other.of_a
        self.of_b += other.of_b
        self.of_product += other.of_product
        self.of_difference += other.of_difference

    def distance(self) -> Distance:
        """Return what the sums say."""
        norm_a, norm_b = math.sqrt(self.of_a), math.sqrt(self.of_b)
        self.found.l2 = math.sqrt(self.of_difference)
        self.found.relative_l2 = self.found.l2 / norm_a if norm_a else (None if self.found.l2 else 0.0)
        product = norm_a * norm_b
        cosine = self.of_product / product if product else (None if self.found.changed else 1.0)
        self.found.cosine = 1.0 if cosine is not None and not self.found.changed else cosine
        return self.found


def diff(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    item: str | None = None,
    item_b: str | None = None,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Measure how far the tensors of ``b`` are from those of ``a``, streaming.

    Values are compared as float64, so a checkpoint and its cast to 16 bits differ by what the cast took away. A tied
    name counts as present under each of its names.

    Args:
        a: A path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        b: The other one.
        revision: A branch, tag or commit of the one, or of both, that lie on the Hub.
        item: The key of the model to compare, where ``a`` or ``b`` holds several.
        item_b: The key of the model of ``b``, where it is another.
        follow_links: Read what links lead to that leave the folders.
        progress: Called with ("diff", bytes done, bytes in all).

    Raises:
        DsconvError: What ``open_checkpoint`` raises.
    """
    first, second = open_two(a, b, revision=revision, item=item, item_b=item_b, follow_links=follow_links)
    report = DiffReport(str(first.path), str(second.path))
    sums: dict[str, _Sums] = {}
    seen: set[str] = set()
    done, total = 0, second.nbytes
    caster_a, caster_b = Caster(), Caster()
    with Sources() as sources:
        for entry in second.values():
            match = next((name for name in (entry.name, *entry.aliases) if name in first), None)
            if match is None:
                report.only_in_b.append(entry.name)
                continue
            other = first[match]
            seen.add(other.name)
            if why := _why_not(other, entry):
                report.not_compared[entry.name] = why
            else:
                sums[entry.name] = _measure(other, entry, sources, caster_a, caster_b)
                report.nbytes += other.nbytes + entry.nbytes
            done += entry.nbytes
            if progress is not None:
                progress("diff", done, total)
    report.only_in_a = [
        entry.name
        for entry in first.values()
        if entry.name not in seen and not any(alias in second for alias in entry.aliases)
    ]
    layers: dict[str, _Sums] = {}
    for name, of_tensor in sums.items():
        numbered = NUMBERED.match(name)
        layer = numbered[1] if numbered else name
        layers.setdefault(layer, _Sums(layer)).add_sums(of_tensor)
    report.tensors = _sorted(of_tensor.distance() for of_tensor in sums.values())
    report.layers = _sorted(of_layer.distance() for of_layer in layers.values())
    return report


def _sorted(distances: Iterable[Distance]) -> list[Distance]:
    """Sort by relative change, largest first; what was all zeros and is not now comes before everything."""
    return sorted(distances, key=lambda d: (-math.inf if d.relative_l2 is None else -d.relative_l2, d.name))


def _why_not(a: TensorEntry, b: TensorEntry) -> str:
    """Say why two tensors cannot be compared by value; "" where they can."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    for dtype in (a.dtype, b.dtype):
        if not is_number(dtype):
            return f"{dtype} is not compared by value; dsconv verify compares bytes"
    return ""


def _measure(a: TensorEntry, b: TensorEntry, sources: Sources, caster_a: Caster, caster_b: Caster) -> _Sums:
    sums = _Sums(b.name)
    pieces_a, pieces_b = a.pieces, b.pieces
    widest = a if a.dtype.itemsize >= b.dtype.itemsize else b
    for start, numel in blocks(widest, BLOCK_BYTES // 4):
        left, right = (memoryview(bytearray(numel * entry.dtype.itemsize)) for entry in (a, b))
        read_flat_into(a, start, left, sources, pieces_a)
        read_flat_into(b, start, right, sources, pieces_b)
        sums.add(as_float64(left, a.dtype, caster_a), as_float64(right, b.dtype, caster_b))
    return sums
