"""The targets of the fuzzer: real files, how each is broken, and what must hold if dsconv still reads it.

In ``covered`` targets a checksum covers every byte that matters, so a broken file is refused or gives the same bytes as
before. Where no checksum helps (a bare pickle, JSON, raw safetensors data, a file forged with sound checksums) the rule
is weaker: see each target's ``judge``.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from attacks.places import copies
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.pickles import machine
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.torchfile.legacy import storage_of
from tests.fuzz import unchanged
from tests.fuzz.judging import OTHER, SAME, Failure, Tensors, tensors_of
from tests.fuzz.mutations import damaged, forged_json, forged_pickle, forged_zip


@dataclass
class Seeds:
    """The real files in ``folder`` that are broken."""

    folder: Path
    checkpoints: list[Path] = field(default_factory=list)
    pickles: list[bytes] = field(default_factory=list)


def seeds(folder: Path) -> Seeds:
    """Return copies of the trained checkpoints. Missing ones are trained first."""
    found = Seeds(folder, list(copies(folder).values()))
    for checkpoint in found.checkpoints:
        for path in sorted(checkpoint.rglob("*")):
            if path.name == ".metadata":
                found.pickles.append(path.read_bytes())
            elif path.is_file() and zipfile.is_zipfile(path) and path.suffix == ".pt":
                with zipfile.ZipFile(path) as archive:
                    found.pickles.append(archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
    found.pickles = sorted({p for p in found.pickles if len(p) < 12_000})
    return found


def state_dict() -> dict[str, Any]:
    """Return a small state dict with everything that torch.save can hold: dtypes, views, ties, no elements, no
    dimensions.
    """
    base = torch.arange(24, dtype=torch.float32)
    return {
        "a.weight": base.reshape(4, 6),
        "a.t": base.reshape(4, 6).t(),
        "tied": base.reshape(4, 6),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "part": base[3:9],
    }


class Target:
    """One kind of file. ``broken`` makes an input; ``judge`` reads it and returns SAME or OTHER, or raises."""

    name: str
    share = 1  # of the inputs of a mixed run
    covered = False

    def __init__(self, seeds: Seeds) -> None:
        self.folder = seeds.folder / self.name
        self.folder.mkdir()

    def broken(self, rng: Random) -> Any:
        raise NotImplementedError

    def judge(self, broken: Any) -> str:
        raise NotImplementedError


class Pickles(Target):
    """The pickle machine alone, on pickles of every format with changed opcodes or bytes."""

    name = "pickle"
    share = 6

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        self.pickles = seeds.pickles

    def broken(self, rng: Random) -> bytes:
        data = rng.choice(self.pickles)
        return damaged(data, rng) if rng.randrange(4) == 0 else forged_pickle(data, rng, self.pickles)

    def judge(self, broken: bytes) -> str:
        path = Path("broken.pkl")
        if len(safe_repr(machine.load(broken, path, lambda pid: storage_of(pid, path)))) > 80:
            raise Failure("a value is shown at length")
        return OTHER


class Files(Target):
    """One file that is broken over and over. ``before`` is what the sound file reads as."""

    file: Path
    opened: Path

    def start(self, file: Path, opened: Path | None = None) -> None:
        self.file, self.opened = file, opened or file
        self.data = file.read_bytes()
        self.before = tensors_of(open_checkpoint(self.opened))

    def read(self, broken: bytes) -> Tensors:
        self.file.write_bytes(broken)
        return tensors_of(open_checkpoint(self.opened))

    def judge(self, broken: bytes) -> str:
        if self.read(broken) == self.before:
            return SAME
        if self.covered:
            raise Failure("other tensors than before, and no error")
        return OTHER


class ZipDamage(Files):
    """A damaged torch.save file, in which a CRC-32 covers every byte that matters."""

    name = "zip damage"
    share = 3
    covered = True

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        torch.save(state_dict(), self.folder / "pytorch_model.bin")
        self.start(self.folder / "pytorch_model.bin")

    def broken(self, rng: Random) -> bytes:
        return damaged(self.data, rng)


class ZipForgery(ZipDamage):
    """A torch.save file that is rebuilt with sound checksums around a changed pickle, storages and directory.

    It may hold other tensors. If torch reads it too, both must agree on each tensor.
    """

    name = "zip forgery"
    covered = False

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        self.pickles = seeds.pickles

    def broken(self, rng: Random) -> bytes:
        return forged_zip(self.data, rng, self.pickles)

    def judge(self, broken: bytes) -> str:
        found = self.read(broken)
        if found == self.before:
            return SAME
        try:
            theirs = torch.load(self.file, weights_only=True)
        except Exception:  # noqa: BLE001 - torch's errors are of every kind
            return OTHER
        for name, value in theirs.items() if isinstance(theirs, dict) else ():
            if isinstance(value, torch.Tensor) and name in found:
                dtype, shape, data = found[name]
                expected = (
                    value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
                )
                if (dtype, shape, data) != (str(value.dtype).removeprefix("torch."), tuple(value.shape), expected):
                    raise Failure(
                        f"{name!a} is {dtype} {shape}, to torch {value.dtype} {tuple(value.shape)}, or of other bytes"
                    )
        return OTHER


class Legacy(Files):
    """torch's older format, which has no checksums."""

    name = "legacy file"

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        torch.save(state_dict(), self.folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        self.start(self.folder / "pytorch_model.bin")

    def broken(self, rng: Random) -> bytes:
        return damaged(self.data, rng)


class SafetensorsHeader(Files):
    """The header of a safetensors file: safetensors accepts what dsconv accepts, and both agree on every tensor."""

    name = "safetensors"
    share = 5

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        plain = {name: tensor.clone().contiguous() for name, tensor in state_dict().items()}
        save_file(plain, self.folder / "model.safetensors", {"format": "pt"})
        self.start(self.folder / "model.safetensors")
        size = struct.unpack("<Q", self.data[:8])[0]
        self.header, self.rest = json.loads(self.data[8 : 8 + size]), self.data[8 + size :]

    def broken(self, rng: Random) -> bytes:
        kind = rng.randrange(8)
        if kind == 0:
            return damaged(self.data, rng)
        raw = damaged(self.data[8 : -len(self.rest)], rng) if kind == 1 else forged_json(self.header, rng)
        raw += b" " * (-len(raw) % 8 if rng.randrange(4) else rng.randrange(20))
        size = len(raw) if rng.randrange(20) else rng.choice((0, 1, len(raw) - 1, len(raw) + 1, 1 << 31, (1 << 64) - 1))
        return struct.pack("<Q", size % (1 << 64)) + raw + self.rest

    def judge(self, broken: bytes) -> str:
        found = self.read(broken)
        if found == self.before:
            return SAME
        try:
            theirs = {name: (tuple(item["shape"]), bytes(item["data"])) for name, item in deserialize(broken)}
        except SafetensorError as error:
            raise Failure(f"safetensors refuses it: {error}") from None
        if theirs != {name: (shape, data) for name, (_, shape, data) in found.items()}:
            raise Failure("safetensors reads other tensors")
        return OTHER


class Index(Files):
    """The index of a sharded safetensors folder: it may leave tensors out, but never change one."""

    name = "index"
    share = 3

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        weight_map: dict[str, str] = {}
        for number, names in enumerate((("a.weight", "b"), ("scalar", "empty", "mask")), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: state_dict()[name] for name in names}, self.folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        path = self.folder / "model.safetensors.index.json"
        self.index = {"metadata": {"total_size": 120}, "weight_map": weight_map}
        path.write_text(json.dumps(self.index))
        self.start(path, self.folder)

    def broken(self, rng: Random) -> bytes:
        return damaged(self.data, rng) if rng.randrange(4) == 0 else forged_json(self.index, rng)

    def judge(self, broken: bytes) -> str:
        found = self.read(broken)
        if found == self.before:
            return SAME
        if not found.items() <= self.before.items():
            raise Failure("a tensor that the shards do not hold")
        return OTHER


class Metadata(Files):
    """``.metadata`` of a DCP directory, a bare pickle without a checksum, whose names and places are trusted."""

    name = ".metadata"
    share = 2

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        source = next(path for path in seeds.checkpoints if path.name == "dcp")
        folder = Path(shutil.copytree(source, self.folder / "ckpt"))
        self.start(folder / ".metadata", folder)

    def broken(self, rng: Random) -> bytes:
        return damaged(self.data, rng) if rng.randrange(4) == 0 else forged_pickle(self.data, rng)


@dataclass(frozen=True)
class Broken:
    """One checkpoint and the new contents of its files. None means that the file is missing."""

    checkpoint: Path
    files: tuple[tuple[Path, bytes | None], ...]


class Checkpoints(Target):
    """Whole checkpoints of every format with torch.save files, one of which is damaged, cut, lost, or swapped with
    another.
    """

    name = "checkpoint"
    covered = True
    formats: Sequence[str] = ("*.pt", "*.distcp")

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        self.files: dict[Path, dict[Path, bytes]] = {}
        self.before: dict[Path, Tensors] = {}
        for source in seeds.checkpoints:
            folder = Path(shutil.copytree(source, self.folder / source.name))
            found = sorted(path for pattern in self.formats for path in folder.rglob(pattern))
            self.files[folder] = {path: path.read_bytes() for path in found}
            self.before[folder] = tensors_of(open_checkpoint(folder))

    def broken(self, rng: Random) -> Broken:
        checkpoint = rng.choice(list(self.files))
        files = self.files[checkpoint]
        path, other = rng.choice(list(files)), rng.choice(list(files))
        kind = rng.randrange(10)
        if kind == 0:
            return Broken(checkpoint, ((path, None),))
        if checkpoint.name in ("universal", "pipeline"):
            # Only a file's name says which tensor or layer it holds, so nobody can notice that two were swapped.
            kind = max(kind, 3)
        if kind == 1:
            return Broken(checkpoint, ((path, files[other]), (other, files[path])))
        if kind == 2:
            return Broken(checkpoint, ((path, files[other]),))
        return Broken(checkpoint, ((path, damaged(files[path], rng)),))

    def judge(self, broken: Broken) -> str:
        try:
            for path, data in broken.files:
                path.unlink(missing_ok=True)
                if data is not None:
                    path.write_bytes(data)
            with unchanged.except_for([path for path, _ in broken.files], self.folder):
                found = tensors_of(open_checkpoint(broken.checkpoint))
        finally:
            for path, _ in broken.files:
                path.write_bytes(self.files[broken.checkpoint][path])
        if found != self.before[broken.checkpoint]:
            names = sorted(path.name for path, _ in broken.files)
            raise Failure(f"{broken.checkpoint.name}: other tensors than before and no error, from {names}")
        return SAME
