"""Signs, found without reading the weights, that files of a checkpoint do not belong together."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.checkpoint.pickles.values import FragmentAddress, TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extent, read_extents
from dsconv.errors import InconsistentCheckpointError, MalformedError
from dsconv.zero_utils import files

SAMPLES = 16  # elements compared of each tensor's start; 64 bytes of each file


def written_as(file: TorchFile, rank: int) -> None:
    """torch.save names the zip's root after the file it writes, so a file that was renamed to another rank's is seen.

    ``rank`` is the data-parallel one.
    """
    for pattern in (files.OPTIMIZER, files.ZERO3_MODEL):
        match = pattern.fullmatch(file.archive.root + ".pt")
        if match and int(match["dp"]) != rank:
            raise InconsistentCheckpointError(
                f"{file.path} was written as {file.archive.root}.pt: it is the file of rank {match['dp']}, not {rank}. "
                "Shard files were renamed or swapped: give them their own names again"
            )
    own_name(file)


def own_name(file: TorchFile) -> None:
    """The same of every rank in a name: pipeline layer, model-parallel and data-parallel rank."""
    for pattern in (files.OPTIMIZER, files.ZERO3_MODEL, files.MODEL, files.LAYER):
        written, named = pattern.fullmatch(file.archive.root + ".pt"), pattern.fullmatch(file.path.name)
        if (
            written
            and named
            and any(written[key] != named[key] for key in ("layer", "mp", "dp") if key in pattern.groupindex)
        ):
            raise InconsistentCheckpointError(
                f"{file.path} was written as {file.archive.root}.pt: shard files were renamed or swapped. Give them"
                " their own names again"
            )


def written_as_expert(file: TorchFile) -> None:
    """The same for an expert's file."""
    if files.EXPERT.fullmatch(file.archive.root + ".pt") and file.archive.root != file.path.stem:
        raise InconsistentCheckpointError(
            f"{file.path} was written as {file.archive.root}.pt. Shard files were renamed or swapped: give them their"
            " own names again"
        )


def same_save(first: ModuleStates, other: ModuleStates) -> None:
    """Model states of two ranks must be of one step."""
    if first.step != other.step:
        raise InconsistentCheckpointError(
            f"{first.path} is of step {first.step} and {other.path} of step {other.step}: files of two saves lie in one"
            " folder"
        )
    if first.param_shapes != other.param_shapes or first.frozen_shapes != other.frozen_shapes:
        raise InconsistentCheckpointError(
            f"{first.path} and {other.path} list different parameters: they are not of one run"
        )


def same_step(partitions: list[tuple[TorchFile, dict[str, Any]]]) -> None:
    """The optimizer's own step counter, where it keeps one, must agree between the ranks."""
    steps: dict[float, Path] = {}
    for file, state in partitions:
        step = optimizer_step(file, state)
        if step is not None:
            steps.setdefault(step, file.path)
    if len(steps) > 1:
        (step, path), (other, other_path) = list(steps.items())[:2]
        raise InconsistentCheckpointError(
            f"{path} is of optimizer step {step:g} and {other_path} of step {other:g}: files of two saves lie in one"
            " folder. Restore the files of one of them"
        )


def optimizer_step(file: TorchFile, state: dict[str, Any]) -> float | None:
    """The first 'step' of the base optimizer's state; None where it keeps none."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    states = base.get("state") if isinstance(base, dict) else base
    rows = list(states.values()) if isinstance(states, dict) else states if isinstance(states, list) else []
    for row in rows[:1]:
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, TensorRef) and step.numel == 1:
            values = decode(file.value(step), step.dtype)
            return float(values[0]) if values else None
        if isinstance(step, (int, float)):
            return float(step)
    return None


def slice_mappings(
    path: Path, state: dict[str, Any], shapes: list[dict[str, tuple[int, ...]]], lengths: list[list[int]], rank: int
) -> None:
    """A rank's own list of the parameters it holds (param_slice_mappings) must name parameters of its range."""
    mappings = state.get("param_slice_mappings")
    if not isinstance(mappings, list) or len(mappings) != len(shapes):
        raise MalformedError(f"{path}: param_slice_mappings does not list {len(shapes)} groups")
    for g, mapping in enumerate(mappings):
        if not isinstance(mapping, dict):
            raise MalformedError(f"{path}: param_slice_mappings of group {g} is not a mapping")
        for name, fragment in mapping.items():
            if name not in shapes[g]:
                raise InconsistentCheckpointError(
                    f"{path}: holds parameter {name!r} in group {g}, which the model states do not list there"
                )
            if isinstance(fragment, FragmentAddress) and fragment.start + fragment.numel > lengths[g][rank]:
                raise InconsistentCheckpointError(
                    f"{path}: parameter {name!r} should end at element {fragment.start + fragment.numel} of this file's"
                    f" group {g}, which has {lengths[g][rank]}"
                )


def masters_match_module(states: ModuleStates, entries: dict[str, TensorEntry], warnings: list[str]) -> None:
    """The model states of stages 1 and 2 hold the weights too: each must begin with its master's elements, cast.

    A handful of elements of each tensor is read. Weights that were changed behind the optimizer's back are legitimate,
    and the masters are what training goes on from, so a difference is a warning.
    """
    samples: list[tuple[str, DType, DType]] = []
    extents: list[Extent] = []
    for name, entry in entries.items():
        tensor = states.module.get(name)
        if entry.role != "parameter" or not isinstance(tensor, TensorRef) or not entry.numel:
            continue
        if tensor.shape != entry.shape:
            raise InconsistentCheckpointError(
                f"{states.path}: parameter {name!r} has shape {list(tensor.shape)} in the module and"
                f" {list(entry.shape)} in param_shapes"
            )
        if not is_contiguous(tensor.shape, tensor.strides):
            continue
        piece = entry.pieces[0]
        count = min(SAMPLES, piece.numel)
        samples.append((name, entry.dtype, tensor.dtype))
        extents.append(Extent(piece.extent.record, piece.extent.offset_bytes, count * entry.dtype.itemsize))
        extents.append(states.file.extent(tensor, 0, count))
    found = read_extents(extents)
    differing = []
    for (name, master_dtype, dtype), master_bytes, weight_bytes in zip(samples, found[::2], found[1::2], strict=True):
        master, weight = decode(master_bytes, master_dtype), decode(weight_bytes, dtype)
        if master is None or weight is None:
            continue
        if any(not _same(cast(m, dtype), w) for m, w in zip(master, weight, strict=True)):
            differing.append(name)
    if differing:
        warnings.append(
            f"{len(differing)} of the parameters differ between {states.path.name} and the optimizer's masters, the"
            f" first {differing[0]!r}: the files are of different saves, or the weights were changed without the"
            " optimizer. The masters were taken"
        )


def begins_alike(piece: Piece, dtype: DType, file: TorchFile, tensor: TensorRef, samples: int = SAMPLES) -> bool:
    """Whether the first elements of a piece of a master, cast, are the contiguous weight's from the same place on."""
    count = min(samples, piece.numel)
    master = decode(read_extent(Extent(piece.extent.record, piece.extent.offset_bytes, count * dtype.itemsize)), dtype)
    weight = decode(read_extent(file.extent(tensor, piece.start, count)), tensor.dtype)
    return (
        master is None
        or weight is None
        or all(_same(cast(m, tensor.dtype), w) for m, w in zip(master, weight, strict=True))
    )


def begins_with(entry: TensorEntry, file: TorchFile, tensor: TensorRef) -> bool:
    """Whether the first elements of ``entry``, cast, are those of a weight of ``file``; True where that cannot be
    seen.
    """
    if tensor.shape != entry.shape:
        return False
    if not entry.numel or not is_contiguous(tensor.shape, tensor.strides):
        return True
    return begins_alike(entry.pieces[0], entry.dtype, file, tensor)


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def decode(data: bytes, dtype: DType) -> list[float] | None:
    """Floats of little-endian elements; None for a dtype that needs more than the standard library."""
    code = {"float32": "f", "float64": "d", "float16": "e", "int64": "q", "int32": "i"}.get(dtype.name)
    if code:
        return [float(v[0]) for v in struct.iter_unpack("<" + code, data)]
    if dtype.name == "bfloat16":
        return [
            float(v[0])
            for v in struct.iter_unpack("<f", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)))
        ]
    return None


def cast(value: float, dtype: DType) -> float:
    """``value``, a float32, rounded to nearest even as ``dtype`` would hold it."""
    if dtype.name == "bfloat16" and value == value:
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if dtype.name == "float16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value
