"""``verify``: are two checkpoints, of any formats, equal tensor by tensor, byte by byte?"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dsconv.checkpoint.config_files import find_config as config_near
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME, OUTPUTS, DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.opening import open_two
from dsconv.checkpoint.transfer.casting import CASTABLE, Caster
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.checkpoint.transfer.reading import Sources, blocks, new_block, read_flat_into
from dsconv.convert.computed import ComputedEntry
from dsconv.convert.filters import Filters
from dsconv.convert.fp8 import dequantized
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.plan import find_config
from dsconv.convert.progress import Progress
from dsconv.convert.sidecars import MAX_MANIFEST_BYTES, read_json
from dsconv.errors import UsageError
from dsconv.names.choosing import names_of, with_hf_names
from dsconv.names.marks import HF
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

    ``filters`` are those of the manifest of ``b``, where they were followed.
    """

    a: str
    b: str
    compared: int = 0
    nbytes: int = 0
    cast: int = 0
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


def verify(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    allow_cast: bool = False,
    subset: bool = False,
    revision: str | None = None,
    item: str | None = None,
    item_b: str | None = None,
    follow_links: bool = False,
    renamed: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare every tensor of ``a`` and ``b`` as raw bytes, streaming, in two blocks of memory.

    A tied name counts as present under each of its names.

    Args:
        a: a path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        b: the other one.
        allow_cast: a float of another dtype in ``b`` must be ``a``'s, cast once to nearest even.
        subset: tensors that only ``a`` has are not differences.
        revision: that of the one, or of both, that lie on the Hub.
        item: the key of the model to compare, where ``a`` or ``b`` holds several.
        item_b: the key of the model of ``b``, where it is another.
        follow_links: read what links lead to that leave the folders.
        renamed: {name in ``b``: name in ``a``}. Without it the filters that the manifest of ``b`` keeps are followed
            (``--include``, ``--exclude``, ``--strip-prefix``, ``--rename``), and Hugging Face's names are given to
            ``a`` where the merge of ``b`` gave them (``--names``).
        progress: called with ("verify", bytes done, bytes in all).

    Raises:
        DsconvError: what ``open_checkpoint`` raises.
    """
    first, second = open_two(a, b, revision=revision, item=item, item_b=item_b, follow_links=follow_links)
    options = CompareOptions(allow_cast, subset, renamed or {}, progress=progress)
    if renamed is not None:
        return compare(first, second, options)
    manifest = read_json(second.path / MANIFEST, MAX_MANIFEST_BYTES) if second.path.is_dir() else None
    noted: dict[str, Any] = manifest if isinstance(manifest, dict) else {}
    if _gave_hf_names(noted) and names_of(first):
        first = with_hf_names(first, find_config([second.path]))
    if (dtype := _dequantized_to(noted)) is not None:
        first = dequantized(first, config_near([first.path, first.folder]), dtype)
    filters, names, left_out = _noted(first, noted)
    report = compare(first, second, replace(options, renamed=names, left_out=left_out))
    report.filters = filters
    return report


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


def _gave_hf_names(manifest: Mapping[str, Any]) -> bool:
    """Return whether the merge that wrote a manifest gave the tensors Hugging Face's names."""
    source = manifest.get("source")
    names = source.get("names") if isinstance(source, dict) else None
    return isinstance(names, dict) and names.get("to") == HF


def _dequantized_to(manifest: Mapping[str, Any]) -> DType | None:
    """Return the dtype that FP8 weights were given in the merge that wrote a manifest; None where it gave none."""
    source = manifest.get("source")
    name = source.get("dequantized") if isinstance(source, dict) else None
    return BY_NAME.get(name) if isinstance(name, str) and name in OUTPUTS else None


def _noted(
    first: Checkpoint, manifest: Mapping[str, Any]
) -> tuple[dict[str, list[str]] | None, Mapping[str, str], Collection[str]]:
    """Return the filters that the manifest of a merge keeps, the names it gave, and what it left out."""
    filters = Filters.read(manifest.get("filters"))
    if not filters:
        return None, {}, ()
    try:
        left_out = {old for old, new in filters.names(first).items() if new is None}
    except UsageError:
        return None, {}, ()  # of another source: every difference is shown
    tensors = manifest.get("tensors")
    noted = tensors.items() if isinstance(tensors, dict) else ()
    sources = {name: item.get("source") for name, item in noted if isinstance(item, dict)}
    names = {name: source for name, source in sources.items() if isinstance(source, str)}
    return filters.to_dict(), names, left_out


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
