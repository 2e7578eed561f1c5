"""The places where a program can hide: every file with a pickle, in real checkpoints of every format.

The program is put before the file's own pickle and its result is dropped, so a reader that runs it still gets the right
weights and notices nothing.
"""

from __future__ import annotations

import io
import pickletools
import shutil
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dsconv.checkpoint.torchfile import legacy
from tests.checkpoint.building import Rec, zip_bytes
from tests.fixtures import gloo

ZERO_CASES = ("odd-z1-bf16-w2", "odd-z2-bf16-w2", "odd-z3-bf16-w2", "odd-z0-fp32-w2")
GLOO_CASES = (  # maker, case, the folder that a user would name
    ("dcp", "fsdp2-w3", "ckpt"),
    ("pipeline", "pp2-z1-fp32", "ckpt"),
    ("moe", "z1-fp32-w2-ep1", "ckpt"),
    ("universal", "gpt2-z3-fp32-w1", "official"),
    ("rankfiles", "fsdp2-tp-w4", "."),
)


def copies(folder: Path) -> dict[str, Path]:
    """Copy small real checkpoints into ``folder`` and return them by name. Missing ones are trained first."""
    sources = {name: path / "ckpt" for name, path in gloo.ensure("zero", ZERO_CASES).items()}
    for maker, name, part in GLOO_CASES:
        sources[maker] = gloo.ensure(maker, [name])[name] / part
    return {name: Path(shutil.copytree(source, folder / name)) for name, source in sources.items()}


@dataclass(frozen=True)
class Place:
    """A ``file`` that is read when ``checkpoint`` is opened."""

    title: str
    checkpoint: Path
    file: Path
    sound: bytes

    def poison(self, program: bytes) -> None:
        self.file.write_bytes(poisoned(self.sound, program))

    def heal(self) -> None:
        self.file.write_bytes(self.sound)


def places(folder: Path) -> list[Place]:
    """Return every kind of file with a pickle in the checkpoints that ``copies`` puts into ``folder``."""
    import torch

    found = copies(folder)
    (folder / "bin").mkdir()
    (folder / "legacy").mkdir()
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    torch.save(weights, folder / "legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    where = [
        ("state dict (.bin)", folder / "bin", "pytorch_model.bin"),
        ("torch's legacy format", folder / "legacy", "pytorch_model.bin"),
        ("model states, stage 0", found["odd-z0-fp32-w2"], "mp_rank_00_model_states.pt"),
        ("model states, ZeRO-2", found["odd-z2-bf16-w2"], "mp_rank_00_model_states.pt"),
        ("model states, ZeRO-3", found["odd-z3-bf16-w2"], "zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("optimizer states, ZeRO-1", found["odd-z1-bf16-w2"], "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("optimizer states, ZeRO-2", found["odd-z2-bf16-w2"], "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("optimizer states, ZeRO-3", found["odd-z3-bf16-w2"], "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("pipeline layer", found["pipeline"], "layer_03-model_states.pt"),
        ("pipeline stage", found["pipeline"], "mp_rank_01_model_states.pt"),
        ("expert", found["moe"], "layer_0_expert_1_mp_rank_00_model_states.pt"),
        ("universal parameter", found["universal"], "fp32.pt"),
        ("DCP .metadata", found["dcp"], ".metadata"),
        ("one file a rank", found["rankfiles"], "model_rank_2.pt"),
    ]
    made = []
    for title, checkpoint, name in where:
        file = min(checkpoint.rglob(name))
        made.append(Place(title, checkpoint, file, file.read_bytes()))
    return made


def poisoned(sound: bytes, program: bytes) -> bytes:
    """Return ``sound`` with ``program`` before its pickle. It may be a torch.save zip, a torch file of the older format
    or a bare pickle.
    """
    if legacy.MAGIC_BYTES in sound[: legacy.HEAD_BYTES]:
        stream = io.BytesIO(sound)
        for _ in range(3):  # skip the magic number, the version and the machine's properties; the object comes next
            deque(pickletools.genops(stream), maxlen=0)
        at = stream.tell()
        return sound[:at] + before(program, sound[at:])
    if not sound.startswith(b"PK"):
        return before(program, sound)
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        records = [Rec(info.filename, archive.read(info)) for info in archive.infolist()]
    for record in records:
        if str(record.name).endswith("/data.pkl"):
            record.data = before(program, record.data)
    return zip_bytes(records)


def before(program: bytes, pickle: bytes) -> bytes:
    """Return one pickle: ``program`` without its STOP, POP, and then ``pickle``."""
    return program.removesuffix(b".") + b"0" + pickle
