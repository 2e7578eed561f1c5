"""A ``.pt`` as torch.save writes it, around bytes that are still to come.

A ``TorchArchive`` lays the file out: its pickle, its zip records, and where each storage's bytes go. The caller puts
those there in any order (a ``Streamed`` tensor) and then writes ``fixed``, which is everything else, with the CRC-32s
that only the finished copy knows. torch is not needed.

The format is that of torch 2.13: ``torch/serialization.py`` (``_save``: data.pkl, byteorder, data/<key>, version;
persistent ids), ``torch/_utils.py`` (``_rebuild_tensor_v2``), ``caffe2/serialize/inline_container.cc`` (records under
one root that is the file's stem, stored, aligned to 64 bytes by an extra field; the reader wants ``version``). Sizes
stand in the records' own headers here, where torch writes them behind the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsconv.checkpoint.map.dtypes import STORAGE_CLASSES, DType
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import Instance
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.errors import UnsupportedError

ALIGNMENT_BYTES = 64
MAX_PICKLE_BYTES = 64 << 20  # values that share parts are written out in full, which a hostile file can make grow
MAX_DEPTH = 100
FULL32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_UTF8 = 0x800
_DATE = 0x21  # 1 January 1980, as torch writes
_STORAGES = {dtype: storage for storage, dtype in STORAGE_CLASSES.items()}


@dataclass(frozen=True)
class Streamed:
    """A contiguous tensor whose bytes are put into the file after it was laid out."""

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
        """Whether its size needs a zip64 field. (Its offset never does in the local header.)"""
        return self.nbytes >= FULL32

    @property
    def data_offset(self) -> int:
        plain = self.header_offset + _LOCAL.size + len(self.name) + (20 if self.wide else 0)
        return -(-(plain + 4) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # + 4: the padding is an extra field with a head

    def header(self, checksum: int) -> bytes:
        size = FULL32 if self.wide else self.nbytes
        extra = struct.pack("<2H2Q", 1, 16, self.nbytes, self.nbytes) if self.wide else b""
        padding = self.data_offset - self.header_offset - _LOCAL.size - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        return (
            _LOCAL.pack(b"PK\3\4", 0, _UTF8, 0, 0, _DATE, checksum, size, size, len(self.name), len(extra))
            + self.name
            + extra
        )

    def central(self, checksum: int) -> bytes:
        wide = [self.nbytes, self.nbytes] if self.wide else []
        offset = min(self.header_offset, FULL32)
        if offset == FULL32:
            wide.append(self.header_offset)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = FULL32 if self.wide else self.nbytes
        fields = (checksum, size, size, len(self.name), len(extra), 0, 0, 0, 0, offset)
        return _CENTRAL.pack(b"PK\1\2", 0, 0, _UTF8, 0, 0, _DATE, *fields) + self.name + extra


class TorchArchive:
    """The layout of a ``.pt`` that holds ``value``; ``stem`` is the file's name without ``.pt``.

    ``value`` is of None, bools, numbers, text, lists, tuples, dicts, dtypes, SmallTensors, Streamed tensors, and
    Instances of classes, which torch.load imports when it reads them. ``streamed`` are the offsets of the Streamed
    ones, in the order of the pickle. Raises UnsupportedError for anything else, and for a value that is too large or
    too deep.
    """

    def __init__(self, stem: str, value: Any) -> None:
        pickler = _Pickler()
        pickler.write(value)
        small: list[tuple[str, bytes | None, int]] = [
            ("data.pkl", pickler.finish(), 0),
            ("byteorder", b"little", 0),
            ("version", b"3\n", 0),
        ]
        storages = [
            (f"data/{i}", t.data if isinstance(t, SmallTensor) else None, 0 if isinstance(t, SmallTensor) else t.nbytes)
            for i, t in enumerate(pickler.tensors)
        ]
        self._records: list[_Record] = []
        offset = 0
        for name, data, nbytes in small + storages:
            record = _Record(f"{stem}/{name}".encode(), nbytes if data is None else len(data), offset, data)
            self._records.append(record)
            offset = record.data_offset + record.nbytes
        self._end = offset
        self.streamed = [record.data_offset for record in self._records if record.data is None]
        self.nbytes = offset + len(self._directory([0] * len(self._records)))

    def fixed(self, checksums: Sequence[int] = ()) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all but the streamed storages, whose CRC-32s are given in their order."""
        given = iter(checksums)
        sums = [next(given) if record.data is None else crc32(record.data) for record in self._records]
        for record, checksum in zip(self._records, sums, strict=True):
            yield record.header_offset, record.header(checksum) + (record.data or b"")
        yield self._end, self._directory(sums)

    def whole(self) -> bytes:
        """The file, when nothing in it is streamed."""
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


class _Pickler:
    """Writes protocol 2, as torch.save does, of the values that TorchArchive lists."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self.tensors: list[SmallTensor | Streamed] = []

    def finish(self) -> bytes:
        return bytes(self._out) + b"."

    def write(self, value: Any, depth: int = 0) -> None:
        out = self._out
        if depth > MAX_DEPTH or len(out) > MAX_PICKLE_BYTES:
            raise UnsupportedError(
                f"a value that is nested over {MAX_DEPTH} deep or takes over {MAX_PICKLE_BYTES} bytes cannot be written"
            )
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self._integer(int(value))
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<L", len(text)) + text
        elif isinstance(value, (tuple, list, dict)):
            self._container(value, depth)
        elif isinstance(value, DType):
            self._name("torch", value.name)
        elif isinstance(value, (SmallTensor, Streamed)):
            self._tensor(value, depth)
        elif isinstance(value, Instance):
            self._name(*value.cls.rsplit(".", 1))
            self.write(value.args, depth + 1)
            out += b"\x81"
            if value.state is not None:
                self.write(value.state, depth + 1)
                out += b"b"
        else:
            raise UnsupportedError(f"a {type(value).__name__} cannot be written into a .pt")

    def _integer(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<l", value)
        else:
            nbytes = value.bit_length() // 8 + 1
            if nbytes > 255:
                raise UnsupportedError(f"an integer of {value.bit_length()} bits cannot be written")
            self._out += b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little", signed=True)

    def _container(self, value: tuple[Any, ...] | list[Any] | dict[Any, Any], depth: int) -> None:
        out = self._out
        if isinstance(value, tuple):
            out += b"("
        else:
            out += b"](" if isinstance(value, list) else b"}("
        for item in value.items() if isinstance(value, dict) else value:
            for part in item if isinstance(value, dict) else (item,):
                self.write(part, depth + 1)
        out += b"t" if isinstance(value, tuple) else b"e" if isinstance(value, list) else b"u"

    def _name(self, module: str, name: str) -> None:
        self._out += f"c{module}\n{name}\n".encode()

    def _tensor(self, tensor: SmallTensor | Streamed, depth: int) -> None:
        storage = _STORAGES.get(tensor.dtype.name)
        if storage is None:
            raise UnsupportedError(f"a tensor of {tensor.dtype} cannot be written into a .pt by this version")
        strides: list[int] = []
        numel = 1
        for size in reversed(tensor.shape):
            strides.insert(0, numel)
            numel *= size
        key, position = str(len(self.tensors)), depth + 1
        self.tensors.append(tensor)
        self._name("torch._utils", "_rebuild_tensor_v2")
        self._out += b"(("
        self.write("storage")
        self._name("torch", storage)
        for item in (key, "cpu", numel):
            self.write(item, position)
        self._out += b"tQ"
        for argument in (0, tuple(tensor.shape), tuple(strides), False):
            self.write(argument, position)
        self._name("collections", "OrderedDict")
        self._out += b")RtR"
