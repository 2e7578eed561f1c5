"""Signs, found without reading the weights, that files of a checkpoint do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.values import cast, decode, same_number
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Extent, TensorEntry
from dsconv.checkpoint.pickles.values import FragmentAddress, TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extents
from dsconv.errors import InconsistentCheckpointError, MalformedError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils import tag_folder

SAMPLES = 16  # elements that are compared of each tensor's start: 64 bytes of each file


def written_as(file: TorchFile, rank: int) -> None:
    """Raise InconsistentCheckpointError if a file was written as that of another data-parallel rank than ``rank``.

    torch.save names the root of the zip after the file that it writes, so that a renamed file is seen.
    """
    for pattern in (tag_folder.OPTIMIZER, tag_folder.ZERO3_MODEL):
        match = pattern.fullmatch(file.archive.root + ".pt")
        if match and int(match["dp"]) != rank:
            raise InconsistentCheckpointError(
                f"{file.path} was written as {file.archive.root}.pt: it is the file of rank {match['dp']}, not {rank}. "
                "Shard files were renamed or swapped: give them their own names again"
            )
    own_name(file)


def own_name(file: TorchFile) -> None:
    """Raise it if the name that a file has differs in any rank from that under which it was written.

    The ranks in a name are the pipeline layer, the model-parallel and the data-parallel rank.
    """
    for pattern in (tag_folder.OPTIMIZER, tag_folder.ZERO3_MODEL, tag_folder.MODEL, tag_folder.LAYER):
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
    """Raise it if an expert's file was written under another name."""
    if tag_folder.EXPERT.fullmatch(file.archive.root + ".pt") and file.archive.root != file.path.stem:
        raise InconsistentCheckpointError(
            f"{file.path} was written as {file.archive.root}.pt. Shard files were renamed or swapped: give them their"
            " own names again"
        )


def same_save(first: ModuleStates, other: ModuleStates) -> None:
    """Raise it unless model states of two ranks are from one step and list the same parameters."""
    if first.step != other.step:
        raise InconsistentCheckpointError(
            f"{first.path} is from step {first.step} and {other.path} from step {other.step}: files from two saves"
            " lie in one folder"
        )
    if first.param_shapes != other.param_shapes or first.frozen_shapes != other.frozen_shapes:
        raise InconsistentCheckpointError(
            f"{first.path} and {other.path} list different parameters: they are not from one run"
        )


def same_step(partitions: list[tuple[TorchFile, dict[str, Any]]]) -> None:
    """Raise it unless the optimizer's own step counter, if it keeps one, is the same on all ranks."""
    steps: dict[float, Path] = {}
    for file, state in partitions:
        step = optimizer_step(file, state)
        if step is not None:
            steps.setdefault(step, file.path)
    if len(steps) > 1:
        (step, path), (other, other_path) = list(steps.items())[:2]
        raise InconsistentCheckpointError(
            f"{path} is from optimizer step {step:g} and {other_path} from step {other:g}: files from two saves"
            " lie in one folder. Restore the files of one of them"
        )


def optimizer_step(file: TorchFile, state: dict[str, Any]) -> float | None:
    """Return the first 'step' of the base optimizer's state, or None if it keeps none."""
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
    """Raise it unless a rank's own list of what it holds names parameters of its range.

    Args:
        path: The rank's optimizer file, for messages.
        state: What it holds; the list is ``param_slice_mappings``.
        shapes: The parameters of each group, by the model states.
        lengths: The elements that each rank holds of each group: ``lengths[group][rank]``.
        rank: The rank.
    """
    mappings = state.get("param_slice_mappings")
    if not isinstance(mappings, list) or len(mappings) != len(shapes):
        raise MalformedError(f"{path}: param_slice_mappings does not list {counted(len(shapes), 'group')}")
    for g, mapping in enumerate(mappings):
        if not isinstance(mapping, dict):
            raise MalformedError(f"{path}: param_slice_mappings of group {g} is not a mapping")
        for name, fragment in mapping.items():
            if name not in shapes[g]:
                raise InconsistentCheckpointError(
                    f"{path}: holds parameter {safe_repr(name)} in group {g}, which the model states do not list there"
                )
            if isinstance(fragment, FragmentAddress) and fragment.start + fragment.numel > lengths[g][rank]:
                raise InconsistentCheckpointError(
                    f"{path}: parameter {safe_repr(name)} should end at element {fragment.start + fragment.numel} of"
                    f" this file's group {g}, which has {lengths[g][rank]}"
                )


def masters_match_module(states: ModuleStates, entries: dict[str, TensorEntry], warnings: list[str]) -> list[str]:
    """Return the weights that do not begin with their masters' elements, cast; add a warning if there are any.

    The model states of stages 1 and 2 hold the weights too. A handful of elements of each is read. Weights may have
    been changed without the optimizer, and training continues from the masters, so a difference alone is not an error.

    Args:
        states: The model states.
        entries: The masters among these are compared.
        warnings: Where the warning is added.

    Raises:
        InconsistentCheckpointError: A weight has another shape.
    """

    samples: list[tuple[str, DType, DType]] = []
    extents: list[Extent] = []
    for name, entry in entries.items():
        tensor = states.module.get(name)
        if entry.role != "parameter" or not isinstance(tensor, TensorRef) or not entry.numel:
            continue
        if tensor.shape != entry.shape:
            raise InconsistentCheckpointError(
                f"{states.path}: parameter {safe_repr(name)} has shape {list(tensor.shape)} in the module and"
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
        if any(not same_number(cast(m, dtype), w) for m, w in zip(master, weight, strict=True)):
            differing.append(name)
    if differing:
        warnings.append(
            f"{len(differing)} of the parameters differ between {states.path.name} and the optimizer's masters, the"
            f" first {quote(differing[0])}: the files are from different saves, or the weights were changed without the"
            " optimizer. The masters were taken"
        )
    return differing
