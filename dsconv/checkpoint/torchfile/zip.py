"""Find where each record of a ``torch.save`` zip lies.

``torch.save`` writes an uncompressed zip whose records are aligned to 64 bytes (torch
``torch/utils/serialization/config.py``, ``save.storage_alignment``), zip64 when large. The directory at the end is the
authority. Each local header is read too, since its name and extra field may differ in length from the directory's.
Everything that torch.save never writes is refused: compression, encryption, duplicate or odd names, overlapping
records, bytes before or after the zip, and directories that disagree. If two readers see different files, one of them
is deceived.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dsconv.checkpoint.map.tensors import Record
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.storage.local import EDGE_BYTES, OpenFile
from dsconv.errors import MalformedError, UnsafeError, UnsupportedError
from dsconv.text import count as counted

END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
MAX_COMMENT_BYTES = 65535
MAX_DIRECTORY_BYTES = 64 << 20  # over half a million records; torch.save writes some 60 bytes for each
FLAG_ENCRYPTED = 0x1
FLAG_UTF8 = 0x800
FLAG_SIZES_FOLLOW = 0x8  # the local header has zeros for CRC-32 and sizes; torch.save writes it so
EXTRA_ZIP64 = 0x0001
EXTRA_NAME = 0x7075  # Info-ZIP's Unicode path, which CPython 3.13 and later takes for the name
FULL16 = 0xFFFF  # "see the zip64 field"
FULL32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Archive:
    """The records of one zip.

    Attributes:
        path: The file.
        root: The name of the folder in which all records lie.
        records: The records by their names under that folder.
        checksummed: False when the file was saved with torch.serialization.set_crc32_options(False), which leaves
            zeros where the CRC-32s belong.
    """

    path: Path
    root: str
    records: dict[str, Record]
    checksummed: bool


def open_archive(file: OpenFile) -> Archive:
    """Read the zip directory of an open file, or of a span of it.

    Offsets in messages are counted from the start of the span, those in the records from the start of the file.

    Raises:
        MalformedError: The file is not a zip, is truncated, or contradicts itself.
        UnsupportedError: A record is compressed or encrypted, or the file is a TorchScript program.
        UnsafeError: Names leave the folder or occur twice, records overlap, or readers differ on what the file is.
    """
    path = file.path
    directory, count, directory_offset = _read_directory(file)
    if b"/constants.pkl" in directory:  # torch/serialization.py _is_torchscript_zip
        raise UnsupportedError(
            f"{path}: a TorchScript program, not a checkpoint; save the module's state_dict() with torch.save"
        )
    listed: dict[str, tuple[str, int, int, int]] = {}
    lowered: set[str] = set()
    roots: set[str] = set()
    position = 0
    for _ in range(count):
        name, crc32, nbytes, header_offset, position = _read_central(directory, position, path)
        root, inner = _split_name(name, path)
        roots.add(root)
        # torch ignores case when it looks up names (miniz 3.0 ``mz_zip_reader_locate_file`` without flags).
        if inner.lower() in lowered:
            raise UnsafeError(
                f"{path}: the zip has two records named {safe_repr(name)}; refused: readers differ on which one counts"
            )
        lowered.add(inner.lower())
        if header_offset >= directory_offset:
            raise MalformedError(
                f"{path}: record {safe_repr(name)} begins at byte {header_offset}, beyond the zip's records"
            )
        listed[inner] = (name, crc32, nbytes, header_offset)
    if position != len(directory):
        raise MalformedError(
            f"{path}: the zip directory says {counted(count, 'record')} and holds {len(directory) - position} bytes"
            " more"
        )
    if len(roots) > 1:
        raise MalformedError(
            f"{path}: records under {counted(len(roots), 'root folder')} {safe_repr(sorted(roots))}; expected one"
        )
    headers = file.read_many([(at, LOCAL.size + len(name.encode())) for name, _, _, at in listed.values()])
    records: dict[str, Record] = {}
    spans: list[tuple[int, int, str]] = []
    for (inner, (name, crc32, nbytes, header_offset)), header in zip(listed.items(), headers, strict=True):
        data_offset = header_offset + _header_bytes(header, path, header_offset, name, nbytes)
        if data_offset + nbytes > directory_offset:
            raise MalformedError(
                f"{path}: record {safe_repr(name)} ends at byte {data_offset + nbytes}, beyond the zip's records, "
                f"which end at {directory_offset}"
            )
        spans.append((header_offset, data_offset + nbytes, name))
        records[inner] = Record(path, file.offset_bytes + data_offset, nbytes, crc32, name)
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise UnsafeError(f"{path}: zip records {safe_repr(name)} and {safe_repr(other)} overlap; refused")
    # torch serialization.py _is_zipfile looks at a file's first bytes, and unpickles files that do not begin as a zip.
    if spans and spans[0][0]:
        raise UnsafeError(
            f"{path}: {spans[0][0]} bytes lie before the zip's first record; refused: readers differ on what such a"
            " file is"
        )
    checksummed = any(record.crc32 for record in records.values())  # a single zero among others is damage
    if not checksummed:
        records = {k: Record(r.path, r.offset_bytes, r.nbytes, None, r.name) for k, r in records.items()}
    return Archive(path, roots.pop() if roots else "", records, checksummed)


def _read_directory(file: OpenFile) -> tuple[bytes, int, int]:
    """Return the bytes of the central directory, the number of its entries, and where it begins."""
    path, size_bytes = file.path, file.nbytes
    # The last signature counts, wherever it is.
    for most in (EDGE_BYTES, END.size + MAX_COMMENT_BYTES + END64_LOCATOR.size):
        tail_bytes = min(size_bytes, most)
        tail = file.read(size_bytes - tail_bytes, tail_bytes)
        at = tail.rfind(b"PK\x05\x06")
        if at >= END64_LOCATOR.size:
            break
    if at < 0 or at + END.size > len(tail):
        raise MalformedError(
            f"{path}: truncated or not a torch.save file: no zip directory at its end ({size_bytes} bytes)"
        )
    _, disk, first_disk, count_here, *narrow, comment_bytes = END.unpack_from(tail, at)
    trailing = len(tail) - at - END.size - comment_bytes
    if trailing:
        what = f"{trailing} bytes follow" if trailing > 0 else f"{-trailing} bytes are missing from"
        raise MalformedError(f"{path}: damaged: {what} the end of the zip")
    if disk not in (0, FULL16) or first_disk not in (0, FULL16) or count_here != narrow[0]:
        raise MalformedError(f"{path}: a zip of several volumes; torch.save writes one")
    count, directory_bytes, directory_offset = narrow
    end_offset = size_bytes - tail_bytes + at
    locator_at = at - END64_LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        end_offset -= END64_LOCATOR.size + END64.size
        count, directory_bytes, directory_offset = _read_end64(file, tail[locator_at:at], end_offset, narrow)
    if directory_offset + directory_bytes != end_offset:
        raise MalformedError(
            f"{path}: the zip directory ({directory_bytes} bytes at {directory_offset}) does not end at byte"
            f" {end_offset}, where the file ends it: damaged, or bytes were put before the zip"
        )
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise MalformedError(
            f"{path}: the zip directory has {directory_bytes} bytes; the limit is {MAX_DIRECTORY_BYTES}"
        )
    if count * CENTRAL.size > directory_bytes:
        raise MalformedError(f"{path}: the zip directory says {counted(count, 'record')} and has room for fewer")
    return file.read(directory_offset, directory_bytes), count, directory_offset


def _read_end64(file: OpenFile, locator: bytes, expected_offset: int, narrow: list[int]) -> tuple[int, int, int]:
    """Return the number of records, the bytes of the directory and its offset from the zip64 end.

    Python's zipfile looks for the zip64 end right before its locator, and torch where the locator says. Both must find
    the same one (CPython 3.11 ``zipfile.py`` ``_EndRecData64``, miniz 3.0 ``mz_zip_reader_read_central_dir``).

    Args:
        file: The file.
        locator: The bytes of the locator.
        expected_offset: Where a zip64 end begins that touches the locator.
        narrow: The same three numbers from the zip's other end, or "see zip64".
    """
    path = file.path
    _, disk, offset, disks = END64_LOCATOR.unpack(locator)
    if offset + END64.size > file.nbytes:
        raise MalformedError(f"{path}: the zip64 directory lies at byte {offset}, beyond the file's {file.nbytes}")
    fields = END64.unpack(file.read(offset, END64.size))
    if fields[0] != b"PK\x06\x06":
        raise MalformedError(f"{path}: no zip64 directory at byte {offset}, where the file says it is")
    if offset != expected_offset or fields[1] != END64.size - 12:
        raise UnsafeError(
            f"{path}: the zip64 end at byte {offset} is not followed by its locator, which lies at byte"
            f" {expected_offset + END64.size}; refused: readers differ on which end is the zip's"
        )
    if disk or disks > 1 or fields[4] or fields[5] or fields[6] != fields[7]:
        raise MalformedError(f"{path}: a zip of several volumes; torch.save writes one")
    wide = fields[7:10]
    if any(n not in (w, full) for n, w, full in zip(narrow, wide, (FULL16, FULL32, FULL32), strict=True)):
        raise MalformedError(
            f"{path}: the zip's two ends disagree: {narrow} and {list(wide)} for records, directory bytes and offset"
        )
    return wide[0], wide[1], wide[2]


def _read_central(directory: bytes, position: int, path: Path) -> tuple[str, int, int, int, int]:
    """Return one entry: name, CRC-32, data bytes, offset of its local header, position of the next entry."""
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
    extra = directory[extra_at : extra_at + extra_bytes]
    if not name.isascii() and not flags & FLAG_UTF8:
        raise UnsafeError(
            f"{path}: record {safe_repr(name)} does not say that its name is UTF-8; refused: readers differ on the name"
        )
    if fields[13] not in (0, FULL16):
        raise MalformedError(
            f"{path}: record {safe_repr(name)} belongs to a zip of several volumes; torch.save writes one"
        )
    if flags & FLAG_ENCRYPTED:
        raise UnsupportedError(f"{path}: record {safe_repr(name)} is encrypted; torch.save never does that")
    if method != 0:
        raise UnsupportedError(
            f"{path}: record {safe_repr(name)} is compressed (method {method}); torch.save does not compress. "
            "The file was re-zipped: unzip it and load and save it again with torch"
        )
    nbytes, packed, header_offset = _zip64(extra, nbytes, packed, header_offset, f"{path}: record {safe_repr(name)}")
    if packed != nbytes:
        raise MalformedError(
            f"{path}: record {safe_repr(name)} is stored, yet its sizes differ ({packed} and {nbytes} bytes)"
        )
    return name, crc32, nbytes, header_offset, following


def _zip64(extra: bytes, nbytes: int, packed: int, header_offset: int, where: str) -> tuple[int, int, int]:
    """Return the sizes and the offset, those that do not fit in 32 bits from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == EXTRA_NAME:
            raise UnsafeError(f"{where} has a second name in its extra field; refused: readers differ on the name")
        if kind == EXTRA_ZIP64:
            field = extra[at + 4 : at + 4 + length]
            wide = [v[0] for v in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            if nbytes == FULL32 and wide:
                nbytes = wide.pop(0)
            if packed == FULL32 and wide:
                packed = wide.pop(0)
            if header_offset == FULL32 and wide:
                header_offset = wide.pop(0)
        at += 4 + length
    return nbytes, packed, header_offset


def _split_name(name: str, path: Path) -> tuple[str, str]:
    """Return ('root', 'data/0') of 'root/data/0', and refuse a name that could leave a folder."""
    root, slash, inner = name.partition("/")
    if not slash or "\\" in name or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UnsafeError(
            f"{path}: the zip holds a record named {safe_repr(name)}; refused: torch.save writes ROOT/NAME only"
        )
    return root, inner


def _header_bytes(header: bytes, path: Path, header_offset: int, name: str, nbytes: int) -> int:
    """Return the length of a record's own header. All fields that are set must agree with the directory."""
    encoded = name.encode()
    fields = LOCAL.unpack_from(header)
    if fields[0] != b"PK\x03\x04":
        raise MalformedError(
            f"{path}: no record header at byte {header_offset}, where the directory puts {safe_repr(name)}"
        )
    flags, method, packed, unpacked, name_bytes, extra_bytes = fields[2], fields[3], *fields[7:]
    if header[LOCAL.size :] != encoded or name_bytes != len(encoded):
        raise UnsafeError(
            f"{path}: the directory says {safe_repr(name)} where the record itself has another name; refused"
        )
    unknown = {FULL32, 0} if flags & FLAG_SIZES_FOLLOW else {FULL32}
    if method != 0 or flags & FLAG_ENCRYPTED or not {packed, unpacked} <= {nbytes, *unknown}:
        raise MalformedError(
            f"{path}: record {safe_repr(name)} is stored in {nbytes} bytes by the directory and of method {method},"
            f" flags {flags:#x} and {packed}/{unpacked} bytes by its own header"
        )
    return int(LOCAL.size + name_bytes + extra_bytes)
