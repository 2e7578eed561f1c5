"""The same program in files that a scanner and a loader read differently, or that a scanner cannot read at all.

Scanners read a zip with Python's zipfile, and torch with its own reader. Where the two differ, one of them is deceived.
dsconv reads only what torch.save writes and refuses the rest, so there is no second reading.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace

from attacks.places import before
from tests.checkpoint.building import Rec, zip_bytes

Records = list[Rec]


@dataclass(frozen=True)
class Container:
    """``make`` builds the file from the sound records and the program; dsconv's message contains ``says``."""

    title: str
    make: Callable[[Records, bytes], bytes]
    says: str


def records_of(sound: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        return [Rec(info.filename, archive.read(info)) for info in archive.infolist()]


def _with(**lies: object) -> Callable[[Records, bytes], bytes]:
    """Put the program into data.pkl, whose directory entry or header lies."""
    return lambda records, program: zip_bytes(_poisoned(records, program, **lies))


def _poisoned(records: Records, program: bytes, **lies: object) -> Records:
    return [replace(r, data=before(program, r.data), **lies) if _is_pickle(r) else r for r in records]  # type: ignore[arg-type]


def _is_pickle(record: Rec) -> bool:
    return str(record.name).endswith("/data.pkl")


def _pickle(records: Records) -> Rec:
    return next(record for record in records if _is_pickle(record))


def _twice(hostile_first: bool) -> Callable[[Records, bytes], bytes]:
    def make(records: Records, program: bytes) -> bytes:
        both = [_pickle(_poisoned(records, program)), _pickle(records)]
        return zip_bytes([*(both if hostile_first else reversed(both)), *(r for r in records if not _is_pickle(r))])

    return make


def _second_root(records: Records, program: bytes) -> bytes:
    return zip_bytes([Rec("other/data.pkl", _pickle(_poisoned(records, program)).data), *records])


def _overlapping(records: Records, program: bytes) -> bytes:
    """Add a second record whose directory entry points at the first one's bytes."""
    return zip_bytes(
        [*_poisoned(records, program), Rec(f"{str(records[0].name).partition('/')[0]}/x", b"", header_offset=0)]
    )


def _compressed(records: Records, program: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in _poisoned(records, program):
            archive.writestr(str(record.name), record.data)
    return stream.getvalue()


def _hidden_end(records: Records, program: bytes) -> bytes:
    """Make a sound zip whose comment is the end record of the hostile zip in front of it."""
    hostile = zip_bytes(_poisoned(records, program))
    return hostile + zip_bytes(records)


def _in_comment(records: Records, program: bytes) -> bytes:
    """Make a zip whose comment is the hostile zip, so that the last end record of the file is the hostile one's."""
    return zip_bytes(records, comment=zip_bytes(_poisoned(records, program)))


def _broken_off(records: Records, program: bytes) -> bytes:
    """Leave out STOP after the call: a scanner that parses the whole stream first gives up ("nullifAI", 2025)."""
    return zip_bytes([replace(r, data=program[:-1]) if _is_pickle(r) else r for r in records])


def _tar(records: Records, program: bytes) -> bytes:
    """Use torch's oldest format, whose reader ran pickles even with weights_only=True until 2.6 (CVE-2025-32434)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(program)
            archive.addfile(info, io.BytesIO(program))
    return stream.getvalue()


def _script(records: Records, program: bytes) -> bytes:
    """Make a TorchScript archive, which torch.load hands to torch.jit.load."""
    root = str(records[0].name).partition("/")[0]
    return zip_bytes([*_poisoned(records, program), Rec(f"{root}/constants.pkl", b"\x80\x02).")])


CONTAINERS = [
    Container("a sound zip around it", _with(), "os.system"),
    Container(
        "the record's own header has another name (CVE-2025-1944)", _with(local_name="archive/data.pk_"), "another name"
    ),
    Container("the flag for encryption is set (CVE-2025-1945)", _with(flags=0x801), "encrypted"),
    Container("the flag is set in the record's own header only", _with(local_flags=0x801), "flags"),
    Container("the CRC-32 is wrong (CVE-2025-10156)", _with(crc32=1), "CRC-32"),
    Container("the CRC-32 is zero, as without checksums", _with(crc32=0), "CRC-32"),
    Container("the directory says compressed", _with(method=8), "compressed"),
    Container("the record's own header says compressed", _with(local_method=8), "method"),
    Container("all records are compressed", _compressed, "compressed"),
    Container("data.pkl twice, the hostile one first", _twice(True), "two records"),
    Container("data.pkl twice, the hostile one last", _twice(False), "two records"),
    Container("data.pkl under a second root folder", _second_root, "two records"),
    Container("a name that leaves the folder", _with(name="archive/../data.pkl"), "record named"),
    Container("a name with a backslash", _with(name="archive\\data.pkl"), "record named"),
    Container("a record at the place of another", _overlapping, "another name"),
    Container("the directory's size lies", _with(nbytes=8), "stored in 8 bytes"),
    Container(
        "the directory counts fewer records",
        lambda r, p: zip_bytes(_poisoned(r, p), count=1),
        "directory says 1 record and",
    ),
    Container(
        "the two counts of records differ", lambda r, p: zip_bytes(_poisoned(r, p), count_here=1), "several volumes"
    ),
    Container("a zip of several volumes", lambda r, p: zip_bytes(_poisoned(r, p), disk=1), "several volumes"),
    Container(
        "zip64's end says otherwise", lambda r, p: zip_bytes(_poisoned(r, p), zip64=True, narrow_count=1), "disagree"
    ),
    Container(
        "bytes before the zip",
        lambda r, p: zip_bytes(_poisoned(r, p), prefix=b"#!/bin/sh\n"),
        "before the zip's first record",
    ),
    Container(
        "the program itself before the zip", lambda r, p: zip_bytes(r, prefix=p), "before the zip's first record"
    ),
    Container("bytes after the zip", lambda r, p: zip_bytes(_poisoned(r, p)) + b"\n", "follow"),
    Container("two zips, one after the other", _hidden_end, "before the zip"),
    Container("the hostile zip within a sound one's comment", _in_comment, "before the zip"),
    Container("a bare pickle under a weights file's name (CVE-2025-10155)", lambda r, p: p, "not a torch.save file"),
    Container("a bare pickle of the real contents", lambda r, p: before(p, _pickle(r).data), "not a torch.save file"),
    Container("torch's tar format (CVE-2025-32434)", _tar, "not a torch.save file"),
    Container("a TorchScript program", _script, "TorchScript"),
    Container("a stream that breaks off after the call", _broken_off, "os.system"),
]
