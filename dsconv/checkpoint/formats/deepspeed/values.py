"""Values of masters and weights, compared: a weight of 16 bits is its master, cast."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extent
from dsconv.checkpoint.transfer.reading import Sources, read_flat_into

SAMPLES = 64  # elements that a first look compares of each tensor
BLOCK_NUMEL = 1 << 18  # elements that are compared at a time where all are
_NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_CODES = {"float32": "f", "float64": "d", "float16": "e", "int64": "q", "int32": "i"}


class Values:
    """Weights by name, and masters compared with them. A context manager, which closes the files that were read."""

    def __init__(self, weights: Mapping[str, TensorEntry]) -> None:
        self._weights = weights
        self._sources = Sources()
        self._first: dict[Any, Any] = {}
        self._known: dict[Any, bool] = {}
        self._alike: set[str] | None = None

    def __enter__(self) -> Values:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sources.close()

    def begin_alike(self, name: str, file: TorchFile, master: TensorRef) -> bool:
        """Return whether a master in ``file`` has the shape of the weight ``name`` and, cast, its first elements.

        True also where the elements cannot be compared: there are none, or a dtype needs more than a cast.
        """
        weight = self._weights[name]
        if weight.shape != master.shape:
            return False
        if not self._comparable(weight, master):
            return True
        key = (name, file.path, master.storage.key, master.offset)
        if key not in self._known:
            high = self._first_of(key[1:], _as_entry(file, master))
            self._known[key] = same_values(high, self._first_of(name, weight), weight.dtype)
        return self._known[key]

    def agree(self, name: str, file: TorchFile, master: TensorRef) -> bool:
        """Return the same of all elements, which are read only where another weight begins as this one does."""
        if not self.begin_alike(name, file, master):
            return False
        weight = self._weights[name]
        if not self._comparable(weight, master) or name not in self.alike():
            return True
        key = (name, file.path, master.storage.key, master.offset, "whole")
        if key not in self._known:
            high = _as_entry(file, master)
            self._known[key] = all(
                same_values(self._read(high, *block), self._read(weight, *block), weight.dtype)
                for block in _blocks(weight.numel)
            )
        return self._known[key]

    def are_equal(self, file: TorchFile, one: TensorRef, other: TensorRef) -> bool:
        """Return whether two masters in ``file`` have the same dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype.name not in _NUMPY:
            return False
        if not (is_contiguous(one.shape, one.strides) and is_contiguous(other.shape, other.strides)):
            return False
        first, second = _as_entry(file, one), _as_entry(file, other)
        return all(
            self._read(first, *block).tobytes() == self._read(second, *block).tobytes()
            for block in _blocks(first.numel)
        )

    def alike(self) -> set[str]:
        """Return the weights whose first element is that of another one, whatever their shapes."""
        if self._alike is None:
            classes: dict[bytes, list[str]] = {}
            for name, weight in self._weights.items():
                if weight.numel and weight.dtype.name in _NUMPY:
                    classes.setdefault(self._first_of(name, weight)[:1].tobytes(), []).append(name)
            self._alike = {name for names in classes.values() if len(names) > 1 for name in names}
        return self._alike

    def _comparable(self, weight: TensorEntry, master: TensorRef) -> bool:
        return (
            weight.numel > 0
            and master.dtype.name == "float32"
            and weight.dtype.name in _NUMPY
            and is_contiguous(master.shape, master.strides)
        )

    def _first_of(self, key: Any, entry: TensorEntry) -> Any:
        if (key, entry.numel) not in self._first:
            self._first[key, entry.numel] = self._read(entry, 0, min(SAMPLES, entry.numel))
        return self._first[key, entry.numel]

    def _read(self, entry: TensorEntry, start: int, numel: int) -> Any:
        """Return elements [start, start + numel) as a numpy array; bfloat16 as 16 bits each."""
        import numpy as np

        data = bytearray(numel * entry.dtype.itemsize)
        read_flat_into(entry, start, memoryview(data), self._sources)
        return np.frombuffer(data, dtype=_NUMPY[entry.dtype.name])


def _as_entry(file: TorchFile, tensor: TensorRef) -> TensorEntry:
    return TensorEntry("", tensor.dtype, tensor.shape, partial(file.pieces, tensor))


def _blocks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, BLOCK_NUMEL):
        yield start, min(BLOCK_NUMEL, numel - start)


def same_values(high: Any, low: Any, dtype: DType) -> bool:
    """Return whether fp32 numbers, rounded to nearest even to ``dtype``, are the given ones. A NaN equals any NaN."""
    import numpy as np

    if dtype.name == "bfloat16":
        bits = high.view("<u4").astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        is_nan = np.isnan(high)
        nan_too = (low & 0x7FFF) > 0x7F80
        zero = ((rounded | low) & 0x7FFF) == 0  # -0.0 is 0.0
        return bool(np.all(np.where(is_nan, nan_too, (rounded == low) | zero)))
    with np.errstate(over="ignore"):
        cast_high = high.astype(low.dtype)
    return bool(np.all((cast_high == low) | (np.isnan(cast_high) & np.isnan(low))))


def prefix_matches(piece: Piece, dtype: DType, file: TorchFile, tensor: TensorRef, samples: int = SAMPLES) -> bool:
    """Return whether the first elements of a master's piece, cast, are the weight's from the same place on.

    Args:
        piece: A piece of a master of ``dtype``; its range counts elements of the weight.
        dtype: The master's dtype.
        file: The file that holds the weight.
        tensor: The weight, which is contiguous.
        samples: How many elements to compare.
    """
    count = min(samples, piece.numel)
    master = decode(read_extent(Extent(piece.extent.record, piece.extent.offset_bytes, count * dtype.itemsize)), dtype)
    weight = decode(read_extent(file.extent(tensor, piece.start, count)), tensor.dtype)
    return (
        master is None
        or weight is None
        or all(same_number(cast(m, tensor.dtype), w) for m, w in zip(master, weight, strict=True))
    )


def entry_prefix_matches(entry: TensorEntry, file: TorchFile, tensor: TensorRef) -> bool:
    """Return whether ``entry`` has the shape and, cast, the first elements of a weight in ``file``.

    True also where that cannot be seen: no elements, or a weight that is not contiguous.
    """
    if tensor.shape != entry.shape:
        return False
    if not entry.numel or not is_contiguous(tensor.shape, tensor.strides):
        return True
    return prefix_matches(entry.pieces[0], entry.dtype, file, tensor)


def same_number(a: float, b: float) -> bool:
    """Return whether two numbers are equal; NaN equals NaN."""
    return a == b or (a != a and b != b)


def decode(data: bytes, dtype: DType) -> list[float] | None:
    """Return the numbers of little-endian elements; None for a dtype that needs more than the standard library."""
    code = _CODES.get(dtype.name)
    if code:
        return [float(v[0]) for v in struct.iter_unpack("<" + code, data)]
    if dtype.name == "bfloat16":
        wide = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        return [float(v[0]) for v in struct.iter_unpack("<f", wide)]
    return None


def cast(value: float, dtype: DType) -> float:
    """Return an fp32 number rounded to nearest even as ``dtype`` would hold it."""
    if dtype.name == "bfloat16" and value == value:
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if dtype.name == "float16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value
