"""Compare two open checkpoints tensor by tensor, byte by byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.casting import CASTABLE, Caster
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.checkpoint.transfer.reading import Sources, blocks, new_block, read_flat_into
from dsconv.convert.computed import ComputedEntry
from dsconv.convert.progress import Progress
from dsconv.text import count


@dataclass
class Difference:
    """One tensor that differs. ``element`` is the index of the first element that differs, if there is one."""

    name: str
    what: str
    element: list[int] | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass
class VerifyReport:
    """What was compared: ``compared`` counts tensors, ``nbytes`` bytes. ``differences`` is empty when all is equal.

    ``states`` counts the optimizer states that were compared too, where they were asked for.
    ``filters`` are those of the manifest of ``b``, where they were followed.
    """

    a: str
    b: str
    compared: int = 0
    nbytes: int = 0
    cast: int = 0
    states: int = 0
    filters: dict[str, list[str]] | None = None
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences

    def summary(self) -> str:
        shown = "; ".join(map(str, self.differences[:5]))
        more = f"; and {len(self.differences) - 5} more" if len(self.differences) > 5 else ""
        return f"{count(len(self.differences), 'difference')}: {shown}{more}"

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


@dataclass(frozen=True)
class CompareOptions:
    """How two open checkpoints are compared. ``verify`` documents the first three and the last.

    ``left_out`` are names in the first of tensors that the second need not have.
    """

    allow_cast: bool = False
    subset: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: Collection[str] = ()
    progress: Progress | None = None


def compare(first: Checkpoint, second: Checkpoint, options: CompareOptions) -> VerifyReport:
    """Compare every tensor of two open checkpoints; see ``verify``."""
    report = VerifyReport(str(first.path), str(second.path))
    names, allow_cast, progress = options.renamed, options.allow_cast, options.progress
    total, done = second.nbytes, 0
    seen = set(options.left_out)
    with Sources() as sources:
        caster = Caster()
        buffers = new_block(BLOCK_BYTES), new_block(BLOCK_BYTES)
        for entry in second.values():
            match = next((n for n in (names.get(entry.name, entry.name), *entry.aliases) if n in first), None)
            if match is None:
                report.differences.append(Difference(entry.name, f"only in {report.b}"))
                continue
            seen.add(first[match].name)
            difference = _compare(first[match], entry, allow_cast, sources, caster, buffers, report)
            if difference is not None:
                report.differences.append(difference)
            report.compared += 1
            done += entry.nbytes
            if progress is not None:
                progress("verify", done, total)
    if not options.subset:
        for entry in first.values():
            if entry.name not in seen and not any(alias in second for alias in entry.aliases):
                report.differences.append(Difference(entry.name, f"only in {report.a}"))
    return report


def _compare(
    a: TensorEntry,
    b: TensorEntry,
    allow_cast: bool,
    sources: Sources,
    caster: Caster,
    buffers: tuple[memoryview, memoryview],
    report: VerifyReport,
) -> Difference | None:
    if a.shape != b.shape:
        return Difference(b.name, f"shape {list(a.shape)} and {list(b.shape)}")
    cast = a.dtype != b.dtype
    if cast and not (allow_cast and a.dtype.name in CASTABLE and b.dtype.name in CASTABLE):
        return Difference(b.name, f"dtype {a.dtype} and {b.dtype}")
    report.cast += cast
    made = a.read_bytes() if isinstance(a, ComputedEntry) else None
    pieces_a, pieces_b = a.pieces, b.pieces
    widest = a if a.dtype.itemsize >= b.dtype.itemsize else b
    for start, numel in blocks(widest, BLOCK_BYTES):
        left = buffers[0][: numel * a.dtype.itemsize]
        right = buffers[1][: numel * b.dtype.itemsize]
        if made is None:
            read_flat_into(a, start, left, sources, pieces_a)
        else:
            left = made[start * a.dtype.itemsize : (start + numel) * a.dtype.itemsize]
        read_flat_into(b, start, right, sources, pieces_b)
        expected = caster.cast(left, a.dtype, b.dtype)[0] if cast else left
        report.nbytes += len(right)
        if expected != right:
            return _first_difference(b, start, expected, right)
    return None


def _first_difference(b: TensorEntry, start: int, expected: memoryview, found: memoryview) -> Difference:
    """Name the first element that differs, found by halving."""
    itemsize = b.dtype.itemsize
    low, high = 0, len(found) // itemsize
    while high - low > 1:
        middle = (low + high) // 2
        if expected[low * itemsize : middle * itemsize] != found[low * itemsize : middle * itemsize]:
            high = middle
        else:
            low = middle
    flat = start + low
    index: list[int] = []
    for size in reversed(b.shape):
        index.insert(0, flat % size)
        flat //= size
    a_bytes, b_bytes = (bytes(v[low * itemsize : (low + 1) * itemsize]) for v in (expected, found))
    return Difference(b.name, f"first differs at element {index}: {_show(a_bytes, b)} and {_show(b_bytes, b)}", index)


def _show(data: bytes, entry: TensorEntry) -> str:
    """Return an element as a person reads it, with its bytes where two floats could look alike."""
    import struct

    codes = {
        "float64": "d",
        "float32": "f",
        "float16": "e",
        "int64": "q",
        "int32": "i",
        "int16": "h",
        "int8": "b",
        "uint8": "B",
        "bool": "?",
    }
    if entry.dtype.name == "bfloat16":
        return f"{struct.unpack('<f', bytes(2) + data)[0]!r} (0x{data[::-1].hex()})"
    code = codes.get(entry.dtype.name)
    return f"{struct.unpack('<' + code, data)[0]!r} (0x{data[::-1].hex()})" if code else f"0x{data[::-1].hex()}"
