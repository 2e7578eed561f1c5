"""One optimizer file a data-parallel rank: what each holds, and whether they are all of one save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import (
    ModuleStates,
    require,
)
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError
from dsconv.zero_utils.files import TagFolder
from dsconv.zero_utils.partition import group_padding_limit, share_numel

# {name: elements} of parameters → their shapes, of those that are known.
ShapesOf = Callable[[Mapping[str, int]], Mapping[str, tuple[int, ...]]]


@dataclass
class Partition:
    """One rank's optimizer file: the fp32 (or other master) flat tensor of each group or sub-group."""

    file: TorchFile
    state: dict[str, Any]
    groups: list[TensorRef]
    counts: tuple[int, ...]
    is_zero3: bool

    @property
    def path(self) -> Path:
        return self.file.path


def read_partition(path: Path) -> Partition:
    """Raises MalformedError where the file is not an optimizer partition."""
    file = TorchFile(path)
    state = require(file.root, "optimizer_state_dict", dict, path)
    is_zero3 = "fp32_flat_groups" in state
    key = "fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"
    groups = state.get(key)
    if not isinstance(groups, (list, tuple)):
        raise MalformedError(
            f"{path}: not a ZeRO optimizer file: it has neither fp32_flat_groups nor single_partition_of_fp32_groups"
        )
    if not all(isinstance(group, TensorRef) and len(group.shape) == 1 for group in groups):
        raise MalformedError(f"{path}: {key} holds something else than flat tensors")
    count = state.get("partition_count")
    counts = tuple(count) if isinstance(count, (list, tuple)) else (count,)
    if not counts or not all(type(c) is int and c > 0 for c in counts):
        raise MalformedError(f"{path}: partition_count is {safe_repr(count)}; expected the number of ranks")
    stage = state.get("zero_stage")
    if stage is not None and (stage == 3) != is_zero3:
        raise MalformedError(f"{path}: says ZeRO stage {stage} and holds {key}")
    return Partition(file, state, list(groups), counts, is_zero3)


def read_partitions(
    folder: TagFolder,
    warnings: list[str],
    align: Callable[[Partition, Partition], Partition] | None = None,
    ranks: int = 1,
) -> list[Partition]:
    """Each data-parallel rank's partition in order; what is missing, surplus or stale is told apart here.

    ``align`` is given for a model with experts: it puts a rank's groups in the order of rank 0's, and groups may then
    be partitioned over fewer than ``ranks``.
    """
    paths = {dp: path for (_, dp), path in folder.optimizer.items()}
    lowest = paths[min(paths)]
    first = read_partition(lowest)
    world = max(*first.counts, ranks)
    missing = list(islice((dp for dp in range(world) if dp not in paths), 9))
    if missing:
        raise MissingShardError(
            f"{folder.path}: {lowest.name} says {world} ranks; missing the optimizer files of rank"
            f" {', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}: expected such as"
            f" {lowest.name.replace(f'pp_rank_{min(paths)}_', f'pp_rank_{missing[0]}_')}. Copy them from the nodes that"
            " wrote them"
        )
    partitions = [first] + [read_partition(paths[dp]) for dp in range(min(paths) + 1, world)]
    if align is not None:
        partitions = [align(first, partition) for partition in partitions]
    for partition in partitions[1:]:
        if (
            partition.counts != first.counts
            or partition.is_zero3 != first.is_zero3
            or len(partition.groups) != len(first.groups)
        ):
            raise InconsistentCheckpointError(
                f"{partition.path} is of another save than {first.path}: partition counts {list(partition.counts)[:4]}"
                f" and {list(first.counts)[:4]}, groups {len(partition.groups)} and {len(first.groups)}. A file was"
                " overwritten or left over from another run: restore the files of one save"
            )
        for mine, theirs in zip(partition.groups, first.groups, strict=True):
            if mine.dtype != theirs.dtype:
                raise InconsistentCheckpointError(
                    f"{partition.path} holds {mine.dtype} masters, {first.path} {theirs.dtype}"
                )
    surplus = sorted(set(paths) - set(range(world)))
    if surplus:
        kind = "left over from an older save with more ranks"
        warnings.append(
            f"ignored {len(surplus)} optimizer files of rank {surplus[0]} and above, {kind}: this checkpoint has"
            f" {world} ranks"
        )
    for dp, partition in enumerate(partitions):
        consistency.written_as(partition.file, dp)
    consistency.same_step([(p.file, p.state) for p in partitions])
    if align is None and any(count != world for count in first.counts):
        raise MissingShardError(
            f"{folder.path}: groups with their own partition counts {list(first.counts)}, so of a model with experts;"
            " their files (layer_0_expert_0_mp_rank_00_model_states.pt and so on) are not there. Copy them from the"
            " nodes that wrote them"
        )
    return partitions


def master_entry(
    name: str, dtype: DType, shape: tuple[int, ...], layout: Any, ties: dict[str, list[str]], role: str
) -> TensorEntry:
    return TensorEntry(name, dtype, shape, layout, tuple(ties.get(name, ())), role)


def alignment_paddings(first: Partition, g: int, group: dict[str, tuple[int, ...]]) -> list[int]:
    """Elements to skip after each parameter (``zero_optimization.parameter_alignment``, DeepSpeed 0.19.8)."""
    paddings = first.state.get("param_alignment_paddings")
    if paddings is None:
        return [0] * len(group)
    try:
        row = list(paddings[g])
    except (TypeError, IndexError):
        row = []
    if len(row) != len(group) or not all(type(p) is int and p >= 0 for p in row):
        raise MalformedError(f"{first.path}: param_alignment_paddings of group {g} does not list {len(group)} paddings")
    return row


def check_group(folder: TagFolder, g: int, wanted: int, lengths: list[int]) -> None:
    """All padding is at the group's end: cut off, or (BF16_Optimizer, old releases) kept."""
    have = sum(lengths)
    if not wanted <= have < wanted + group_padding_limit(len(lengths)):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g} has {wanted} elements by its parameter shapes and {have} in the optimizer files"
            f" of {len(lengths)} ranks. The files are not of one save, or not all of one model"
        )
    full = max(lengths)
    if any(length != full for length in lengths[: have // full if full else 0]):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g}: the ranks hold {lengths[:8]} elements; all but the last ones should hold"
            f" {full}. Two ranks' files were swapped, or one is of another save"
        )


def frozen_entry(
    name: str, shape: tuple[int, ...], all_states: list[ModuleStates], world: int, ties: dict[str, list[str]]
) -> TensorEntry:
    numel = math.prod(shape)
    share = share_numel(numel, world)
    fragments: list[tuple[TorchFile, TensorRef]] = []
    for states in all_states:
        fragment = states.frozen_fragments.get(name)
        if not isinstance(fragment, TensorRef):
            raise MalformedError(f"{states.path}: frozen parameter {name!r} has no fragment")
        if numel and fragment.numel != share:
            raise InconsistentCheckpointError(
                f"{states.path}: frozen parameter {name!r} of shape {list(shape)} has a fragment of {fragment.numel}"
                f" elements; expected {share} on each of {world} ranks"
            )
        fragments.append((states.file, fragment))

    def layout() -> tuple[Piece, ...]:
        pieces = []
        for rank, (file, fragment) in enumerate(fragments):
            wanted = min(share, numel - rank * share)
            if wanted <= 0:
                break
            pieces.append(Piece(file.extent(fragment, 0, wanted), rank * share, wanted))
        return tuple(pieces)

    return master_entry(name, fragments[0][1].dtype, shape, layout, ties, "frozen")


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: ``layout`` makes its pieces from flat tensors, those of the masters or of another state.

    It takes [a tensor a rank] of group ``group`` at stages 1 and 2, [[a tensor a sub-group] a rank] at stage 3.
    """

    shape: tuple[int, ...]
    group: int
    layout: Callable[[Any], tuple[Piece, ...]]
