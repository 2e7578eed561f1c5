"""Read a ``torch.save`` file: the object in it, as plain data, and where the bytes of its tensors lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.tensors import Extent, Piece
from dsconv.checkpoint.pickles.machine import MAX_PICKLE_BYTES, Machine
from dsconv.checkpoint.pickles.values import StorageRef, TensorRef, safe_repr
from dsconv.checkpoint.storage.local import OpenFile, Span, open_for_reading
from dsconv.checkpoint.torchfile import legacy
from dsconv.checkpoint.torchfile.legacy import storage_of
from dsconv.checkpoint.torchfile.zip import Archive, open_archive
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import quote

MAX_KNOWN = 4096  # pickles of a few hundred bytes each
# The limit for a tensor that repeats its storage (torch's expand). A file of 2 kB can name one of any size.
MAX_EXPANDED_BYTES = 64 << 20

KnownPickles = dict[bytes, tuple[TensorRef, dict[str, int]]]


class TorchFile:
    """A ``.pt`` file whose pickle has been read. It keeps no file handle.

    Attributes:
        path: The file.
        root: The object that was saved, of plain data and the classes of ``pickles.values``.
        archive: The records of the file.
        opaque: How many objects of each class were not read, for classes that are not on the allowlist.
    """

    root: Any
    archive: Archive

    def __init__(
        self,
        path: Path,
        span: Span | None = None,
        known: KnownPickles | None = None,
        *,
        may_hold_unread: bool = False,
    ) -> None:
        """Read the directory and the pickle of a file.

        Args:
            path: The file.
            span: The part of a larger file that is the ``.pt``, such as one item of a ``.distcp``.
            known: Pickles that were read before. Many small files hold the same pickle: its object is kept
                here, and only the storages of the next file are looked up.
            may_hold_unread: Whether tensors that dsconv does not read may stand beside the weights. They become an
                ``UnreadTensor``, so the caller must refuse one in the place of a weight.

        Raises:
            CheckpointNotFoundError: The file does not exist.
            MalformedError: The file is empty, truncated, corrupt, or not written by torch.save.
            UnsupportedError: It is compressed, big-endian, or holds tensors of a kind that dsconv does not read.
            UnsafeError: It calls what no checkpoint needs, or two readers could read it differently.
        """
        self.path = path
        self._known = known
        self._may_hold_unread = may_hold_unread
        self.opaque: dict[str, int] = {}
        self._storages: dict[str, int] = {}  # key → bytes
        if span is not None:
            self._open(span)
            return
        with open_for_reading(path) as file:
            if file.nbytes == 0:
                raise MalformedError(f"{path}: the file is empty")
            if legacy.is_legacy(file):
                machine, self.root, self.archive = legacy.read(file)
                self._take_notes(machine)
            else:
                self._open(file)

    def _open(self, file: OpenFile) -> None:
        path = self.path
        self.archive = open_archive(file)
        data = self._read(file, "data.pkl")
        if "byteorder" in self.archive.records:
            order = self._read(file, "byteorder")
            if order == b"big":
                raise UnsupportedError(f"{path}: saved on a big-endian machine; dsconv reads little-endian files")
            if order != b"little":
                raise MalformedError(f"{path}: the byte order is {safe_repr(order)}; expected little or big")
        self.root = self._unpickled(data)

    def _unpickled(self, data: bytes) -> Any:
        if self._known is None:
            return self._load(data)
        if data in self._known:
            root, self._storages = self._known[data]
            for key, nbytes in self._storages.items():
                self._check_storage(key, nbytes)
            return root
        root = self._load(data)
        if isinstance(root, TensorRef) and len(self._known) < MAX_KNOWN:
            self._known[data] = root, self._storages
        return root

    def _load(self, data: bytes) -> Any:
        machine = Machine(data, self.path, self._persistent, "data.pkl")
        root = machine.run()
        self._take_notes(machine)
        return root

    def _take_notes(self, machine: Machine) -> None:
        self.opaque = machine.opaque
        if machine.unread and not self._may_hold_unread:
            raise UnsupportedError(
                f"{self.path}: it holds a {machine.unread[0]}, a kind of tensor that dsconv does not read; make it a"
                " plain tensor and save it again"
            )

    def _read(self, file: OpenFile, name: str) -> bytes:
        from zlib_ng import zlib_ng

        record = self.archive.records.get(name)
        if record is None:
            raise MalformedError(f"{self.path}: no record {quote(name)}: not written by torch.save")
        if record.nbytes > MAX_PICKLE_BYTES:
            raise MalformedError(f"{self.path}: {name} has {record.nbytes} bytes; the limit is {MAX_PICKLE_BYTES}")
        data = file.read(record.offset_bytes - file.offset_bytes, record.nbytes)
        if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
            raise MalformedError(f"{self.path}: {name} fails its CRC-32: the file was damaged after it was saved")
        return data

    def _persistent(self, pid: Any) -> StorageRef:
        """Return the storage of a persistent id (``torch/serialization.py`` ``persistent_id``)."""
        storage = storage_of(pid, self.path)
        self._check_storage(storage.key, storage.numel * (storage.dtype.itemsize if storage.dtype else 1))
        return storage

    def _check_storage(self, key: str, nbytes: int) -> None:
        record = self.archive.records.get(f"data/{key}")
        if record is None:
            raise MalformedError(f"{self.path}: storage {quote(key)} is named and has no record in the file")
        if nbytes != record.nbytes:
            raise MalformedError(
                f"{self.path}: storage {quote(key)} should have {nbytes} bytes, its record has {record.nbytes}"
            )
        self._storages[key] = nbytes

    def extent(self, tensor: TensorRef, start: int, numel: int) -> Extent:
        """Return where ``numel`` elements of a contiguous tensor lie, from its element ``start``.

        Raises:
            MalformedError: The storage is too small for them.
        """
        record = self.archive.records[f"data/{tensor.storage.key}"]
        itemsize = tensor.dtype.itemsize
        first = (tensor.offset + start) * itemsize
        nbytes = numel * itemsize
        if first + nbytes > record.nbytes:
            raise MalformedError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} reaches byte {first + nbytes} of storage "
                f"{quote(tensor.storage.key)}, which has {record.nbytes}"
            )
        return Extent(record, record.offset_bytes + first, nbytes)

    def pieces(self, tensor: TensorRef) -> tuple[Piece, ...]:
        """Return the one piece that fills the tensor, or none when it has no elements.

        Raises:
            MalformedError: The storage is too small for the tensor.
            UnsupportedError: The tensor repeats its storage into more than ``MAX_EXPANDED_BYTES``.
        """
        if tensor.numel == 0:
            return ()
        if is_contiguous(tensor.shape, tensor.strides):
            return (Piece(self.extent(tensor, 0, tensor.numel), 0, tensor.numel),)
        nbytes = tensor.numel * tensor.dtype.itemsize
        if nbytes > MAX_EXPANDED_BYTES and tensor.numel > tensor.storage.numel:
            raise UnsupportedError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} repeats a storage of {tensor.storage.numel}"
                f" elements to make {nbytes} bytes; the limit is {MAX_EXPANDED_BYTES}. If you trust the file, save it"
                " again after contiguous()"
            )
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        return (Piece(self.extent(tensor, 0, span), 0, tensor.numel, tensor.shape, tensor.strides),)

    def value(self, tensor: TensorRef) -> bytes:
        """Read the bytes of a small contiguous tensor, such as an optimizer's step counter."""
        return read_extent(self.extent(tensor, 0, tensor.numel))


def unread_objects(files: Iterable[TorchFile]) -> dict[str, int]:
    """Return {class: how many objects of it the files hold} for the classes that dsconv does not know."""
    counts: dict[str, int] = {}
    for file in files:
        for label, count in file.opaque.items():
            counts[label] = counts.get(label, 0) + count
    return dict(sorted(counts.items()))


def read_extent(extent: Extent) -> bytes:
    """Read the bytes of a small extent."""
    return read_extents([extent])[0]


def read_extents(extents: Sequence[Extent]) -> list[bytes]:
    """Read the bytes of small extents of any files, in their order. Each file is opened once."""
    by_path: dict[Path, list[int]] = {}
    for number, extent in enumerate(extents):
        by_path.setdefault(extent.record.path, []).append(number)
    found: dict[int, bytes] = {}
    for path, numbers in by_path.items():
        with open_for_reading(path) as file:
            found.update(
                zip(
                    numbers,
                    file.read_many([(extents[n].offset_bytes, extents[n].nbytes) for n in numbers]),
                    strict=True,
                )
            )
    return [found[number] for number in range(len(extents))]


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements lie in row-major order without gaps.

    Args:
        shape: The sizes.
        strides: The strides in elements. That of a dimension of size 1 does not matter.
    """
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
