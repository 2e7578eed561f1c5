"""Where each tensor goes in a DCP directory, and the bytes around it.

A DCP directory (torch 2.13 ``torch/distributed/checkpoint/filesystem.py``) is ``__R_N.distcp`` files of torch.save
zips, one a chunk of a tensor, and ``.metadata``, a pickle that says which chunk lies where. A reader loads every chunk
that it needs a part of in full, so tensors are cut into chunks of at most CHUNK_BYTES: a rank then reads little more
than its share.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from dsconv.checkpoint.map.dtypes import STORAGE_CLASSES, DType
from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import output_dtype
from dsconv.convert.pickling import Call, Made, Name, Pairs, Stored, dump, size
from dsconv.errors import MalformedError

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64  # of each tensor's bytes in the file, as torch.save aligns them in its own
METADATA = ".metadata"
SUFFIX = ".distcp"
ROOT = "archive"
VERSION = "1.0.0"  # torch 2.13 filesystem.py CURRENT_DCP_VERSION
STORAGES = {dtype: name for name, dtype in STORAGE_CLASSES.items()}
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that is one run of it: its elements from ``start`` on. ``offset_bytes`` is that of its zip
    in the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    filename: str
    offset_bytes: int
    head_bytes: int
    data_bytes: int
    nbytes: int  # of the zip


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the output, in chunks that follow each other; ``names`` are all that it is found under."""

    names: tuple[str, ...]
    entry: TensorEntry
    dtype: DType
    chunks: tuple[Chunk, ...]

    @cached_property
    def starts(self) -> list[int]:
        return [chunk.start for chunk in self.chunks]

    def chunk_at(self, element: int) -> int:
        """The number of the chunk that holds an element."""
        return bisect_right(self.starts, element) - 1


@dataclass(frozen=True)
class DcpPlan:
    """``files`` are names and sizes in bytes."""

    tensors: tuple[PlacedTensor, ...]
    files: dict[str, int]
    prefix: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def data_bytes(self) -> int:
        return sum(chunk.data_bytes for tensor in self.tensors for chunk in tensor.chunks)


def make_dcp_plan(
    checkpoint: Checkpoint, *, dtype: DType | None, prefix: str, max_file_bytes: int, extra_names: dict[str, list[str]]
) -> DcpPlan:
    """Lay all tensors out in files of at most ``max_file_bytes`` (but at least one chunk each), in the checkpoint's
    order.

    ``prefix`` such as ``model.`` goes before every name; ``extra_names`` are names to find a tensor under besides its
    own. Raises MalformedError when there is nothing to write or two tensors would have one name.
    """
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
                raise MalformedError(f"{checkpoint.path}: two tensors would be called {name!r}")
            seen.add(name)
        chunks = []
        start = 0
        for offsets, sizes in split_chunks(entry.shape, kind.itemsize, CHUNK_BYTES):
            nbytes = math.prod(sizes) * kind.itemsize
            head, tail = zip_around(data_pickle(kind, sizes), nbytes, 0)
            if end + len(head) + nbytes + len(tail) > max_file_bytes:
                filename, end = f"__0_{len(files)}{SUFFIX}", 0
            chunks.append(
                Chunk(offsets, sizes, start, filename, end, len(head), nbytes, len(head) + nbytes + len(tail))
            )
            end += -(-chunks[-1].nbytes // ALIGNMENT) * ALIGNMENT
            files[filename] = chunks[-1].offset_bytes + chunks[-1].nbytes
            start += math.prod(sizes)
        tensors.append(PlacedTensor(names, entry, kind, tuple(chunks)))
    if not tensors:
        raise MalformedError(f"{checkpoint.path}: there are no tensors to write")
    return DcpPlan(tuple(tensors), files, path)


def split_chunks(
    shape: tuple[int, ...], itemsize: int, limit_bytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes of at most ``limit_bytes`` that follow each other in row-major order.

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


def data_pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """``data.pkl`` of a contiguous tensor, as torch.save writes it (torch 2.13 ``torch/_tensor.py``,
    ``_reduce_ex_internal``).
    """
    strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    numel = math.prod(shape)
    hooks = Call(Name("collections", "OrderedDict"), ())
    if dtype.name in STORAGES:
        storage = Stored(("storage", Name("torch", STORAGES[dtype.name]), "0", "cpu", numel))
        return dump(Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, hooks)))
    untyped = Stored(("storage", Name("torch.storage", "UntypedStorage"), "0", "cpu", numel * dtype.itemsize))
    return dump(
        Call(
            Name("torch._utils", "_rebuild_tensor_v3"),
            (untyped, 0, shape, strides, False, hooks, Name("torch", dtype.name)),
        )
    )


def zip_around(pickle: bytes, nbytes: int, data_crc32: int) -> tuple[bytes, bytes]:
    """What makes a zip of the ``nbytes`` of a tensor: the bytes before and after them. Their lengths do not depend
    on the CRC-32.
    """
    head, directory = bytearray(), bytearray()
    records = [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", None)]
    for name, content in records:
        path = f"{ROOT}/{name}".encode()
        crc, length = (data_crc32, nbytes) if content is None else (crc32(content), len(content))
        extra = b""
        if content is None:  # torch.save pads with a field called FB too
            gap = -(len(head) + _LOCAL.size + len(path) + 4) % ALIGNMENT
            extra = b"FB" + struct.pack("<H", gap) + b"Z" * gap
        central = _CENTRAL.pack(
            b"PK\x01\x02", 0, 0, 0, 0, 0, 0, crc, length, length, len(path), 0, 0, 0, 0, 0, len(head)
        )
        directory += central + path
        head += (
            _LOCAL.pack(b"PK\x03\x04", 0, 0, 0, 0, 0, crc, length, length, len(path), len(extra))
            + path
            + extra
            + (content or b"")
        )
    end = _END.pack(b"PK\x05\x06", 0, 0, len(records), len(records), len(directory), len(head) + nbytes, 0)
    return bytes(head), bytes(directory + end)


def metadata(plan: DcpPlan) -> bytes:
    """The ``.metadata`` pickle (torch 2.13 ``torch/distributed/checkpoint/metadata.py``)."""
    described: dict[str, Made] = {}
    paths: dict[str, tuple[str, ...]] = {}
    stored: list[tuple[Made, Made]] = []
    for tensor in plan.tensors:
        for name in tensor.names:
            key = ".".join((*plan.prefix, name))
            paths[key] = (*plan.prefix, name)
            described[key] = _tensor_metadata(tensor)
            stored += _storage(key, tensor.chunks)
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
    info = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    for index, chunk in enumerate(chunks):
        yield (
            Made(_named("MetadataIndex"), {"fqn": key, "offset": size(chunk.offsets), "index": index}),
            Made(info, {"relative_path": chunk.filename, "offset": chunk.offset_bytes, "length": chunk.nbytes}),
        )
