"""Where each record of a ``torch.save`` zip lies, and nothing else.

``torch.save`` writes an uncompressed zip whose records are aligned to 64 bytes (torch 2.13
``torch/utils/serialization/config.py``, ``save.storage_alignment``), zip64 when large. The directory at the end is the
authority; each local header is read too, since its name and extra field may differ in length from the directory's.
Anything torch.save does not do (compression, encryption, duplicate or odd names, records that overlap) is refused.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from dsconv.checkpoint.tensormap import Record
from dsconv.errors import MalformedError, UnsafeError, UnsupportedError

END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
MAX_COMMENT_BYTES = 65535
MAX_DIRECTORY_BYTES = 1 << 30  # 10 million records: no real checkpoint comes near
FLAG_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Archive:
    """The records of one zip by their names under the archive's root folder; ``root`` is that folder's name.

    ``checksummed`` is False when the file was saved with torch.serialization.set_crc32_options(False), which leaves
    zeros where the CRC-32s belong (seen with torch 2.13).
    """

    path: Path
    root: str
    records: dict[str, Record]
    checksummed: bool


def read_at(descriptor: int, nbytes: int, offset_bytes: int, path: Path) -> bytes:
    """Exactly ``nbytes`` bytes from ``offset_bytes``; raises MalformedError when the file ends before."""
    data = os.pread(descriptor, nbytes, offset_bytes)
    while len(data) < nbytes:
        more = os.pread(descriptor, nbytes - len(data), offset_bytes + len(data))
        if not more:
            raise MalformedError(f"{path}: truncated: expected {nbytes} bytes at offset {offset_bytes}, found {len(data)}")
        data += more
    return data


def open_archive(descriptor: int, path: Path) -> Archive:
    """Read the zip directory of an open file.

    Raises MalformedError (not a zip, truncated, inconsistent), UnsupportedError (compressed) or UnsafeError (names).
    """
    size_bytes = os.fstat(descriptor).st_size
    directory, count = _read_directory(descriptor, path, size_bytes)
    records: dict[str, Record] = {}
    roots: set[str] = set()
    spans: list[tuple[int, int, str]] = []
    position = 0
    for _ in range(count):
        name, crc32, nbytes, header_offset, position = _read_central(directory, position, path)
        root, inner = _split_name(name, path)
        roots.add(root)
        if inner in records:
            raise UnsafeError(f"{path}: the zip has two records named {name!r}; refused: readers differ on which one counts")
        data_offset = _data_offset(descriptor, path, header_offset, name)
        if data_offset + nbytes > size_bytes:
            raise MalformedError(f"{path}: truncated: record {name!r} ends at byte {data_offset + nbytes} of {size_bytes}")
        spans.append((header_offset, data_offset + nbytes, name))
        records[inner] = Record(path, data_offset, nbytes, crc32, name)
    if len(roots) > 1:
        raise MalformedError(f"{path}: records under {len(roots)} root folders ({', '.join(sorted(roots)[:3])}); expected one")
    spans.sort()
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise UnsafeError(f"{path}: zip records {name!r} and {other!r} overlap; refused")
    # A real data.pkl whose CRC-32 is 0 is one in four thousand million, and then the checks are off, not wrong.
    checksummed = not ("data.pkl" in records and records["data.pkl"].crc32 == 0 and records["data.pkl"].nbytes)
    if not checksummed:
        records = {k: Record(r.path, r.offset_bytes, r.nbytes, None, r.name) for k, r in records.items()}
    return Archive(path, roots.pop() if roots else "", records, checksummed)


def _read_directory(descriptor: int, path: Path, size_bytes: int) -> tuple[bytes, int]:
    """The bytes of the central directory and the number of its entries."""
    tail_bytes = min(size_bytes, END.size + MAX_COMMENT_BYTES + END64_LOCATOR.size)
    tail = read_at(descriptor, tail_bytes, size_bytes - tail_bytes, path)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise MalformedError(f"{path}: truncated or not a torch.save file: no zip directory at its end ({size_bytes} bytes)")
    _, disk, _, _, count, directory_bytes, directory_offset, _ = END.unpack_from(tail, at)
    if disk not in (0, 0xFFFF):
        raise MalformedError(f"{path}: a zip of several volumes; torch.save writes one")
    end_offset = size_bytes - tail_bytes + at
    locator_at = at - END64_LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end64_offset, _ = END64_LOCATOR.unpack_from(tail, locator_at)
        if end64_offset + END64.size > size_bytes:
            raise MalformedError(f"{path}: the zip64 directory lies at byte {end64_offset}, beyond the file's {size_bytes}")
        fields = END64.unpack(read_at(descriptor, END64.size, end64_offset, path))
        if fields[0] != b"PK\x06\x06":
            raise MalformedError(f"{path}: no zip64 directory at byte {end64_offset}, where the file says it is")
        count, directory_bytes, directory_offset, end_offset = fields[7], fields[8], fields[9], end64_offset
    if directory_offset + directory_bytes > end_offset or directory_bytes > MAX_DIRECTORY_BYTES:
        raise MalformedError(f"{path}: the zip directory ({directory_bytes} bytes at {directory_offset}) does not fit the file")
    if count * CENTRAL.size > directory_bytes:
        raise MalformedError(f"{path}: the zip directory says {count} records and has room for fewer")
    return read_at(descriptor, directory_bytes, directory_offset, path), count


def _read_central(directory: bytes, position: int, path: Path) -> tuple[str, int, int, int, int]:
    """One directory entry: name, CRC-32, data bytes, offset of the local header, position of the next entry."""
    if position + CENTRAL.size > len(directory) or directory[position : position + 4] != b"PK\x01\x02":
        raise MalformedError(f"{path}: the zip directory is corrupt at its byte {position}")
    fields = CENTRAL.unpack_from(directory, position)
    flags, method, crc32, packed, nbytes = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_bytes, extra_bytes, comment_bytes, header_offset = fields[10], fields[11], fields[12], fields[16]
    name_at = position + CENTRAL.size
    extra_at = name_at + name_bytes
    following = extra_at + extra_bytes + comment_bytes
    if following > len(directory):
        raise MalformedError(f"{path}: the zip directory is corrupt at its byte {position}")
    try:
        name = directory[name_at:extra_at].decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError(f"{path}: a record's name is not UTF-8") from None
    if flags & FLAG_ENCRYPTED:
        raise UnsupportedError(f"{path}: record {name!r} is encrypted; torch.save never does that")
    if method != 0:
        raise UnsupportedError(
            f"{path}: record {name!r} is compressed (method {method}); torch.save stores records as they are. "
            "The file was re-zipped: unzip it and load and save it again with torch"
        )
    nbytes, packed, header_offset = _zip64(directory[extra_at : extra_at + extra_bytes], nbytes, packed, header_offset)
    if packed != nbytes:
        raise MalformedError(f"{path}: record {name!r} is stored, yet its sizes differ ({packed} and {nbytes} bytes)")
    return name, crc32, nbytes, header_offset, following


def _zip64(extra: bytes, nbytes: int, packed: int, header_offset: int) -> tuple[int, int, int]:
    """Replace the sizes and the offset that do not fit in 32 bits by those of the zip64 extra field (id 1)."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [v[0] for v in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            if nbytes == 0xFFFFFFFF and wide:
                nbytes = wide.pop(0)
            if packed == 0xFFFFFFFF and wide:
                packed = wide.pop(0)
            if header_offset == 0xFFFFFFFF and wide:
                header_offset = wide.pop(0)
        at += 4 + length
    return nbytes, packed, header_offset


def _split_name(name: str, path: Path) -> tuple[str, str]:
    """('root', 'data/0') of 'root/data/0'; a name that could leave a folder is refused."""
    root, slash, inner = name.partition("/")
    if not slash or not root or not inner or "\\" in name or "\0" in name or ".." in name.split("/") or "" in name.split("/"):
        raise UnsafeError(f"{path}: the zip holds a record named {name!r}; refused: torch.save writes ROOT/NAME only")
    return root, inner


def _data_offset(descriptor: int, path: Path, header_offset: int, name: str) -> int:
    """Where the data of a record begins; the local header must agree with the directory on the name."""
    encoded = name.encode()
    header = read_at(descriptor, LOCAL.size + len(encoded), header_offset, path)
    fields = LOCAL.unpack_from(header)
    if fields[0] != b"PK\x03\x04":
        raise MalformedError(f"{path}: no record header at byte {header_offset}, where the directory puts {name!r}")
    name_bytes, extra_bytes = fields[9], fields[10]
    if header[LOCAL.size :] != encoded or name_bytes != len(encoded):
        raise UnsafeError(f"{path}: the directory says {name!r} where the record itself has another name; refused")
    return int(header_offset + LOCAL.size + name_bytes + extra_bytes)
