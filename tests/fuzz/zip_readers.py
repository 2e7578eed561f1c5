"""Compare dsconv with Python's ``zipfile`` and torch on archives in which readers may see different files.

An archive is put together from the parts of two torch.save files with the same names and different values: their
records, directories, zip64 ends, locators and ends, in a mostly sound order. If all three readers accept it, they must
read the same. If dsconv accepts it, any other reader that accepts it must read the same as dsconv.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from random import Random

import torch

from dsconv.checkpoint.opening import open_checkpoint
from dsconv.errors import DsconvError
from tests.checkpoint.building import Rec, zip_bytes
from tests.fuzz.judging import OTHER, SAME, Failure, Tensors, tensors_of
from tests.fuzz.mutations import EDGES, records
from tests.fuzz.targets import Seeds, Target


@dataclass(frozen=True)
class Source:
    """A torch.save file: its records and their directory."""

    records: tuple[tuple[str, bytes], ...]


@dataclass
class Laid:
    """The places of one source's parts in the new archive."""

    offsets: list[int]
    directory: int = 0
    directory_bytes: int = 0
    end64: int = 0


def local_header(name: bytes, data: bytes) -> bytes:
    return struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", 20, 0x800, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0
    )


def directory_of(source: Source, offsets: list[int], rng: Random) -> bytes:
    """Return a central directory. Occasionally an offset lies in the zip64 field, or is false."""
    out = b""
    for (name, data), offset in zip(source.records, offsets, strict=True):
        encoded, extra, size, at = name.encode(), b"", len(data), offset
        if rng.randrange(12) == 0:
            extra = struct.pack("<2HQ", 1, 8, offset if rng.randrange(2) else rng.choice(offsets))
            at = 0xFFFFFFFF
        elif rng.randrange(60) == 0:
            at = rng.choice((*offsets, *EDGES[:8]))
        head = (
            b"PK\x01\x02",
            20,
            20,
            0x800,
            0,
            0,
            0,
            zlib.crc32(data),
            size,
            size,
            len(encoded),
            len(extra),
            0,
            0,
            0,
            0,
            at,
        )
        out += struct.pack("<4s6H3L5H2L", *head) + encoded + extra
    return out


class ZipReaders(Target):
    """torch.save files in which a second one hides."""

    name = "zip readers"
    share = 3

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        self.file = self.folder / "pytorch_model.bin"
        self.copy = self.folder / "zipfile" / "pytorch_model.bin"
        self.copy.parent.mkdir()
        self.sources = []
        for factor in (1.0, 666.0):
            torch.save({"a": torch.arange(6.0).reshape(2, 3) * factor, "b": torch.tensor([factor])}, self.file)
            found = tuple(
                (name.replace("pytorch_model", "archive"), data) for name, data in records(self.file.read_bytes())
            )
            self.sources.append(Source(found))
        self.file.write_bytes(zip_bytes([Rec(name, data) for name, data in self.sources[0].records]))
        self.before = tensors_of(open_checkpoint(self.file))

    def broken(self, rng: Random) -> bytes:
        out = bytearray()
        laid = [Laid([0] * len(source.records)) for source in self.sources]
        shift = rng.choice((0,) * 30 + (1, 4, 100))

        def put_records(which: int) -> None:
            for at, (name, data) in enumerate(self.sources[which].records):
                laid[which].offsets[at] = len(out) + shift
                out.extend(local_header(name.encode(), data) + name.encode() + data)

        def put_directory(which: int) -> None:
            laid[which].directory = len(out) + shift
            found = directory_of(self.sources[which], laid[which].offsets, rng)
            laid[which].directory_bytes = len(found)
            out.extend(found)

        def put_end64(which: int) -> None:
            laid[which].end64 = len(out) + shift
            count, place = len(self.sources[which].records), laid[which]
            size = 44 if rng.randrange(10) else rng.choice((0, 43, 44 + 12, 1 << 33))
            out.extend(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", size, 45, 45, 0, 0, count, count, place.directory_bytes,
                                   place.directory))  # fmt: skip

        def put_locator(which: int) -> None:
            out.extend(struct.pack("<4sLQL", b"PK\x06\x07", 0, laid[which].end64, 1))

        def put_end(which: int) -> None:
            count, place = len(self.sources[which].records), laid[which]
            narrow = rng.randrange(4) == 0
            numbers = (
                (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
                if narrow
                else (count, count, place.directory_bytes, place.directory)
            )
            comment = rng.choice((b"",) * 6 + (b"comment", rng.randbytes(30), b"PK\x05\x06" + bytes(18)))
            claimed = len(comment) if rng.randrange(12) else rng.choice((0, len(comment) + 1, 22))
            out.extend(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *numbers, claimed) + comment)

        def put_junk(which: int) -> None:
            out.extend(rng.randbytes(rng.randrange(1, 40)))

        parts = [put_records, put_directory, *([put_end64, put_locator] if rng.randrange(2) else []), put_end]
        plan = [(part, 0) for part in parts]
        for _ in range(rng.choice((0, 1, 2, 3))):  # add parts of the other source, or duplicates
            plan.insert(rng.randrange(len(plan) + 1), (rng.choice((*parts, put_end64, put_junk)), rng.randrange(2)))
        if rng.randrange(3) == 0:  # add a whole second archive
            at = rng.randrange(len(plan) + 1)
            plan[at:at] = [(part, 1) for part in parts]
        if rng.randrange(5) == 0:
            at, other = rng.randrange(len(plan)), rng.randrange(len(plan))
            plan[at], plan[other] = plan[other], plan[at]
        for part, which in plan:
            part(which)
        return bytes(out)

    def judge(self, broken: bytes) -> str:
        self.file.write_bytes(broken)
        found = tensors_of(open_checkpoint(self.file))
        theirs = self.by_zipfile(broken)
        if theirs is not None and theirs != found:
            raise Failure(f"zipfile reads {_said(theirs)}, dsconv {_said(found)}")
        loaded = self.by_torch()
        if loaded is not None and loaded != found:
            raise Failure(f"torch reads {_said(loaded)}, dsconv {_said(found)}")
        return SAME if found == self.before else OTHER

    def by_zipfile(self, data: bytes) -> Tensors | None:
        """Return the tensors of the records that Python's ``zipfile`` sees, or None if it refuses the file."""
        try:
            seen = records(data)
        except Exception:  # noqa: BLE001 - zipfile's errors are of many kinds
            return None
        if len({name for name, _ in seen}) != len(seen):
            raise Failure("zipfile sees a name twice")
        self.copy.write_bytes(zip_bytes([Rec(name, content) for name, content in seen]))
        try:
            return tensors_of(open_checkpoint(self.copy))
        except DsconvError as error:
            raise Failure(f"zipfile sees records that are no model: {error}") from None

    def by_torch(self) -> Tensors | None:
        """Return what torch loads, or None if it refuses the file."""
        try:
            theirs = torch.load(self.file, weights_only=True)
        except Exception:  # noqa: BLE001 - torch's errors are of every kind
            return None
        return {
            name: (str(value.dtype).removeprefix("torch."), tuple(value.shape), value.contiguous().numpy().tobytes())
            for name, value in theirs.items()
        }


def _said(found: Tensors) -> str:
    return str({name: data[-4:].hex() for name, (_, _, data) in sorted(found.items())})
