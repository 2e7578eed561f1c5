"""Write a ``.pt`` as torch.save does, around bytes that follow later.

A ``TorchArchive`` lays the file out: its pickle, its zip records, and where each storage's bytes go. The caller puts
those there in any order (a ``Streamed`` tensor) and then writes ``fixed``, which is everything else, with the CRC-32s
that are known only when the copy is finished. No byte depends on one that comes after it, so a file can also be written
from its first byte to its last. torch is not needed.

The format is that of torch: ``torch/serialization.py`` (``_save``: data.pkl, byteorder, data/<key>, version;
persistent ids), ``torch/_utils.py`` (``_rebuild_tensor_v2``), ``torch/_tensor.py`` (``_reduce_ex_internal``: a dtype
without a storage class is written by ``_rebuild_tensor_v3``), ``caffe2/serialize/inline_container.cc`` (records under
one root, stored, aligned to 64 bytes by an extra field; the reader wants ``version``). The CRC-32 of a streamed tensor
stands behind its data, as torch writes that of every record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsconv.checkpoint.map.dtypes import STORAGE_CLASSES, DType
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import Instance
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.convert.pickling import Call, Made, Name, Stored, dump
from dsconv.errors import UnsupportedError

ALIGNMENT_BYTES = 64
MAX_PICKLE_BYTES = 64 << 20
FULL32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")
_UTF8 = 0x800
_CHECKSUM_FOLLOWS = 0x8  # and the sizes: a descriptor behind the data has them
_DATE = 0x21  # 1 January 1980, as torch writes
_STORAGES = {dtype: Name("torch", storage) for storage, dtype in STORAGE_CLASSES.items()}
_NO_HOOKS = Call(Name("collections", "OrderedDict"), ())


@dataclass(frozen=True)
class Streamed:
    """A contiguous tensor whose bytes are put into the file after its layout is fixed."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        nbytes = self.dtype.itemsize
        for size in self.shape:
            nbytes *= size
        return nbytes


@dataclass(frozen=True)
class _Record:
    name: bytes
    nbytes: int
    header_offset: int
    data: bytes | None  # None for a streamed storage

    @property
    def wide(self) -> bool:
        """Return whether its size needs a zip64 field. (Its offset never does in the local header.)"""
        return self.nbytes >= FULL32

    @property
    def data_offset(self) -> int:
        plain = self.header_offset + _LOCAL.size + len(self.name) + (20 if self.wide else 0)
        return -(-(plain + 4) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # + 4: the padding is an extra field with a head

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.data_offset + self.nbytes + len(self.descriptor(0))

    @property
    def flags(self) -> int:
        return _UTF8 | (_CHECKSUM_FOLLOWS if self.data is None else 0)

    def header(self) -> bytes:
        size = FULL32 if self.wide else self.nbytes
        extra = struct.pack("<2H2Q", 1, 16, self.nbytes, self.nbytes) if self.wide else b""
        padding = self.data_offset - self.header_offset - _LOCAL.size - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        known = (0, size if self.wide else 0) if self.data is None else (crc32(self.data), size)
        fields = (known[0], known[1], known[1], len(self.name), len(extra))
        return _LOCAL.pack(b"PK\3\4", 0, self.flags, 0, 0, _DATE, *fields) + self.name + extra

    def descriptor(self, checksum: int) -> bytes:
        """Return what follows the data of a streamed storage."""
        if self.data is not None:
            return b""
        kind = _DESCRIPTOR64 if self.wide else _DESCRIPTOR
        return kind.pack(b"PK\7\10", checksum, self.nbytes, self.nbytes)

    def central(self, checksum: int) -> bytes:
        wide = [self.nbytes, self.nbytes] if self.wide else []
        offset = min(self.header_offset, FULL32)
        if offset == FULL32:
            wide.append(self.header_offset)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = FULL32 if self.wide else self.nbytes
        fields = (checksum, size, size, len(self.name), len(extra), 0, 0, 0, 0, offset)
        return _CENTRAL.pack(b"PK\1\2", 0, 0, self.flags, 0, 0, _DATE, *fields) + self.name + extra


class TorchArchive:
    """The layout of a ``.pt`` that holds ``value``.

    Args:
        root: the folder of the records within the zip. torch.save takes the file's name without ``.pt``.
        value: None, bools, numbers, text, lists, tuples, dicts, dtypes, SmallTensors, Streamed tensors, and Instances
            of classes, which torch.load imports when it reads them.

    Attributes:
        streamed: the offset in bytes of each Streamed tensor, in the order of the pickle.
        nbytes: the size of the file.

    Raises:
        UnsupportedError: the value holds anything else, or is too large or too deep.
    """

    def __init__(self, root: str, value: Any) -> None:
        self._tensors: list[SmallTensor | Streamed] = []
        small: list[tuple[str, bytes | None, int]] = [
            ("data.pkl", dump(value, self._stand_in, MAX_PICKLE_BYTES), 0),
            ("byteorder", b"little", 0),
            ("version", b"3\n", 0),
        ]
        storages = [
            (f"data/{i}", t.data if isinstance(t, SmallTensor) else None, 0 if isinstance(t, SmallTensor) else t.nbytes)
            for i, t in enumerate(self._tensors)
        ]
        self._records: list[_Record] = []
        offset = 0
        for name, data, nbytes in small + storages:
            record = _Record(f"{root}/{name}".encode(), nbytes if data is None else len(data), offset, data)
            self._records.append(record)
            offset = record.end
        self._end = offset
        self.streamed = [record.data_offset for record in self._records if record.data is None]
        self.nbytes = offset + len(self._directory([0] * len(self._records)))

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, DType):
            return Name("torch", value.name)
        if isinstance(value, Instance):
            return Made(Name(*value.cls.rsplit(".", 1)), value.state, value.args)
        if isinstance(value, (SmallTensor, Streamed)):
            self._tensors.append(value)
            return _tensor(value, str(len(self._tensors) - 1))
        raise UnsupportedError(f"a {type(value).__name__} cannot be written into a .pt")

    def fixed(self, checksums: Iterable[int] = ()) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of all but the streamed tensors, in the order of the file.

        Args:
            checksums: the CRC-32s of the streamed tensors, in their order. The next one is taken when what follows its
                tensor is asked for, so they need not be known before.
        """
        given = iter(checksums)
        sums: list[int] = []
        start, together = 0, b""  # neighbouring parts become one write
        for record in self._records:
            together += record.header() + (record.data or b"")
            if record.data is None:
                yield start, together
                sums.append(next(given))
                start, together = record.data_offset + record.nbytes, record.descriptor(sums[-1])
            else:
                sums.append(crc32(record.data))
        yield start, together + self._directory(sums)

    def whole(self) -> bytes:
        """Return the whole file. Nothing in it may be streamed."""
        out = bytearray(self.nbytes)
        for offset, data in self.fixed():
            out[offset : offset + len(data)] = data
        return bytes(out)

    def _directory(self, sums: list[int]) -> bytes:
        entries = b"".join(record.central(checksum) for record, checksum in zip(self._records, sums, strict=True))
        count, nbytes, start = len(self._records), len(entries), self._end
        wide = b""
        if start >= FULL32 or count >= 0xFFFF:
            wide = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, nbytes, start)
            wide += _LOCATOR.pack(b"PK\6\7", 0, start + nbytes, 1)
        narrow = (min(count, 0xFFFF), min(count, 0xFFFF), min(nbytes, FULL32), min(start, FULL32))
        return entries + wide + _END.pack(b"PK\5\6", 0, 0, *narrow, 0)


def _tensor(tensor: SmallTensor | Streamed, key: str) -> Call:
    """Return the object that rebuilds the tensor from the storage ``key``."""
    strides: list[int] = []
    numel = 1
    for extent in reversed(tensor.shape):
        strides.insert(0, numel)
        numel *= extent
    layout = (0, tuple(tensor.shape), tuple(strides), False, _NO_HOOKS)
    storage = _STORAGES.get(tensor.dtype.name)
    if storage is not None:
        stored = Stored(("storage", storage, key, "cpu", numel))
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (stored, *layout))
    if isinstance(tensor, SmallTensor):
        raise UnsupportedError(f"a tensor of {tensor.dtype} cannot be written into a .pt by this version")
    untyped = Name("torch.storage", "UntypedStorage")
    stored = Stored(("storage", untyped, key, "cpu", numel * tensor.dtype.itemsize))
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), (stored, *layout, Name("torch", tensor.dtype.name)))
