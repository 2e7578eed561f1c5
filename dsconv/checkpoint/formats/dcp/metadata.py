"""Read the ``.metadata`` of a torch.distributed.checkpoint directory: its tensors and where their chunks lie.

It is a bare pickle of ``Metadata`` (``torch/distributed/checkpoint/metadata.py``): ``state_dict_metadata``
gives the dtype, the full shape and the chunks of each tensor; ``storage_data`` maps ``MetadataIndex(fqn, offset)`` to a
span of a file (``_StorageInfo`` of ``filesystem.py``); ``planner_data`` maps each flat name to the path it had in the
nested state dict, which is the only safe way back. Everything is checked here before it is used.

A save without collectives writes ``__R.metadata`` on each rank R, with only that rank's chunks. Each rank then stores
its own copy of tensors that all ranks hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from dsconv.checkpoint.formats.huggingface.index import MAX_NAME_BYTES
from dsconv.checkpoint.formats.items.state_dicts import MAX_DEPTH
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.regions import Sizes
from dsconv.checkpoint.pickles import machine
from dsconv.checkpoint.pickles.schema import are_sizes, is_name, wrong_name
from dsconv.checkpoint.pickles.values import MAX_NUMEL, Instance, safe_repr
from dsconv.checkpoint.storage.local import open_for_reading
from dsconv.errors import (
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    UnsafeError,
)
from dsconv.text import count

METADATA = ".metadata"
FIRST_RANK_METADATA = "__0.metadata"
RANK_METADATA = re.compile(r"__(?P<rank>\d+)\.metadata")
RANK_FILE = re.compile(r"__(?P<rank>\d+)_\d+\.distcp")
PACKAGE = "torch.distributed.checkpoint"
MAX_CHUNKS = 50_000_000
MAX_PATH_CHARS = 1000


@dataclass(frozen=True)
class Stored:
    """Where an item lies: ``nbytes`` bytes from ``offset_bytes`` on in ``file``, after ``transforms`` were applied."""

    file: str
    offset_bytes: int
    nbytes: int
    transforms: tuple[str, ...] = ()


@dataclass
class TensorMeta:
    """A tensor of the metadata.

    Attributes:
        dtype: None if dsconv does not know it; ``dtype_name`` has the name in any case.
        shape: The full shape, in elements.
        chunks: (offsets, sizes, the places where it is stored) of each chunk, by ``_key`` of offsets and sizes.
        path: The metadata file that names it.
    """

    dtype: DType | None
    dtype_name: str
    shape: Sizes
    chunks: dict[str, tuple[Sizes, Sizes, list[Stored]]]
    path: Path


@dataclass
class Metadata:
    """The content of all metadata files of a directory.

    Attributes:
        tensors: By flat name.
        objects: Items that are not tensors, by flat name.
        paths: planner_data: the path of each flat name in the nested state dict.
        files: The metadata files.
        stored: (offset, bytes, flat name) of each item in each file, both in bytes.
    """

    tensors: dict[str, TensorMeta] = field(default_factory=dict)
    objects: dict[str, Stored | None] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    # File → (offset, bytes, name) of each item.
    stored: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """The number of ranks that wrote files."""
        return len({match["rank"] for name in self.stored if (match := RANK_FILE.fullmatch(name))})


def metadata_files(folder: Path) -> list[Path]:
    """Return ``.metadata``, or if it is missing the ranks' own metadata files in order.

    Raises:
        MissingShardError: The metadata file of a rank is missing.
    """
    if (folder / METADATA).is_file():
        return [folder / METADATA]
    found = {int(match["rank"]): path for path in folder.iterdir() if (match := RANK_METADATA.fullmatch(path.name))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise MissingShardError(
            f"{folder}: {count(len(found), 'rank')} wrote their own metadata, the last __{max(found)}.metadata, and"
            f" __{missing[0]}.metadata is missing: copy the files of all ranks into one folder"
        )
    return [path for _, path in sorted(found.items())]


def read_metadata(folder: Path) -> Metadata:
    """Read and check all metadata files of a directory.

    Raises:
        MalformedError: A file is damaged, or was not written by torch.
        InconsistentCheckpointError: Files from two saves lie there.
        MissingShardError: The metadata file of a rank is missing.
        UnsafeError: The pickle calls something, or a chunk's file lies outside the folder.
    """
    whole = Metadata()
    for path in metadata_files(folder):
        _add(whole, path)
    for file, items in whole.stored.items():
        items.sort()
        for (start, nbytes, name), (following, length, other) in pairwise(items):
            # A tied weight may be stored once under all of its names, as to-dcp does. Any other overlap is damage.
            if following < start + nbytes and (following, length) != (start, nbytes):
                raise MalformedError(
                    f"{whole.files[0]}: {safe_repr(name)} and {safe_repr(other)} share byte {following} of"
                    f" {safe_repr(file, 255)}: damaged, or not written by torch"
                )
    return whole


def _load(path: Path) -> Any:
    with open_for_reading(path) as file:
        if file.nbytes > machine.MAX_PICKLE_BYTES:
            raise MalformedError(f"{path}: {file.nbytes} bytes of metadata; the limit is {machine.MAX_PICKLE_BYTES}")
        data = file.read(0, file.nbytes)
    return machine.load(data, path, _no_storage, "the metadata")


def _no_storage(pid: Any) -> Any:
    raise ValueError("a persistent id, which metadata does not use")


def _add(whole: Metadata, path: Path) -> None:
    root = _instance(_load(path), "Metadata", path)
    tensors, storage = root.get("state_dict_metadata"), root.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise MalformedError(
            f"{path}: no state_dict_metadata or no storage_data: not the metadata of a whole checkpoint"
        )
    places = _places(storage, path)
    for name, meta in tensors.items():
        if not is_name(name):
            raise wrong_name(name, path, "the name of an item")
        if isinstance(meta, Instance) and meta.cls.endswith(".BytesStorageMetadata"):
            whole.objects.setdefault(name, places.get((name, _key(None))))
            continue
        _add_tensor(whole, name, _tensor(name, _instance(meta, "TensorStorageMetadata", path), places, path))
    planner = root.get("planner_data")
    for name, parts in planner.items() if isinstance(planner, dict) else ():
        if isinstance(name, str) and name in tensors:
            whole.paths.setdefault(name, _path(name, parts, path))
    for (name, _), stored in places.items():
        whole.stored.setdefault(stored.file, []).append((stored.offset_bytes, stored.nbytes, name))
    whole.files.append(path)


def _path(name: str, parts: Any, path: Path) -> tuple[str, ...]:
    """Return the keys that lead to an item in the nested state dict; a list's are numbers."""
    if (
        not isinstance(parts, (tuple, list))
        or not 0 < len(parts) <= MAX_DEPTH
        or not all(type(part) is int or is_name(part) for part in parts)
    ):
        raise MalformedError(f"{path}: planner_data leads to {safe_repr(name)} by {safe_repr(parts)}; expected keys")
    return tuple(map(str, parts))


def _add_tensor(whole: Metadata, name: str, tensor: TensorMeta) -> None:
    known = whole.tensors.setdefault(name, tensor)
    if known is tensor:
        return
    if (known.dtype_name, known.shape) != (tensor.dtype_name, tensor.shape):
        raise InconsistentCheckpointError(
            f"{tensor.path}: {safe_repr(name)} is {tensor.dtype_name} {list(tensor.shape)}, in {known.path.name}"
            f" {known.dtype_name} {list(known.shape)}: files from two saves; copy those of one again"
        )
    for key, (offsets, sizes, stored) in tensor.chunks.items():
        known.chunks.setdefault(key, (offsets, sizes, []))[2].extend(stored)


def _instance(value: Any, name: str, path: Path) -> Instance:
    if not isinstance(value, Instance) or value.cls.rpartition(".")[2] != name:
        raise MalformedError(
            f"{path}: not a checkpoint's metadata: expected {PACKAGE}'s {name}, found {safe_repr(value)}"
        )
    return value


def _key(*sizes: Sizes | None) -> str:
    """Return sizes as the key of a dictionary: as text, because a file can choose numbers whose hashes collide."""
    return str(sizes)


def _places(storage: dict[Any, Any], path: Path) -> dict[tuple[str, str], Stored]:
    places: dict[tuple[str, str], Stored] = {}
    files: dict[str, str] = {}
    for key, value in storage.items():
        index, info = _instance(key, "MetadataIndex", path), _instance(value, "_StorageInfo", path)
        name, offset = index.get("fqn"), index.get("offset")
        if not is_name(name) or not (offset is None or _are_sizes(offset)):
            raise MalformedError(f"{path}: storage_data has the key {safe_repr(name)} at {safe_repr(offset)}")
        file, start, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str):
            raise MalformedError(f"{path}: a chunk lies in {safe_repr(file)}, which is not the name of a file")
        if file not in files:
            files[file] = _inside(file, path)
        if not (type(start) is int and type(nbytes) is int and 0 <= start < MAX_NUMEL and 0 <= nbytes < MAX_NUMEL):
            raise MalformedError(
                f"{path}: {safe_repr(name)} is stored in {safe_repr(nbytes)} bytes at {safe_repr(start)}"
            )
        transforms = info.get("transform_descriptors") or ()
        if not isinstance(transforms, (list, tuple)) or not all(isinstance(t, str) for t in transforms):
            raise MalformedError(f"{path}: {safe_repr(name)} is transformed by {safe_repr(transforms)}")
        places[name, _key(offset)] = Stored(files[file], start, nbytes, tuple(transforms))
    return places


def _inside(file: str, path: Path) -> str:
    parts = PurePosixPath(file)
    if not file or parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file or not parts.name:
        raise UnsafeError(f"{path}: a chunk lies in {safe_repr(file, 255)}, outside the folder; refused to read it")
    if (
        any(len(part.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES for part in parts.parts)
        or len(file) > MAX_PATH_CHARS
    ):
        raise MalformedError(f"{path}: a chunk lies in {safe_repr(file, 255)}, a name longer than any file has")
    return str(parts)


def _tensor(name: str, meta: Instance, places: dict[tuple[str, str], Stored], path: Path) -> TensorMeta:
    shape, chunks = meta.get("size"), meta.get("chunks")
    properties = _instance(meta.get("properties"), "TensorProperties", path).state
    dtype = (
        properties.get("dtype")
        if isinstance(properties, dict)
        else properties[0]
        if isinstance(properties, tuple) and properties
        else None
    )
    if not _are_sizes(shape) or not isinstance(chunks, list) or len(chunks) > MAX_CHUNKS or dtype is None:
        raise MalformedError(f"{path}: {safe_repr(name)} has no dtype, size or chunks")
    found: dict[str, tuple[Sizes, Sizes, list[Stored]]] = {}
    for item in chunks:
        chunk = _instance(item, "ChunkStorageMetadata", path)
        offsets, sizes = chunk.get("offsets"), chunk.get("sizes")
        if not _are_sizes(offsets) or not _are_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise MalformedError(
                f"{path}: {safe_repr(name)} of shape {safe_repr(shape)} has a chunk of {safe_repr(sizes)} at"
                f" {safe_repr(offsets)}"
            )
        if 0 in sizes:
            continue  # a rank with no share of the tensor
        stored = places.get((name, _key(offsets)))
        if stored is None:
            raise MalformedError(f"{path}: {safe_repr(name)} has a chunk at {list(offsets)} that is stored nowhere")
        found[_key(offsets, sizes)] = offsets, sizes, [stored]
    return TensorMeta(
        dtype if isinstance(dtype, DType) else None, safe_repr(dtype).removeprefix("torch."), shape, found, path
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and are_sizes(value)
