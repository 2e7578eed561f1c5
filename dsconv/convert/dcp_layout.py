"""Lay out a DCP directory: the place of each tensor, and the bytes around it.

A DCP directory (``torch/distributed/checkpoint/filesystem.py``) is ``__R_N.distcp`` files of torch.save
zips, each of which holds a chunk of a tensor, and ``.metadata``, a pickle that says which chunk lies where. A reader
loads in full every chunk of which it needs a part. Tensors are therefore cut into chunks of at most CHUNK_BYTES, so
that a rank reads little more than its share.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.convert.pickling import Call, Made, Name, Pairs, dump, size
from dsconv.convert.plan import require_whole_set
from dsconv.convert.torch_writer import Streamed, TorchArchive
from dsconv.errors import MalformedError
from dsconv.text import quote

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64  # of each tensor's bytes in the file, as torch.save aligns them in its own
METADATA = ".metadata"
SUFFIX = ".distcp"
ROOT = "archive"
VERSION = "1.0.0"  # torch filesystem.py CURRENT_DCP_VERSION


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
    """One tensor of the output, in chunks that follow each other. ``names`` lists all of its names."""

    names: tuple[str, ...]
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
class DcpPlan:
    """The whole output.

    Attributes:
        tensors: in the order of the files.
        files: names and sizes in bytes.
        prefix: the keys before every name.
        folder: the folder of all files within the output, with its ``/``; "" for the output itself.
    """

    tensors: tuple[PlacedTensor, ...]
    files: dict[str, int]
    prefix: tuple[str, ...]
    folder: str = ""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def data_bytes(self) -> int:
        return sum(chunk.data_bytes for tensor in self.tensors for chunk in tensor.chunks)


def make_dcp_plan(
    checkpoint: Checkpoint,
    *,
    dtype: DType | None,
    prefix: str,
    max_file_bytes: int,
    extra_names: dict[str, list[str]],
    folder: str = "",
) -> DcpPlan:
    """Lay all tensors out in files, in the checkpoint's order.

    Args:
        checkpoint: the source.
        dtype: the dtype that floats are cast to; None keeps the stored one.
        prefix: goes before every name, such as ``model.``.
        max_file_bytes: the size of a file, which only a file of a single chunk exceeds.
        extra_names: further names of each tensor, by its own name.
        folder: the folder of all files within the output, with its ``/``.

    Raises:
        MalformedError: there is nothing to write, or two tensors would have one name.
        MissingShardError: the checkpoint is one file of several.
    """
    require_whole_set(checkpoint)
    path = tuple(prefix.rstrip(".").split(".")) if prefix else ()
    files: dict[str, int] = {}
    tensors = []
    seen: set[str] = set()
    filename, end = "", max_file_bytes
    for entry in checkpoint.values():
        kind = output_dtype(entry.dtype, dtype)
        names = tuple(dict.fromkeys((entry.name, *entry.aliases, *extra_names.get(entry.name, ()))))
        for name in names:
            if name in seen:
                raise MalformedError(f"{checkpoint.path}: two tensors would be called {quote(name)}")
            seen.add(name)
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
        tensors.append(PlacedTensor(names, entry, kind, tuple(chunks)))
    if not tensors:
        raise MalformedError(f"{checkpoint.path}: there are no tensors to write")
    return DcpPlan(tuple(tensors), files, path, folder)


def file_name(folder: str, number: int) -> str:
    """Return the name of a file of the output: rank 0 wrote all of them."""
    return f"{folder}__0_{number}{SUFFIX}"


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


def metadata(plan: DcpPlan, objects: Iterable[str] = (), place: tuple[str, int] = ("", 0)) -> bytes:
    """Return the ``.metadata`` pickle (``torch/distributed/checkpoint/metadata.py``).

    Args:
        plan: the tensors.
        objects: the keys of pickled objects, which are all equal and stored once.
        place: the file that holds the object, and its size in bytes.
    """
    described: dict[str, Made] = {}
    paths: dict[str, tuple[str, ...]] = {}
    stored: list[tuple[Made, Made]] = []
    for tensor in plan.tensors:
        for name in tensor.names:
            key = ".".join((*plan.prefix, name))
            paths[key] = (*plan.prefix, name)
            described[key] = _tensor_metadata(tensor)
            stored += _storage(key, tensor.chunks)
    for key in objects:
        described[key] = Made(_named("BytesStorageMetadata"), None)
        index = Made(_named("MetadataIndex"), {"fqn": key, "offset": None, "index": None})
        stored.append((index, _info(place[0], 0, place[1])))
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


def _tensor_metadata(tensor: PlacedTensor) -> Made:
    strided = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(_named("_MEM_FORMAT_ENCODING"), (0,))
    properties = Made(_named("TensorProperties"), (Name("torch", tensor.dtype.name), strided, False, contiguous, False))
    chunks = [
        Made(_named("ChunkStorageMetadata"), {"offsets": size(c.offsets), "sizes": size(c.sizes)})
        for c in tensor.chunks
    ]
    return Made(
        _named("TensorStorageMetadata"), {"properties": properties, "size": size(tensor.entry.shape), "chunks": chunks}
    )


def _storage(key: str, chunks: Iterable[Chunk]) -> Iterator[tuple[Made, Made]]:
    for index, chunk in enumerate(chunks):
        place = {"fqn": key, "offset": size(chunk.offsets), "index": index}
        yield Made(_named("MetadataIndex"), place), _info(chunk.filename, chunk.offset_bytes, chunk.nbytes)


def _info(filename: str, offset_bytes: int, nbytes: int) -> Made:
    name = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    beside = filename.rpartition("/")[2]  # the files lie beside .metadata
    return Made(name, {"relative_path": beside, "offset": offset_bytes, "length": nbytes})
