"""Hugging Face folders of safetensors: one ``model.safetensors``, or shards under an index.

The header is read and held to the rules of safetensors 0.8 (``safetensors/src/tensor.rs``): at most 100 MB of JSON that
starts with ``{``, offsets that leave no hole and do not overlap, sizes that follow from dtype and shape.
"""

from __future__ import annotations

import json
import math
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint import dtypes
from dsconv.checkpoint.tensormap import Checkpoint, Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.torch_file import open_for_reading
from dsconv.checkpoint.zipfile_reader import read_at
from dsconv.errors import MalformedError, MissingShardError, UnsafeError

MAX_HEADER_BYTES = 100_000_000  # safetensors 0.8 MAX_HEADER_SIZE
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def detect(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in (INDEX, SINGLE, ADAPTER))


def read(path: Path) -> Checkpoint:
    """Raises MalformedError, MissingShardError or UnsafeError (a weight_map that leaves the folder)."""
    warnings: list[str] = []
    if path.is_file():
        files, weight_map, folder = [path], None, path.parent
    elif (path / INDEX).is_file():
        weight_map = _weight_map(path / INDEX)
        files, folder = [path / name for name in dict.fromkeys(weight_map.values())], path
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise MissingShardError(f"{path / INDEX} names {len(missing)} files that are not there, the first {missing[0]}")
    else:
        name = SINGLE if (path / SINGLE).is_file() else ADAPTER
        files, weight_map, folder = [path / name], None, path
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_file(file).items():
            if weight_map is not None and weight_map.get(name) != file.name:
                warnings.append(f"{file.name} holds {name!r}, which the index does not place there: left out")
            else:
                entries[name] = entry
    lost = [name for name in weight_map or () if name not in entries]
    if lost:
        raise MissingShardError(f"{path / INDEX} places {lost[0]!r} in {(weight_map or {})[lost[0]]}, which does not hold it")
    return Checkpoint(path, "safetensors", entries, folder=folder, warnings=tuple(warnings), sources=tuple(files))


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: not JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file or file in (".", ".."):
            raise UnsafeError(f"{path}: weight_map puts {name!r} in {file!r}, outside the folder; refused")
    return weight_map


def read_file(path: Path) -> dict[str, TensorEntry]:
    """The entries of one safetensors file."""
    descriptor = open_for_reading(path)
    try:
        size = os.fstat(descriptor).st_size
        header_bytes = struct.unpack("<Q", read_at(descriptor, 8, 0, path))[0]
        if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
            raise MalformedError(f"{path}: truncated or not safetensors: a header of {header_bytes} bytes in a file of {size}")
        raw = read_at(descriptor, header_bytes, 8, path)
    finally:
        os.close(descriptor)
    try:
        header = json.loads(raw) if raw.startswith(b"{") else None
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise MalformedError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + header_bytes
    spans = []
    entries = {}
    for name, item in header.items():
        dtype, shape, begin, end = _item(path, name, item)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise MalformedError(
                f"{path}: {name!r} of {dtype} {list(shape)} should have {math.prod(shape) * dtype.itemsize} bytes, has {end - begin}"
            )
        spans.append((begin, end, name))
        record = Record(path, base + begin, end - begin, None, name)
        entries[name] = TensorEntry(name, dtype, shape, partial(_pieces, record, dtype.itemsize))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise MalformedError(f"{path}: {name!r} begins at byte {begin} of the data, expected {position}: a hole or an overlap")
        position = end
    if base + position != size:
        raise MalformedError(f"{path}: truncated: the header describes {base + position} bytes, the file has {size}")
    return entries


def _pieces(record: Record, itemsize: int) -> tuple[Piece, ...]:
    return (Piece(Extent(record, record.offset_bytes, record.nbytes), 0, record.nbytes // itemsize),) if record.nbytes else ()


def _item(path: Path, name: str, item: Any) -> tuple[dtypes.DType, tuple[int, ...], int, int]:
    try:
        dtype = dtypes.BY_SAFETENSORS[item["dtype"]]
        shape = tuple(item["shape"])
        begin, end = item["data_offsets"]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)) or begin > end:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise MalformedError(f"{path}: the header's entry of {name!r} is malformed: {item!r:.120}") from None
    return dtype, shape, begin, end
