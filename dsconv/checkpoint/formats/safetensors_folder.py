"""Hugging Face folders of safetensors: one ``model.safetensors``, or shards under an index.

The header is read and held to the rules of safetensors 0.8 (``safetensors/src/tensor.rs``): at most 100 MB of JSON that
starts with ``{``, offsets that leave no hole and do not overlap, sizes that follow from dtype and shape. What it refuses
is refused here; beyond that, a name given twice and an unknown field are refused too, where readers may differ.
"""

from __future__ import annotations

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dsconv.checkpoint import dtypes
from dsconv.checkpoint.standins import MAX_NUMEL, shown
from dsconv.checkpoint.tensormap import Checkpoint, Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.torch_file import open_for_reading
from dsconv.checkpoint.zipfile_reader import read_at
from dsconv.errors import MalformedError, MissingShardError, UnsafeError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000  # safetensors 0.8 MAX_HEADER_SIZE
MAX_INTEGER_DIGITS = 19
FIELDS = {"dtype", "shape", "data_offsets"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def detect(path: Path, tag: str | None = None) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in (INDEX, SINGLE, ADAPTER))


def read(path: Path, tag: str | None = None) -> Checkpoint:
    """Raises MalformedError, MissingShardError, UnsupportedError or UnsafeError (a weight_map that leaves the folder)."""
    warnings: list[str] = []
    if path.is_file():
        files, weight_map, folder = [path], None, path.parent
    elif (path / INDEX).is_file() and not (path / SINGLE).is_file():
        weight_map = _weight_map(path / INDEX)
        files, folder = [path / name for name in dict.fromkeys(weight_map.values())], path
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise MissingShardError(f"{path / INDEX} names {len(missing)} files that are not there, the first {shown(missing[0], 255)}")
    else:
        name = SINGLE if (path / SINGLE).is_file() else ADAPTER
        files, weight_map, folder = [path / name], None, path
        if (path / INDEX).is_file():  # transformers 5.24 modeling_utils.py looks for the single file first
            warnings.append(f"both {SINGLE} and {INDEX} are there: read {SINGLE}, as transformers does")
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_file(file).items():
            if weight_map is not None and weight_map.get(name) != file.name:
                warnings.append(f"{file.name} holds {shown(name)}, which the index does not place there: left out")
            else:
                entries[name] = entry
    lost = [name for name in weight_map or () if name not in entries]
    if lost:
        raise MissingShardError(f"{path / INDEX} places {shown(lost[0])} in {(weight_map or {})[lost[0]]}, which does not hold it")
    return Checkpoint(path, "safetensors", entries, folder=folder, warnings=tuple(warnings), sources=tuple(files))


def _weight_map(path: Path) -> dict[str, str]:
    descriptor = open_for_reading(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_HEADER_BYTES:
            raise MalformedError(f"{path}: an index of {size} bytes; the limit is {MAX_HEADER_BYTES}")
        index = parse_object(read_at(descriptor, size, 0, path), path, "the index")
    finally:
        os.close(descriptor)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file or "\0" in file:
            raise UnsafeError(f"{path}: weight_map puts {shown(name)} in {shown(file)}, outside the folder; refused")
    return weight_map


def parse_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object, held to what serde_json takes: Python's parser guesses encodings, and allows NaN, -0 and half surrogates."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: {what} is not JSON: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: {what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} is given twice")
    for name in found:
        name.encode()  # raises UnicodeEncodeError for half of a surrogate pair, which is no text
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS or digits == "-0":
        raise ValueError(f"the integer {digits:.30}")
    return int(digits)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def read_file(path: Path) -> dict[str, TensorEntry]:
    """The entries of one safetensors file."""
    return read_file_and_metadata(path)[0]


def read_file_and_metadata(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries of one safetensors file, and its ``__metadata__``."""
    descriptor = open_for_reading(path)
    try:
        size = os.fstat(descriptor).st_size
        header_bytes = struct.unpack("<Q", read_at(descriptor, 8, 0, path))[0]
        if 8 + header_bytes > size:
            raise MalformedError(f"{path}: truncated or not safetensors: a header of {header_bytes} bytes in a file of {size}")
        if header_bytes > MAX_HEADER_BYTES:
            raise MalformedError(f"{path}: a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
        raw = read_at(descriptor, header_bytes, 8, path)
    finally:
        os.close(descriptor)
    if not raw.startswith(b"{"):
        raise MalformedError(f"{path}: the header does not start with {{: not safetensors")
    header = parse_object(raw, path, "the header")
    metadata = header.pop("__metadata__", None)
    _check_metadata(path, metadata)
    base = 8 + header_bytes
    spans = []
    entries = {}
    for name, item in header.items():
        dtype, shape, begin, end = _item(path, name, item)
        nbytes = _nbytes(path, name, dtype, shape)
        if end - begin != nbytes:
            raise MalformedError(f"{path}: {shown(name)} of {dtype} {shown(list(shape))} should have {nbytes} bytes, has {end - begin}")
        spans.append((begin, end, name))
        record = Record(path, base + begin, nbytes, None, name)
        entries[name] = TensorEntry(name, dtype, shape, partial(_pieces, record, dtype.itemsize))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise MalformedError(f"{path}: {shown(name)} begins at byte {begin} of the data, expected {position}: a hole or an overlap")
        position = end
    if base + position != size:
        kind = "truncated" if base + position > size else "trailing bytes"
        raise MalformedError(f"{path}: {kind}: the header describes {base + position} bytes, the file has {size}")
    return entries, metadata or {}


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError(f"{path}: __metadata__ maps something else than text to text: {shown(metadata)}")
    try:
        "".join(metadata.values()).encode()
    except UnicodeEncodeError:
        raise MalformedError(f"{path}: __metadata__ holds half of a surrogate pair, which is no text") from None


def _pieces(record: Record, itemsize: int) -> tuple[Piece, ...]:
    return (Piece(Extent(record, record.offset_bytes, record.nbytes), 0, record.nbytes // itemsize),) if record.nbytes else ()


def _item(path: Path, name: str, item: Any) -> tuple[dtypes.DType, tuple[int, ...], int, int]:
    try:
        if not isinstance(item, dict) or item.keys() != FIELDS:
            raise ValueError
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(item["data_offsets"], list):
            raise ValueError
        if not all(type(n) is int and 0 <= n < MAX_NUMEL for n in (*shape, begin, end)) or begin > end:
            raise ValueError
    except (TypeError, ValueError):
        raise MalformedError(f"{path}: the header's entry of {shown(name)} is malformed: {shown(item, 120)}") from None
    if dtype not in dtypes.BY_SAFETENSORS:
        raise UnsupportedError(f"{path}: {shown(name)} is of dtype {shown(dtype)}, which dsconv does not read")
    return dtypes.BY_SAFETENSORS[dtype], tuple(shape), begin, end


def _nbytes(path: Path, name: str, dtype: dtypes.DType, shape: tuple[int, ...]) -> int:
    """The product, in the order in which safetensors multiplies: [2**40, 2**40, 0] overflows there, though nothing is left."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
        if nbytes >= MAX_NUMEL:
            raise MalformedError(f"{path}: {shown(name)} of {dtype} {shown(list(shape))} has more bytes than can be counted")
    return nbytes
