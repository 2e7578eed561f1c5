"""Hugging Face folders of safetensors: one ``model.safetensors``, or shards under an index.

The header must follow the rules of safetensors 0.8 (``safetensors/src/tensor.rs``): at most 100 MB of JSON that starts
with ``{``, offsets that leave no hole and do not overlap, sizes that follow from dtype and shape. dsconv also refuses a
name given twice and an unknown field, because readers may differ on them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.checks import check_not_hollow, unwrapped
from dsconv.checkpoint.formats.huggingface.index import (
    parse_json,
    pick_file,
    read_indexed,
    read_numbered,
    set_size,
    set_warning,
)
from dsconv.checkpoint.formats.items.models import choose_model
from dsconv.checkpoint.formats.items.optimizers import optimizer_parts
from dsconv.checkpoint.formats.items.state_dicts import Leaf
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_SAFETENSORS, DType
from dsconv.checkpoint.map.tensors import Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.pickles.schema import are_sizes
from dsconv.checkpoint.pickles.values import MAX_NUMEL, safe_repr
from dsconv.checkpoint.storage.local import open_for_reading
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import count

MAX_HEADER_BYTES = 100_000_000  # safetensors 0.8 MAX_HEADER_SIZE
FIELDS = {"dtype", "shape", "data_offsets"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def detect(root: Root, tag: str | None) -> bool:
    """Return whether the root is a safetensors file or a folder with a model or an adapter in safetensors."""
    return holds_weights(root.path)


def holds_weights(path: Path) -> bool:
    """Return whether ``path`` is a safetensors file or a folder with a model or an adapter in safetensors."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in (INDEX, SINGLE, ADAPTER)) or bool(_shards(path))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors")) if folder.is_dir() else []


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the map of a safetensors file or folder.

    Args:
        root: The file or folder.
        tag: Not used: such a folder holds one step.
        item: The stem of the file to take, where accelerate saved several models.

    Raises:
        SeveralModelsError: There are several models, and ``item`` is None.
        MalformedError: A header or the index breaks the rules, or the weights are empty.
        MissingShardError: A file that the index names, or a shard, is missing.
        UnsupportedError: A tensor has a dtype that dsconv does not know, or all are an optimizer's.
        UnsafeError: The index names a file outside the folder.
    """
    return read_folder(root.path, root.fetch, item)


def read_folder(path: Path, fetch: Callable[[Iterable[Path]], None], item: str | None = None) -> Checkpoint:
    """Read the map of a safetensors file or folder; ``fetch`` is ``Root.fetch``. It raises what ``read`` raises."""
    models: dict[str, int] = {}
    warnings: list[str] = []
    if path.is_file():
        entries, files, warnings = read_file(path), [path], set_warning(path)
    elif (path / SINGLE).is_file():
        if (path / INDEX).is_file():  # transformers modeling_utils.py looks for the single file first
            warnings.append(f"both {SINGLE} and {INDEX} are there: read {SINGLE}, as transformers does")
        file, models = pick_file(path, SINGLE, item, lambda file: len(read_file(file)))
        entries, files = read_file(file), [file]
    elif (path / INDEX).is_file():
        entries, files, warnings = read_indexed(path / INDEX, read_file, fetch)
    elif shards := _shards(path):
        fetch(shards)
        entries, files = read_numbered(path, shards, INDEX, read_file), shards
        warnings.append(f"{path} has no {INDEX}: took {count(len(shards), 'file')} by name")
    else:
        entries, files = read_file(path / ADAPTER), [path / ADAPTER]
    folder = path.parent if path.is_file() else path
    warnings = [*warnings, *check_not_hollow(entries, path, (folder, folder.absolute().parent))]
    entries, left_out, more = _without_optimizer(entries, path)
    warnings += more
    entries, removed = unwrapped(entries)
    info: dict[str, Any] = {"adapter": True} if files[0].name == ADAPTER else {}
    if left_out:
        info["left_out"] = left_out
    if removed:
        info["removed_prefixes"] = removed
    if path.is_file() and (of_set := set_size(path)):
        info["one_of_files"] = of_set
    if models:
        info |= {"item": files[0].stem, "models": models}
    return Checkpoint(
        path, "safetensors", entries, folder=folder, info=info, warnings=tuple(warnings), sources=tuple(files)
    )


def _without_optimizer(
    entries: dict[str, TensorEntry], path: Path
) -> tuple[dict[str, TensorEntry], dict[str, int], list[str]]:
    """Return the entries that are a model's, what was left out, and warnings."""
    leaves = {name: Leaf((name,), entry.shape, entry.dtype.floating) for name, entry in entries.items()}
    if not optimizer_parts(leaves).of:
        return entries, {}, []
    items = choose_model(leaves, path)
    return {name: entries[name] for name in items.chosen}, items.left_out, items.warnings


def read_file(path: Path) -> dict[str, TensorEntry]:
    """Read the entries of one safetensors file; raises what ``read_file_and_metadata`` raises."""
    return read_file_and_metadata(path)[0]


def read_file_and_metadata(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the entries of one safetensors file, and its ``__metadata__``.

    Raises:
        MalformedError: The file is cut short, or its header breaks a rule.
        UnsupportedError: A tensor has a dtype that dsconv does not know.
    """
    with open_for_reading(path) as file:
        size = file.nbytes
        header_bytes = struct.unpack("<Q", file.read(0, 8))[0]
        if 8 + header_bytes > size:
            raise MalformedError(
                f"{path}: truncated or not safetensors: a header of {header_bytes} bytes in a file of {size}"
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise MalformedError(f"{path}: a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
        raw = file.read(8, header_bytes)
    if not raw.startswith(b"{"):
        raise MalformedError(f"{path}: the header does not start with {{: not safetensors")
    header = parse_json(raw, path, "the header")
    metadata = header.pop("__metadata__", None)
    _check_metadata(path, metadata)
    base = 8 + header_bytes
    spans = []
    entries = {}
    for name, item in header.items():
        dtype, shape, begin, end = _item(path, name, item)
        nbytes = _nbytes(path, name, dtype, shape)
        if end - begin != nbytes:
            raise MalformedError(
                f"{path}: {safe_repr(name)} of {dtype} {safe_repr(list(shape))} should have {nbytes} bytes, has"
                f" {end - begin}"
            )
        spans.append((begin, end, name))
        record = Record(path, base + begin, nbytes, None, name)
        entries[name] = TensorEntry(name, dtype, shape, partial(_pieces, record, dtype.itemsize))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise MalformedError(
                f"{path}: {safe_repr(name)} begins at byte {begin} of the data, expected {position}: a hole or an"
                " overlap"
            )
        position = end
    if base + position != size:
        kind = "truncated" if base + position > size else "trailing bytes"
        raise MalformedError(f"{path}: {kind}: the header describes {base + position} bytes, the file has {size}")
    return entries, metadata or {}


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError(f"{path}: __metadata__ should map text to text, found {safe_repr(metadata)}")
    try:
        "".join(metadata.values()).encode()
    except UnicodeEncodeError:
        raise MalformedError(f"{path}: __metadata__ holds half of a surrogate pair, which is not text") from None


def _pieces(record: Record, itemsize: int) -> tuple[Piece, ...]:
    return (
        (Piece(Extent(record, record.offset_bytes, record.nbytes), 0, record.nbytes // itemsize),)
        if record.nbytes
        else ()
    )


def _item(path: Path, name: str, item: Any) -> tuple[DType, tuple[int, ...], int, int]:
    try:
        if not isinstance(item, dict) or item.keys() != FIELDS:
            raise ValueError
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(item["data_offsets"], list):
            raise ValueError
        if not are_sizes(shape) or not are_sizes((begin, end)) or begin > end:
            raise ValueError
    except (TypeError, ValueError):
        raise MalformedError(
            f"{path}: the header's entry of {safe_repr(name)} is malformed: {safe_repr(item, 120)}"
        ) from None
    if dtype not in BY_SAFETENSORS:
        raise UnsupportedError(f"{path}: {safe_repr(name)} is of dtype {safe_repr(dtype)}, which dsconv does not read")
    found = BY_SAFETENSORS[dtype]
    sizes = found.map_shape(tuple(shape))
    if sizes is None:
        raise UnsupportedError(
            f"{path}: {safe_repr(name)} of {dtype} {safe_repr(shape)} has rows that do not end with a byte, which"
            " dsconv does not read"
        )
    return found, sizes, begin, end


def _nbytes(path: Path, name: str, dtype: DType, shape: tuple[int, ...]) -> int:
    """Multiply in the order in which safetensors does: [2**40, 2**40, 0] overflows there, though it has no elements."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
        if nbytes >= MAX_NUMEL:
            raise MalformedError(
                f"{path}: {safe_repr(name)} of {dtype} {safe_repr(list(shape))} has more bytes than can be counted"
            )
    return nbytes
