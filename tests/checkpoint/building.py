"""Build sound and broken zips and pickles for the tests of the readers."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles import machine
from dsconv.errors import DsconvError


@dataclass
class Rec:
    """One zip record. A field that is None follows from ``data``. A field that is set makes the directory lie, or with
    ``local_`` the record's own header.
    """

    name: str | bytes
    data: bytes
    method: int = 0
    flags: int = 0x800
    crc32: int | None = None
    nbytes: int | None = None
    packed: int | None = None
    extra: bytes = b""
    disk: int = 0
    header_offset: int | None = None
    local_name: str | bytes | None = None
    local_method: int | None = None
    local_flags: int | None = None
    local_nbytes: int | None = None
    local_signature: bytes = b"PK\x03\x04"


def _encoded(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else name.encode()


def zip_bytes(
    records: Sequence[Rec],
    *,
    comment: bytes = b"",
    prefix: bytes = b"",
    shift: int = 0,
    count: int | None = None,
    disk: int = 0,
    count_here: int | None = None,
    zip64: bool = False,
    narrow_count: int | None = None,
) -> bytes:
    """Return a zip of ``records``. ``shift`` is added to all offsets, and the directory claims to have ``count``
    records.
    """
    out = bytearray(prefix)
    directory = bytearray()
    for r in records:
        name = _encoded(r.name)
        own = name if r.local_name is None else _encoded(r.local_name)
        crc = zlib.crc32(r.data) if r.crc32 is None else r.crc32
        nbytes = len(r.data) if r.nbytes is None else r.nbytes
        packed = nbytes if r.packed is None else r.packed
        local_nbytes = len(r.data) if r.local_nbytes is None else r.local_nbytes
        method = r.method if r.local_method is None else r.local_method
        flags = r.flags if r.local_flags is None else r.local_flags
        at = len(out) + shift if r.header_offset is None else r.header_offset
        out += (
            struct.pack(
                "<4s5H3L2H", r.local_signature, 20, flags, method, 0, 0, crc, local_nbytes, local_nbytes, len(own), 0
            )
            + own
        )
        out += r.data
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            20,
            20,
            r.flags,
            r.method,
            0,
            0,
            crc,
            packed,
            nbytes,
            len(name),
            len(r.extra),
            0,
            r.disk,
            0,
            0,
            at,
        )
        directory += name + r.extra
    start = len(out) + shift
    claimed = len(records) if count is None else count
    out += directory
    if zip64:
        end64 = len(out) + shift
        out += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, claimed, claimed, len(directory), start)
        out += struct.pack("<4sLQL", b"PK\x06\x07", 0, end64, 1)
    short = claimed if narrow_count is None else narrow_count
    here = short if count_here is None else count_here
    return (
        bytes(out)
        + struct.pack("<4s4H2LH", b"PK\x05\x06", disk, disk, here, short, len(directory), start, len(comment))
        + comment
    )


def pt_records(pickle: bytes, **storages: bytes) -> list[Rec]:
    """Return the records that torch.save writes around a pickle. Storages are given as in ``_0=b"..."``."""
    records = [Rec("archive/data.pkl", pickle), Rec("archive/byteorder", b"little")]
    records += [Rec(f"archive/data/{key.removeprefix('_')}", data) for key, data in storages.items()]
    return [*records, Rec("archive/version", b"3\n")]


def write_pt(path: Path, pickle: bytes, **storages: bytes) -> Path:
    path.write_bytes(zip_bytes(pt_records(pickle, **storages)))
    return path


def load_raw(
    data: bytes, path: Path = Path("raw.pkl"), persistent_load: Callable[[Any], Any] = lambda pid: ("pid", pid)
) -> Any:
    return machine.load(data, path, persistent_load)


def names_file_and_is_short(error: DsconvError, path: Path) -> bool:
    return str(error).startswith(f"{path}: ") and len(str(error)) < 700


# Pickle opcodes


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(data)) + data


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<L", len(value)) + value


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_glob(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def lst(*items: bytes) -> bytes:
    return b"]" + (b"(" + b"".join(items) + b"e" if items else b"")


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


def whole(*parts: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 4) -> bytes:
    return tup(text("storage"), glob("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    offset: int = 0,
    shape: Sequence[int] = (4,),
    strides: Sequence[int] = (1,),
    *,
    of: bytes | None = None,
    metadata: bytes = b"",
) -> bytes:
    sizes = [tup(*map(number, values)) for values in (shape, strides)]
    hooks = call(glob("collections", "OrderedDict"))
    rest = [metadata] if metadata else []
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"),
        storage() if of is None else of,
        number(offset),
        *sizes,
        b"\x89",
        hooks,
        *rest,
    )


def colliding_pairs(count: int) -> list[tuple[int, int]]:
    """Return pairs with the same hash: the second number undoes what the first changes (CPython 3.8+ tuplehash)."""
    mask, p1, p2, p5 = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    inverse = pow(p2, -1, 1 << 64)

    def after(acc: int, lane: int) -> int:
        acc = (acc + lane * p2) & mask
        return ((acc << 31 | acc >> 33) & mask) * p1 & mask

    target = (after(p5, 1) + 5 * p2) & mask
    found: list[tuple[int, int]] = []
    first = 1
    while len(found) < count:
        first += 1
        second = (target - after(p5, first)) * inverse & mask
        if second < sys.hash_info.modulus:
            found.append((first, second))
    return found
