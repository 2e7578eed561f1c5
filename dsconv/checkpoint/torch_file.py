"""A ``torch.save`` file: its object, of plain data and stand-ins, and where the bytes of its tensors lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsconv.checkpoint import unpickler, zipfile_reader
from dsconv.checkpoint.standins import OpaqueClass, StorageKind, StorageRef, TensorRef, shown
from dsconv.checkpoint.tensormap import Extent, Piece
from dsconv.checkpoint.zipfile_reader import Archive, Span
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, UnsupportedError

MAX_KEY_CHARS = 100  # of a storage's name; torch numbers them
MAX_KNOWN = 4096  # pickles of a few hundred bytes each
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch 2.13 torch/serialization.py MAGIC_NUMBER, pickled

KnownPickles = dict[bytes, tuple[TensorRef, dict[str, int]]]


class TorchFile:
    """An opened ``.pt``, or one that is a span of a larger file: ``root`` is what was saved, ``archive`` its records.

    No file handle is kept. ``known`` is shared by files of which many hold the same few bytes of pickle: what one of them
    meant is kept there, and only its storages are looked up again.
    """

    def __init__(self, path: Path, span: Span | None = None, known: KnownPickles | None = None) -> None:
        self.path = path
        self._known = known
        self._storages: dict[str, int] = {}  # key → bytes
        if span is not None:
            self._open(span)
            return
        descriptor = open_for_reading(path)
        try:
            if os.fstat(descriptor).st_size == 0:
                raise MalformedError(f"{path}: the file is empty")
            self._open(Span(descriptor, path))
        finally:
            os.close(descriptor)

    def _open(self, span: Span) -> None:
        path = self.path
        if LEGACY_MAGIC[:10] in span.read(min(16, span.nbytes), 0):
            raise UnsupportedError(
                f"{path}: saved in torch's legacy format, from before torch 1.6 or with "
                "_use_new_zipfile_serialization=False; load it and save it again with a current torch"
            )
        self.archive: Archive = zipfile_reader.open_archive(span)
        data = self._read(span, "data.pkl")
        if "byteorder" in self.archive.records:
            order = self._read(span, "byteorder")
            if order == b"big":
                raise UnsupportedError(f"{path}: saved on a big-endian machine; dsconv reads little-endian files")
            if order != b"little":
                raise MalformedError(f"{path}: the byte order is {shown(order)}; expected little or big")
        self.root: Any = self._unpickled(data)

    def _unpickled(self, data: bytes) -> Any:
        if self._known is None:
            return unpickler.load(data, self.path, self._persistent)
        if data in self._known:
            root, self._storages = self._known[data]
            for key, nbytes in self._storages.items():
                self._check_storage(key, nbytes)
            return root
        root = unpickler.load(data, self.path, self._persistent)
        if isinstance(root, TensorRef) and len(self._known) < MAX_KNOWN:
            self._known[data] = root, self._storages
        return root

    def _read(self, span: Span, name: str) -> bytes:
        from zlib_ng import zlib_ng

        record = self.archive.records.get(name)
        if record is None:
            raise MalformedError(f"{self.path}: no record {name!r}: not written by torch.save")
        if record.nbytes > unpickler.MAX_PICKLE_BYTES:
            raise MalformedError(f"{self.path}: {name} has {record.nbytes} bytes; the limit is {unpickler.MAX_PICKLE_BYTES}")
        data = span.read(record.nbytes, record.offset_bytes - span.offset_bytes)
        if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
            raise MalformedError(f"{self.path}: {name} fails its CRC-32: the file was damaged after it was saved")
        return data

    def _persistent(self, pid: Any) -> StorageRef:
        """A storage from its persistent id (torch 2.13 ``torch/serialization.py`` ``persistent_id``)."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise ValueError("a persistent id that is not a storage's")
        _, kind, key, _, numel = pid[:5]
        if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or type(numel) is not int or numel < 0:
            raise ValueError("a storage id of the wrong types")
        if isinstance(kind, OpaqueClass):
            raise UnsupportedError(f"{self.path}: storage {key!r} is a {kind}, which dsconv does not read")
        if not isinstance(kind, StorageKind):
            raise ValueError("a storage id without a storage class")
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        self._check_storage(key, numel * itemsize)
        return StorageRef(key, kind.dtype, numel)

    def _check_storage(self, key: str, nbytes: int) -> None:
        record = self.archive.records.get(f"data/{key}")
        if record is None:
            raise MalformedError(f"{self.path}: storage {key!r} is named and has no record in the file")
        if nbytes != record.nbytes:
            raise MalformedError(f"{self.path}: storage {key!r} should have {nbytes} bytes, its record has {record.nbytes}")
        self._storages[key] = nbytes

    def extent(self, tensor: TensorRef, start: int, numel: int) -> Extent:
        """The bytes of ``numel`` elements of a contiguous tensor from its element ``start``."""
        record = self.archive.records[f"data/{tensor.storage.key}"]
        itemsize = tensor.dtype.itemsize
        first = (tensor.offset + start) * itemsize
        nbytes = numel * itemsize
        if first + nbytes > record.nbytes:
            raise MalformedError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} reaches byte {first + nbytes} of storage "
                f"{tensor.storage.key!r}, which has {record.nbytes}"
            )
        return Extent(record, record.offset_bytes + first, nbytes)

    def pieces(self, tensor: TensorRef) -> tuple[Piece, ...]:
        """The one piece that fills the tensor, or none when it has no elements."""
        if tensor.numel == 0:
            return ()
        if is_contiguous(tensor.shape, tensor.strides):
            return (Piece(self.extent(tensor, 0, tensor.numel), 0, tensor.numel),)
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        return (Piece(self.extent(tensor, 0, span), 0, tensor.numel, tensor.shape, tensor.strides),)

    def value(self, tensor: TensorRef) -> bytes:
        """The bytes of a small contiguous tensor, such as an optimizer's step counter."""
        extent = self.extent(tensor, 0, tensor.numel)
        return read_extent(extent)


def read_extent(extent: Extent) -> bytes:
    """The bytes of a small extent."""
    descriptor = open_for_reading(extent.record.path)
    try:
        return zipfile_reader.read_at(descriptor, extent.nbytes, extent.offset_bytes, extent.record.path)
    finally:
        os.close(descriptor)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in row-major order without gaps; the stride of a dimension of size 1 does not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def open_for_reading(path: Path) -> int:
    """A descriptor of a regular file; the system's reasons become dsconv's errors."""
    try:
        if not path.is_file():
            raise CheckpointNotFoundError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except DsconvError:
        raise
    except OSError as error:
        raise MalformedError(f"{path}: cannot be read: {error.strerror}") from None
