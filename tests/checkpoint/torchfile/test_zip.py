"""The zip directory of a torch.save file: real ones are read, and ones that could deceive a reader are refused."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsconv.checkpoint.storage.local import open_for_reading
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.torchfile.zip import Archive, open_archive
from dsconv.errors import DsconvError, MalformedError, UnsafeError, UnsupportedError
from tests.checkpoint.building import Rec, names_file_and_is_short, pt_records, tensor, whole, zip_bytes

PICKLE = whole(b"}")
SOUND = pt_records(PICKLE, _0=b"0123456789abcdef", _1=b"")


def opened(path: Path) -> Archive:
    with open_for_reading(path) as file:
        return open_archive(file)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "file.pt"
    path.write_bytes(data)
    return path


def refused(folder: Path, data: bytes, error: type[DsconvError] = MalformedError) -> str:
    """Return the message with which a file of ``data`` is refused."""
    path = written(folder, data)
    with pytest.raises(error) as caught:
        opened(path)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert caught.value.exit_code == (4 if error is UnsafeError else 3)
    assert message.isprintable()
    assert len(message) < 700
    return message


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("real") / "real.pt"
    torch.save({"a": torch.arange(10), "b": torch.ones(3), "c": torch.empty(0)}, path)
    return path.read_bytes()


def test_records_lie_where_the_standard_library_finds_them(real: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, real)
    archive = opened(path)
    with zipfile.ZipFile(path) as other:
        assert [f"{archive.root}/{name}" for name in archive.records] == other.namelist()
        for name, record in archive.records.items():
            data = real[record.offset_bytes : record.offset_bytes + record.nbytes]
            assert data == other.read(f"{archive.root}/{name}")
            assert record.crc32 == zlib.crc32(data)
            assert record.path == path
    assert archive.checksummed


def test_a_plain_zip_of_our_own_is_read(tmp_path: Path) -> None:
    data = zip_bytes(SOUND)
    archive = opened(written(tmp_path, data))
    record = archive.records["data/0"]
    assert data[record.offset_bytes :][: record.nbytes] == b"0123456789abcdef"
    assert archive.records["data/1"].nbytes == 0
    assert archive.root == "archive"


@pytest.mark.parametrize("alignment", [1, 64, 4096, 65536])
def test_any_storage_alignment_is_read(alignment: int, tmp_path: Path) -> None:
    import torch.utils.serialization.config as config

    path = tmp_path / "aligned.pt"
    before = config.save.storage_alignment
    try:
        config.save.storage_alignment = alignment
        torch.save({"a": torch.arange(4), "b": torch.arange(5)}, path)
    finally:
        config.save.storage_alignment = before
    record = opened(path).records["data/1"]
    assert record.offset_bytes % alignment == 0 or alignment == 65536  # an extra field has only 16 bits
    assert path.read_bytes()[record.offset_bytes :][: record.nbytes] == torch.arange(5).numpy().tobytes()


def test_a_file_without_checksums_says_so(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(4)}, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    archive = opened(tmp_path / "unchecked.pt")
    assert not archive.checksummed
    assert {record.crc32 for record in archive.records.values()} == {None}
    assert list(TorchFile(tmp_path / "unchecked.pt").root) == ["a"]


def test_one_checksum_of_zero_does_not_turn_the_others_off(tmp_path: Path) -> None:
    records = pt_records(PICKLE, _0=b"0123456789abcdef")
    records[0].crc32 = 0
    path = written(tmp_path, zip_bytes(records))
    assert opened(path).checksummed
    with pytest.raises(MalformedError, match=r"file\.pt: data\.pkl fails its CRC-32"):
        TorchFile(path)


def test_a_comment_does_no_harm(tmp_path: Path) -> None:
    assert "data.pkl" in opened(written(tmp_path, zip_bytes(SOUND, comment=b"saved on a Sunday"))).records
    assert "data.pkl" in opened(written(tmp_path, zip_bytes(SOUND, comment=b"x" * 65535))).records


def test_zip64_records_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    """The file is sparse, with 5 GB between the first record and the second, and a record of 6 GB."""
    far, long = 5 << 30, 6 << 30
    path = tmp_path / "large.pt"

    def local(name: bytes) -> bytes:
        return struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0x808, 0, 0, 0, 0, 0, 0, len(name), 0) + name

    def entry(name: bytes, nbytes: int, at: int) -> bytes:
        wide = [n for n in (nbytes, nbytes, at) if n >= 0xFFFFFFFF]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        extra = struct.pack("<HH3s", 0x4246, 3, b"ZZZ") + extra  # another field before it
        size, offset = min(nbytes, 0xFFFFFFFF), min(at, 0xFFFFFFFF)
        fixed = struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            45,
            45,
            0x808,
            0,
            0,
            0,
            7,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            offset,
        )
        return fixed + name + extra

    names = [b"a/data.pkl", b"a/data/0", b"a/data/1"]
    starts = [0, far, far + 100 + long]
    sizes = [4, long, 8]
    directory = b"".join(entry(*item) for item in zip(names, sizes, starts, strict=True))
    at = starts[-1] + 100
    with path.open("wb") as file:
        for name, start in zip(names, starts, strict=True):
            file.seek(start)
            file.write(local(name) + b"head")
        file.seek(at)
        file.write(directory)
        end64 = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(directory), at))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end64, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(directory), 0xFFFFFFFF, 0))
    records = opened(path).records
    assert {name: (r.offset_bytes, r.nbytes) for name, r in records.items()} == {
        "data.pkl": (30 + 10, 4),
        "data/0": (far + 30 + 8, long),
        "data/1": (starts[2] + 30 + 8, 8),
    }


def test_the_zip64_end_of_torch_files_is_read(tmp_path: Path) -> None:
    assert "data/0" in opened(written(tmp_path, zip_bytes(SOUND, zip64=True))).records
    assert "data/0" in opened(written(tmp_path, zip_bytes(SOUND, zip64=True, narrow_count=0xFFFF))).records


def _with(**changes: Any) -> bytes:
    """Return the sound file with a changed storage ``data/0``."""
    return zip_bytes([replace(r, **changes) if r.name == "archive/data/0" else r for r in SOUND])


STORED = [Rec("a/data.pkl", PICKLE), Rec("a/data/0", bytes(100))]
REFUSED = {
    "two records of one name": (
        zip_bytes([*SOUND, Rec("archive/data/0", b"other")]),
        UnsafeError,
        "two records named 'archive/data/0'",
    ),
    "two roots": (zip_bytes([*SOUND, Rec("other/data/7", b"")]), MalformedError, "2 root folders"),
    "a name without a root": (zip_bytes([*SOUND, Rec("data.pkl", b"")]), UnsafeError, "'data.pkl'"),
    "a name that climbs": (zip_bytes([*SOUND, Rec("archive/../../x", b"")]), UnsafeError, "'archive/../../x'"),
    "an absolute name": (zip_bytes([*SOUND, Rec("/etc/passwd", b"")]), UnsafeError, "'/etc/passwd'"),
    "a name with a backslash": (zip_bytes([*SOUND, Rec("archive\\data/0", b"")]), UnsafeError, "archive"),
    "a name with a NUL": (zip_bytes([*SOUND, Rec("archive/data/0\0x", b"")]), UnsafeError, "archive"),
    "a name with an empty part": (zip_bytes([*SOUND, Rec("archive//x", b"")]), UnsafeError, "'archive//x'"),
    "a name with a dot part": (zip_bytes([*SOUND, Rec("archive/./x", b"")]), UnsafeError, "'archive/./x'"),
    "a folder's own entry": (zip_bytes([*SOUND, Rec("archive/data/", b"")]), UnsafeError, "'archive/data/'"),
    "a name that is not text": (zip_bytes([*SOUND, Rec(b"archive/\xff", b"")]), MalformedError, "not UTF-8"),
    "a name with an escape code": (zip_bytes([*SOUND, Rec("archive/../\x1b[2J", b"")]), UnsafeError, "\\x1b"),
    "a very long name": (zip_bytes([*SOUND, Rec("x" * 60_000, b"")]), UnsafeError, "xxx"),
    "compressed": (_with(method=8), UnsupportedError, "'archive/data/0' is compressed (method 8)"),
    "encrypted": (_with(flags=0x801), UnsupportedError, "'archive/data/0' is encrypted"),
    "sizes that differ": (
        _with(packed=15),
        MalformedError,
        "'archive/data/0' is stored, yet its sizes differ (15 and 16",
    ),
    "its own header has another name": (
        _with(local_name="archive/data/9"),
        UnsafeError,
        "'archive/data/0' where the record itself",
    ),
    "its own header has a longer name": (_with(local_name="archive/data/00"), UnsafeError, "another name"),
    "its own header is compressed": (_with(local_method=8), MalformedError, "method 8"),
    "its own header is encrypted": (_with(local_flags=0x801), MalformedError, "flags 0x801"),
    "its own header has another size": (_with(local_nbytes=15), MalformedError, "15/15 bytes by its own header"),
    "its own header has no size": (_with(local_nbytes=0), MalformedError, "0/0 bytes by its own header"),
    "its own header is none": (_with(local_signature=b"PK\x03\x05"), MalformedError, "no record header at byte"),
    "a header beyond the file": (_with(header_offset=1 << 30), MalformedError, "beyond the zip's records"),
    "a header beyond any file": (
        _with(header_offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, (1 << 64) - 1)),
        MalformedError,
        "beyond the zip's records",
    ),
    "a header in the directory": (
        _with(header_offset=len(zip_bytes(SOUND)) - 100),
        MalformedError,
        "beyond the zip's records",
    ),
    "a zip64 field cut short": (
        _with(header_offset=0xFFFFFFFF, extra=struct.pack("<HHL", 1, 8, 7)),
        MalformedError,
        "beyond the zip's",
    ),
    "a zip64 field of odd length": (
        _with(header_offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 200, 7) + b"abc"),
        MalformedError,
        "no record header",
    ),
    "a size that no file has": (
        _with(nbytes=0xFFFFFFFF, local_nbytes=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)),
        MalformedError,
        "beyond the zip's records",
    ),
    "a record that reaches into the directory": (
        zip_bytes([*STORED, Rec("a/data/1", b"", nbytes=20, local_nbytes=20)]),
        MalformedError,
        "'a/data/1' ends at byte",
    ),
    "a record that reaches into the next": (
        zip_bytes([Rec("a/data/1", b"", nbytes=20, local_nbytes=20), *STORED]),
        UnsafeError,
        "'a/data/1' and 'a/data.pkl' overlap",
    ),
    "more records claimed than there": (zip_bytes(SOUND, count=6), MalformedError, "corrupt at its byte"),
    "many more records claimed": (zip_bytes(SOUND, count=60_000), MalformedError, "room for fewer"),
    "fewer records claimed than there": (zip_bytes(SOUND, count=4), MalformedError, "says 4 records and holds"),
    "several volumes": (zip_bytes(SOUND, disk=1), MalformedError, "several volumes"),
    "records on other volumes": (zip_bytes(SOUND, count_here=2), MalformedError, "several volumes"),
    "a record on another volume": (_with(disk=3), MalformedError, "several volumes"),
    "the two ends disagree": (zip_bytes(SOUND, zip64=True, narrow_count=4), MalformedError, "two ends disagree"),
    "the directory lies elsewhere": (zip_bytes(SOUND, shift=10), MalformedError, "does not end at byte"),
    "bytes before the zip": (b"#!/bin/sh\n" + zip_bytes(SOUND), MalformedError, "bytes were put before the zip"),
    "bytes after the zip": (zip_bytes(SOUND) + b"garbage", MalformedError, "7 bytes follow the end of the zip"),
    "a comment cut short": (
        zip_bytes(SOUND, comment=b"twelve bytes")[:-5],
        MalformedError,
        "5 bytes are missing from the end",
    ),
    "another zip in the comment": (
        zip_bytes(SOUND, comment=zip_bytes([Rec("x/data.pkl", b"")])),
        MalformedError,
        "does not end at byte",
    ),
    "text": (b"this is a text file\n" * 100, MalformedError, "not a torch.save file"),
    "empty": (b"", MalformedError, "no zip directory at its end (0 bytes)"),
    "only a signature": (b"PK\x05\x06", MalformedError, "no zip directory"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_torch_never_writes_is_refused(title: str, tmp_path: Path) -> None:
    data, error, says = REFUSED[title]
    assert says in refused(tmp_path, data, error)


def test_bytes_put_before_a_zip_are_refused_though_its_offsets_know_of_them(tmp_path: Path) -> None:
    """torch looks at the first four bytes. It takes this file for a bare pickle, and runs it."""
    assert "10 bytes lie before the zip's first record" in refused(
        tmp_path, zip_bytes(SOUND, prefix=b"#!/bin/sh\n"), UnsafeError
    )


def test_a_zip64_end_that_lies_is_refused(tmp_path: Path, real: bytes) -> None:
    locator = real.rindex(b"PK\x06\x07")
    for offset, says in (
        (1 << 63, "beyond the file's"),
        (0, "no zip64 directory at byte 0"),
        (len(real) - 10, "beyond the file's"),
    ):
        data = real[: locator + 8] + struct.pack("<Q", offset) + real[locator + 16 :]
        assert says in refused(tmp_path, data)


def test_a_huge_directory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv.checkpoint.torchfile.zip.MAX_DIRECTORY_BYTES", 100)
    assert "the limit is 100" in refused(tmp_path, zip_bytes(SOUND))


def test_every_truncation_is_refused(real: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(written(tmp_path, real)) as archive:
        starts = [info.header_offset for info in archive.infolist()]
    points = {0, 1, 4, len(real) - 1, len(real) - 22, len(real) - 21, len(real) - 42, len(real) - 98, *starts}
    points |= {start + 30 for start in starts} | set(range(max(starts), len(real), 7))
    for point in sorted(points):
        assert "truncated" in refused(tmp_path, real[:point]) or point > 0


def test_a_zip_that_deflates_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", PICKLE * 50)
    assert "re-zipped" in refused(tmp_path, (tmp_path / "file.pt").read_bytes(), UnsupportedError)


def test_reading_past_the_end_and_failing_reads_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, b"abc")
    with open_for_reading(path) as file:
        assert file.read(1, 2) == b"bc"
        with pytest.raises(MalformedError, match=r"file\.pt: truncated: expected 4 bytes at offset 1, found 2"):
            file.read(1, 4)
        with pytest.raises(MalformedError, match=r"file\.pt: truncated: expected 4 bytes at offset 1, found 2"):
            file.read_into(1, memoryview(bytearray(4)))
    with pytest.raises(
        MalformedError, match=r"file\.pt: cannot be read: 1 bytes at offset 0 failed: Bad file descriptor"
    ):
        file.read(0, 1)


# Mutations of real files

MUTATION = settings(
    derandomize=True, deadline=None, database=None, max_examples=800, suppress_health_check=list(HealthCheck)
)
changes = st.one_of(
    st.integers(0, 255).map(lambda v: bytes([v])),
    st.sampled_from(
        [b"\0" * 8, b"\xff" * 4, b"\xff" * 8, b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04", b"R", b"Q", b".", b"c", b"("]
    ),
    st.binary(min_size=1, max_size=4),
)


def _structures(data: bytes) -> list[int]:
    """Return the bytes that steer a reader: the directory, the local headers and the pickle, but not the storages."""
    points: list[int] = []
    at = data.find(b"PK\x01\x02")
    points += range(at, len(data))
    at = data.find(b"PK\x03\x04")
    while at >= 0:
        points += range(at, min(len(data), at + 50))
        at = data.find(b"PK\x03\x04", at + 4)
    return points


def _read_all(path: Path) -> None:
    from dsconv.checkpoint.pickles.values import TensorRef

    file = TorchFile(path)
    pending = [file.root]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, TensorRef):
            file.pieces(value)


@pytest.mark.parametrize("part", ["zip", "pickle", "cut and joined"])
def test_no_mutation_of_a_real_file_ends_in_anything_but_our_errors(part: str, real: bytes, tmp_path: Path) -> None:
    points = _structures(real)
    with zipfile.ZipFile(io.BytesIO(real)) as archive:
        records = [Rec(name, archive.read(name)) for name in archive.namelist()]
    start = real.index(b"\x80\x02")
    end = start + len(records[0].data)
    path = tmp_path / "mutant.pt"
    worst = 0.0

    def mutant(draws: list[tuple[int, bytes]], size: int) -> bytes:
        data = bytearray(real)
        for where, change in draws:
            if part == "zip":
                at = points[where % len(points)]
                data[at : at + len(change)] = change
            elif part == "pickle":
                at = start + where % (end - start)
                data[at : at + len(change)] = change[: end - at]
            else:
                at = where % len(data)
                data = data[:at] + change + data[at + size % 300 :]
        if part == "pickle":  # with the right checksum
            return zip_bytes([replace(records[0], data=bytes(data[start:end])), *records[1:]])
        return bytes(data)

    @MUTATION
    @given(st.lists(st.tuples(st.integers(0, 1 << 16), changes), min_size=1, max_size=3), st.integers(0, 1 << 16))
    def check(draws: list[tuple[int, bytes]], size: int) -> None:
        nonlocal worst
        path.write_bytes(mutant(draws, size))
        before = time.process_time()
        error: DsconvError | None = None
        try:
            _read_all(path)
        except DsconvError as caught:
            error = caught
        assert error is None or names_file_and_is_short(error, path)
        worst = max(worst, time.process_time() - before)

    check()
    assert worst < 1.0


def test_a_tensor_over_a_mutant_storage_is_bounded(tmp_path: Path) -> None:
    path = written(tmp_path, zip_bytes(pt_records(whole(tensor(shape=(4,), strides=(1 << 40,))), _0=bytes(16))))
    file = TorchFile(path)
    with pytest.raises(MalformedError, match="reaches byte"):
        file.pieces(file.root)


@pytest.mark.parametrize("between", [b"\0", b"PK\x06\x06" + bytes(52)])
def test_a_zip64_end_that_does_not_touch_its_locator_is_refused(between: bytes, tmp_path: Path) -> None:
    """torch follows the locator, and Python's zipfile looks right before it, so two ends could give two models."""
    sound = zip_bytes(SOUND, zip64=True)
    locator = sound.rindex(b"PK\x06\x07")
    with pytest.raises(UnsafeError, match="is not followed by its locator"):
        opened(written(tmp_path, sound[:locator] + between + sound[locator:]))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (4, 56, "is not followed by its locator"),  # size of the zip64 end in bytes
        (16, 1, "several volumes"),
        (20, 1, "several volumes"),
        (24, 1, "several volumes"),
        (32, 1, "several volumes"),
        (40, 1, "two ends disagree"),
    ],
)
def test_a_zip64_end_of_other_fields_is_refused(field: int, value: int, says: str, tmp_path: Path) -> None:
    data = bytearray(zip_bytes(SOUND, zip64=True))
    data[data.rindex(b"PK\x06\x06") + field] = value
    with pytest.raises((MalformedError, UnsafeError), match=says):
        opened(written(tmp_path, bytes(data)))


NAMES_THAT_READERS_DIFFER_ON = {
    "two names that differ in case": (
        [*SOUND, Rec("archive/DATA.PKL", PICKLE)],
        "two records named 'archive/DATA.PKL'",
    ),
    "a name that is not marked as UTF-8": ([*SOUND, Rec("archive/data/ä", b"", flags=0)], "does not say that its name"),
    "a second name": (
        [*SOUND, Rec("archive/data/2", b"", extra=b"up\x09\x00\x01" + bytes(4) + b"abcd")],
        "has a second name",
    ),
}


@pytest.mark.parametrize("title", NAMES_THAT_READERS_DIFFER_ON)
def test_names_that_readers_differ_on_are_refused(title: str, tmp_path: Path) -> None:
    records, says = NAMES_THAT_READERS_DIFFER_ON[title]
    with pytest.raises(UnsafeError, match=says):
        opened(written(tmp_path, zip_bytes(records)))


def test_torch_does_look_names_up_without_regard_to_case(tmp_path: Path) -> None:
    """This is the reason for the refusal: torch finds a record whose name differs in case."""
    records = [Rec(str(r.name).replace("data.pkl", "DATA.pkl"), r.data) for r in SOUND]
    reader = torch._C.PyTorchFileReader(str(written(tmp_path, zip_bytes(records))))
    assert bytes(reader.get_record("data.pkl")) == PICKLE


def test_names_marked_as_utf8_are_read(tmp_path: Path) -> None:
    assert "data/ä" in opened(written(tmp_path, zip_bytes([*SOUND, Rec("archive/data/ä", b"x")]))).records


COSTLY: dict[str, list[Rec]] = {
    "many records": [Rec(f"a/{i:x}", b"") for i in range(4_000)],
    "long names": [Rec(f"a/{'x' * 60_000}{i}", b"") for i in range(20)],
    "names of many folders": [Rec(f"a/{'x/' * 30_000}{i}", b"") for i in range(20)],
    "a root for each": [Rec(f"r{i:x}/{i:x}", b"") for i in range(4_000)],
    "one name": [Rec("a/b", b"")] * 4_000,
    "one place": [Rec(f"a/{i:x}", b"", header_offset=0) for i in range(4_000)],
    "many extra fields": [Rec(f"a/{i:x}", b"", extra=b"\x02\0\0\0" * 16_000) for i in range(5)],
}


@pytest.mark.parametrize("title", COSTLY)
def test_a_directory_takes_time_and_memory_in_proportion(title: str, tmp_path: Path) -> None:
    data = zip_bytes(COSTLY[title])
    path = written(tmp_path, data)
    tracemalloc.start()
    start = time.process_time()
    try:
        with suppress(DsconvError):
            opened(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1 + 10e-6 * len(data)
    assert peak_bytes < (1 << 20) + 60 * len(data)
