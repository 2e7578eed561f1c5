"""Lay out a DCP directory: the place of each tensor, and the bytes around it.

A DCP directory (``torch/distributed/checkpoint/filesystem.py``) is ``__R_N.distcp`` files of torch.save
zips, each of which holds a chunk of a tensor, and ``.metadata``, a pickle that says which chunk lies where. A reader
loads in full every chunk of which it needs a part. Tensors are therefore cut into chunks of at most CHUNK_BYTES, so
that a rank reads little more than its share.

What is stored is a nested dictionary. A tensor's ``KeyPath`` leads to it there, through keys and the indices of lists,
and the path's parts joined by dots are its flat name (``torch/distributed/checkpoint/_nested_dict.py``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.convert.pickling import Call, Made, Name, Pairs, dump, size
from dsconv.convert.torch_writer import Streamed, TorchArchive
from dsconv.errors import MalformedError
from dsconv.text import quote

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64  # of each tensor's bytes in the file, as torch.save aligns them in its own
METADATA = ".metadata"
SUFFIX = ".distcp"
ROOT = "archive"
VERSION = "1.0.0"  # torch filesystem.py CURRENT_DCP_VERSION

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Item:
    """A tensor of the output: its bytes, and all paths that lead to it."""

    entry: TensorEntry
    paths: tuple[KeyPath, ...]


@dataclass(frozen=True)
class Value:
    """Something small of the output: a number or text, a list of them, or a ``SmallTensor``."""

    value: Any
    path: KeyPath


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor whose elements follow each other, from ``start`` on.

    ``offset_bytes`` is where its zip begins in the file, ``head_bytes`` what comes before the elements in the zip, and
    ``nbytes`` the size of the zip.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    filename: str
    offset_bytes: int
    head_bytes: int
    data_bytes: int
    nbytes: int


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the output, in chunks that follow each other. ``paths`` are all that lead to it."""

    paths: tuple[KeyPath, ...]
    entry: TensorEntry
    dtype: DType
    chunks: tuple[Chunk, ...]

    @cached_property
    def starts(self) -> list[int]:
        return [chunk.start for chunk in self.chunks]

    @property
    def spans(self) -> tuple[tuple[str, int, int], ...]:
        """(file, first element, end) of what lies in each file, in order."""
        found = []
        for filename, chunks in groupby(self.chunks, key=lambda chunk: chunk.filename):
            within = list(chunks)
            found.append((filename, within[0].start, within[-1].start + math.prod(within[-1].sizes)))
        return tuple(found)

    def chunk_at(self, element: int) -> int:
        """Return the number of the chunk that holds an element."""
        return bisect_right(self.starts, element) - 1


@dataclass(frozen=True)
class PlacedValue:
    """Something small of the output. ``tensor`` is None for what is no tensor; its zip lies in ``filename``."""

    path: KeyPath
    tensor: SmallTensor | None
    filename: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class DcpPlan:
    """One DCP directory.

    Attributes:
        folder: Where it lies in the output, such as ``optimizer_0/``; "" for the output itself. The names of all files
            begin with it.
        tensors: What is copied.
        files: The files that the copy fills, and their sizes in bytes.
        values: What else is stored.
        small: The file that holds the values; "" where there are none.
        content: The content of that file.
    """

    folder: str
    tensors: tuple[PlacedTensor, ...]
    files: dict[str, int]
    values: tuple[PlacedValue, ...] = ()
    small: str = ""
    content: bytes = b""

    @property
    def names(self) -> list[str]:
        """The names of all files, ``.metadata`` last."""
        return [*self.files, *([self.small] if self.small else []), self.folder + METADATA]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values()) + len(self.content)


def make_dcp_plan(
    items: Iterable[Item],
    values: Iterable[Value],
    *,
    source: Path,
    dtype: DType | None,
    max_file_bytes: int,
    folder: str = "",
) -> DcpPlan:
    """Lay all tensors out in files, in their order.

    Args:
        items: the tensors.
        values: what is stored beside them.
        source: the checkpoint, for messages.
        dtype: the dtype that floats are cast to; None keeps the stored one.
        max_file_bytes: the size of a file, which only a file of a single chunk exceeds.
        folder: where in the output the directory lies, with a slash behind it.

    Raises:
        MalformedError: there is nothing to write, or two tensors would have one name.
    """
    files: dict[str, int] = {}
    tensors = []
    seen: set[str] = set()
    filename, end = "", max_file_bytes
    for item in items:
        entry = item.entry
        kind = output_dtype(entry.dtype, dtype)
        for path in item.paths:
            _add(flat_name(path), seen, source)
        chunks = []
        start = 0
        for offsets, sizes in split_chunks(entry.shape, kind.itemsize, CHUNK_BYTES):
            nbytes = math.prod(sizes) * kind.itemsize
            archive = chunk_archive(kind, sizes)
            if end + archive.nbytes > max_file_bytes:
                filename, end = file_name(folder, len(files)), 0
            chunks.append(Chunk(offsets, sizes, start, filename, end, archive.streamed[0], nbytes, archive.nbytes))
            end += -(-chunks[-1].nbytes // ALIGNMENT) * ALIGNMENT
            files[filename] = chunks[-1].offset_bytes + chunks[-1].nbytes
            start += math.prod(sizes)
        tensors.append(PlacedTensor(item.paths, entry, kind, tuple(chunks)))
    if not tensors:
        raise MalformedError(f"{source}: there are no tensors to write")
    small = file_name(folder, len(files))
    placed, content = _place_values(values, small, seen, source)
    return DcpPlan(folder, tuple(tensors), files, placed, small if placed else "", content)


def file_name(folder: str, number: int) -> str:
    """Return the name of a file of the output: rank 0 wrote all of them."""
    return f"{folder}__0_{number}{SUFFIX}"


def _place_values(
    values: Iterable[Value], filename: str, seen: set[str], source: Path
) -> tuple[tuple[PlacedValue, ...], bytes]:
    """Lay out what is small, each distinct value once: all parameters mostly have the same step."""
    content = bytearray()
    placed = []
    known: dict[str, tuple[int, int]] = {}
    for value in values:
        _add(flat_name(value.path), seen, source)
        key = repr(value.value)
        if key not in known:
            archive = TorchArchive(ROOT, value.value).whole()
            content += bytes(-len(content) % ALIGNMENT)
            known[key] = (len(content), len(archive))
            content += archive
        tensor = value.value if isinstance(value.value, SmallTensor) else None
        placed.append(PlacedValue(value.path, tensor, filename, *known[key]))
    return tuple(placed), bytes(content)


def _add(name: str, seen: set[str], source: Path) -> None:
    if name in seen:
        raise MalformedError(f"{source}: two tensors would be called {quote(name)}")
    seen.add(name)


def flat_name(path: KeyPath) -> str:
    """Return the name under which ``.metadata`` lists what a path leads to."""
    return ".".join(map(str, path))


def leaves(value: Any, path: KeyPath) -> Iterator[Value]:
    """Yield what a nested value is stored as, as torch's ``_traverse.py`` ``traverse_state_dict`` divides it.

    Dictionaries are followed, and lists that hold a dictionary or a tensor; other lists are one value.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(map(_is_container, value)):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield Value(value, path)


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, SmallTensor)) or (isinstance(value, list) and any(map(_is_container, value)))


def split_chunks(
    shape: tuple[int, ...], itemsize: int, limit_bytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of boxes of at most ``limit_bytes`` that follow each other in row-major order.

    Rows are taken together as far as they fit; a row that does not fit is cut along the next dimension.
    """
    dim = next((d for d in range(len(shape)) if math.prod(shape[d + 1 :]) * itemsize <= limit_bytes), 0)
    if not shape or not math.prod(shape) or math.prod(shape) * itemsize <= limit_bytes:
        yield (0,) * len(shape), shape
        return
    rest = shape[dim + 1 :]
    step = max(1, limit_bytes // (math.prod(rest) * itemsize))
    for index in product(*map(range, shape[:dim])):
        for low in range(0, shape[dim], step):
            yield (*index, low, *(0 for _ in rest)), (*(1 for _ in index), min(step, shape[dim] - low), *rest)


@lru_cache(maxsize=1024)
def chunk_archive(dtype: DType, shape: tuple[int, ...]) -> TorchArchive:
    """Return the torch.save file of a chunk, around its elements."""
    return TorchArchive(ROOT, Streamed(dtype, shape))


def metadata(plan: DcpPlan) -> bytes:
    """Return the ``.metadata`` pickle (``torch/distributed/checkpoint/metadata.py``)."""
    described: dict[str, Made] = {}
    paths: dict[str, KeyPath] = {}
    stored: list[tuple[Made, Made]] = []
    for tensor in plan.tensors:
        boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
        for path in tensor.paths:
            key = flat_name(path)
            paths[key] = path
            described[key] = _tensor_metadata(tensor.dtype, tensor.entry.shape, boxes)
            for number, chunk in enumerate(tensor.chunks):
                where = _storage(plan, chunk.filename, chunk.offset_bytes, chunk.nbytes)
                stored.append((_index(key, chunk.offsets, number), where))
    for value in plan.values:
        key = flat_name(value.path)
        paths[key] = value.path
        where = _storage(plan, value.filename, value.offset_bytes, value.nbytes)
        if value.tensor is None:
            described[key] = Made(_named("BytesStorageMetadata"), None)
            stored.append((_index(key, None, None), where))
        else:
            origin, shape = (0,) * len(value.tensor.shape), value.tensor.shape
            described[key] = _tensor_metadata(value.tensor.dtype, shape, [(origin, shape)])
            stored.append((_index(key, origin, 0), where))
    fields = {
        "state_dict_metadata": described,
        "planner_data": paths,
        "storage_data": Pairs(tuple(stored)),
        "storage_meta": None,
        "version": VERSION,
    }
    return dump(Made(_named("Metadata"), fields))


def _named(name: str) -> Name:
    return Name("torch.distributed.checkpoint.metadata", name)


def _tensor_metadata(
    dtype: DType, shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Made:
    strided = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(_named("_MEM_FORMAT_ENCODING"), (0,))
    properties = Made(_named("TensorProperties"), (Name("torch", dtype.name), strided, False, contiguous, False))
    chunks = [
        Made(_named("ChunkStorageMetadata"), {"offsets": size(offsets), "sizes": size(sizes)})
        for offsets, sizes in boxes
    ]
    return Made(_named("TensorStorageMetadata"), {"properties": properties, "size": size(shape), "chunks": chunks})


def _index(key: str, offsets: tuple[int, ...] | None, number: int | None) -> Made:
    fields = {"fqn": key, "offset": None if offsets is None else size(offsets), "index": number}
    return Made(_named("MetadataIndex"), fields)


def _storage(plan: DcpPlan, filename: str, offset_bytes: int, nbytes: int) -> Made:
    info = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    name = filename.removeprefix(plan.folder)
    return Made(info, {"relative_path": name, "offset": offset_bytes, "length": nbytes})
