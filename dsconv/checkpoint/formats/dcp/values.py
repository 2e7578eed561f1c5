"""Read the small values of a DCP directory: settings, step counters, the state of a learning-rate schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.dcp.chunks import ChunkFiles, require_files
from dsconv.checkpoint.formats.dcp.metadata import Metadata, Stored, TensorMeta
from dsconv.checkpoint.formats.items.state_dicts import Leaf, Parts
from dsconv.checkpoint.map.tensors import Extent
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.torchfile.file import read_extents
from dsconv.checkpoint.torchfile.plain import MAX_SMALL_BYTES
from dsconv.errors import MalformedError, UnsupportedError


@dataclass(frozen=True)
class Directory:
    """A DCP directory whose items are known.

    Attributes:
        folder: The directory.
        metadata: What ``read_metadata`` returned.
        leaves: Its items, by flat name.
        holders: ``OptimizerParts.holders``.
    """

    folder: Path
    metadata: Metadata
    leaves: Mapping[str, Leaf]
    holders: Mapping[str, Parts]


def places_of(metadata: Metadata, flats: Iterable[str]) -> dict[str, Stored]:
    """Return where each of some small items lies; what is stored nowhere is left out.

    Raises:
        UnsupportedError: A tensor is cut into several chunks, or larger than a setting, or of an unknown dtype.
    """
    found: dict[str, Stored] = {}
    for flat in flats:
        meta = metadata.tensors.get(flat)
        if meta is None:
            if (stored := metadata.objects.get(flat)) is not None:
                found[flat] = stored
            continue
        chunks = list(meta.chunks.values())
        if meta.dtype is None or len(chunks) > 1 or _nbytes(meta) > MAX_SMALL_BYTES:
            raise UnsupportedError(
                f"{meta.path}: {safe_repr(flat)} is of {meta.dtype_name} and shape {list(meta.shape)} in {len(chunks)}"
                " parts; expected a number or a few"
            )
        if chunks:
            found[flat] = chunks[0][2][0]
    return found


def _nbytes(meta: TensorMeta) -> int:
    nbytes = meta.dtype.itemsize if meta.dtype is not None else 1
    for size in meta.shape:
        nbytes *= size
    return nbytes


def read_values(metadata: Metadata, flats: Collection[str], folder: Path) -> dict[str, Any]:
    """Read small items.

    Args:
        metadata: What ``read_metadata`` returned.
        flats: The flat names of the items.
        folder: The folder with the ``.distcp`` files.

    Returns:
        Plain values, and tensors as SmallTensors, by flat name.

    Raises:
        MissingShardError: A file that the metadata names is missing.
        MalformedError: An item is damaged or stored nowhere.
        InconsistentCheckpointError: An item belongs to another save.
        UnsupportedError: An item is not a plain value.
    """
    places = places_of(metadata, flats)
    for flat in flats:
        meta = metadata.tensors.get(flat)
        if flat not in places and (meta is None or _nbytes(meta)):
            raise MalformedError(f"{folder}: {safe_repr(flat)} is stored nowhere; the save did not finish")
    require_files(folder, {stored.file for stored in places.values()}, metadata)
    values: dict[str, Any] = {}
    extents: dict[str, Extent] = {}
    with ChunkFiles(folder) as files:
        for flat, stored in sorted(places.items(), key=lambda item: (item[1].file, item[1].offset_bytes)):
            meta = metadata.tensors.get(flat)
            if meta is None:
                values[flat] = files.value(flat, stored)
            elif meta.dtype is not None:
                piece = files.piece(flat, meta.dtype, meta.shape, stored)
                if piece.strides is not None:
                    raise UnsupportedError(f"{meta.path}: {safe_repr(flat)} is not contiguous; expected a few numbers")
                extents[flat] = piece.extent
        found = dict(zip(extents, read_extents(list(extents.values())), strict=True))
    for flat in flats:
        if (meta := metadata.tensors.get(flat)) is not None and meta.dtype is not None:
            values[flat] = SmallTensor(meta.dtype, meta.shape, found.get(flat, b""))
    return {flat: values[flat] for flat in flats}


def nested(leaves: Mapping[str, Leaf], values: Mapping[str, Any], above: int) -> dict[str, Any]:
    """Return values in the dictionaries and lists that they were flattened from.

    Args:
        leaves: Every item of the checkpoint, by its flat name.
        values: The values, by flat name.
        above: The number of keys at the beginning of each path that are left out.
    """
    root: dict[str, Any] = {}
    for flat, value in values.items():
        path: Parts = leaves[flat].path[above:]
        node = root
        for part in path[:-1]:
            inner = node.setdefault(part, {})
            if not isinstance(inner, dict):
                raise MalformedError(f"{safe_repr(flat)} lies in {safe_repr(part)}, which is a value itself")
            node = inner
        node[path[-1]] = value
    return {key: _with_lists(value) for key, value in root.items()}


def _with_lists(value: Any) -> Any:
    """Turn dictionaries whose keys are 0, 1, … back into the lists that they were."""
    if not isinstance(value, dict):
        return value
    if value and list(value) == [str(number) for number in range(len(value))]:
        return [_with_lists(inner) for inner in value.values()]
    return {key: _with_lists(inner) for key, inner in value.items()}


def number_of(value: Any) -> float | int | None:
    """Return a number, or the only element of a small tensor; None for anything else."""
    if isinstance(value, SmallTensor):
        return value.number
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
