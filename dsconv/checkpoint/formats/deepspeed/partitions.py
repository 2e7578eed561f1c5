"""One optimizer file a data-parallel rank: what each holds, and whether they are all from one save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.fields import Fields, Shapes
from dsconv.checkpoint.formats.deepspeed.flat import flat_pieces
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, Ties, read_module_states, states_of
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.renaming import OUTER, Unwrapped, unwrap
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.partition import group_padding_limit, share_numel
from dsconv.zero_utils.tag_folder import TagFolder

# From {name: elements} of parameters to the shapes of those whose shapes are known.
ShapesOf = Callable[[Mapping[str, int]], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: ``layout`` makes its pieces from flat tensors, the masters' or another state's.

    It takes [a tensor per rank] of group ``group`` at stages 1 and 2, [[a tensor per sub-group] per rank] at stage 3.
    """

    shape: tuple[int, ...]
    group: int
    layout: Callable[[Any], tuple[Piece, ...]]


@dataclass
class Partition:
    """One rank's optimizer file: the flat tensor of masters, mostly fp32, of each group or sub-group.

    ``counts`` are the ranks that each group is partitioned over, one number for all groups at stage 3.
    """

    file: TorchFile
    state: dict[str, Any]
    groups: list[TensorRef]
    counts: tuple[int, ...]
    is_zero3: bool

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    @property
    def fields(self) -> Fields:
        """The fields of the optimizer's state."""
        return Fields(self.path, self.state)

    @property
    def stage(self) -> int | None:
        """The ZeRO stage that the file names; None for BF16_Optimizer, which names none."""
        return self.fields.number("zero_stage")


def read_partition(path: Path) -> Partition:
    """Read one rank's optimizer file; raise MalformedError where it is not one."""
    file = TorchFile(path)
    root = Fields.of(path, file.root, "the mapping of an optimizer file")
    fields = Fields(path, root.required("optimizer_state_dict"))
    is_zero3 = "fp32_flat_groups" in fields.values
    key = "fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"
    if key not in fields.values:
        raise MalformedError(
            f"{path}: not a ZeRO optimizer file: it has neither fp32_flat_groups nor single_partition_of_fp32_groups"
        )
    groups = fields.listing(key)
    if not all(isinstance(group, TensorRef) and len(group.shape) == 1 for group in groups):
        raise MalformedError(f"{path}: {key} holds something else than flat tensors")
    counts = tuple(fields.counts("partition_count"))
    stage = fields.number("zero_stage")
    if stage is not None and (stage == 3) != is_zero3:
        raise MalformedError(f"{path}: says ZeRO stage {stage} and holds {key}")
    return Partition(file, dict(fields.values), groups, counts, is_zero3)


def read_partitions(
    folder: TagFolder,
    warnings: list[str],
    align: Callable[[Partition, Partition], Partition] | None = None,
    ranks: int = 1,
) -> list[Partition]:
    """Return each data-parallel rank's partition, in order of the ranks.

    Args:
        folder: The files of one model-parallel rank.
        warnings: A warning is added where files of an older, larger world are ignored.
        align: For a model with experts: puts a rank's groups in the order of rank 0's. Groups may then be partitioned
            over fewer ranks than there are.
        ranks: The number of ranks, if it is known to be larger than that of the files' partition counts.

    Raises:
        MissingShardError: A rank's file is missing.
        InconsistentCheckpointError: The files are not from one save.
    """
    paths = {dp: path for (_, dp), path in folder.optimizer.items()}
    lowest = paths[min(paths)]
    first = read_partition(lowest)
    world = max(*first.counts, ranks)
    missing = list(islice((dp for dp in range(world) if dp not in paths), 9))
    if missing:
        raise MissingShardError(
            f"{folder.path}: {lowest.name} says {counted(world, 'rank')}; missing the optimizer files of rank"
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
                f"{partition.path} and {first.path} are from different saves: partition counts"
                f" {list(partition.counts)[:4]} and {list(first.counts)[:4]}, groups {len(partition.groups)} and"
                f" {len(first.groups)}. A file was overwritten or left over from another run:"
                " restore the files of one save"
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
            f"ignored {counted(len(surplus), 'optimizer file')} of rank {surplus[0]} and above, {kind}: this"
            f" checkpoint has {counted(world, 'rank')}"
        )
    for dp, partition in enumerate(partitions):
        consistency.written_as(partition.file, dp)
    consistency.same_step([(p.file, p.state) for p in partitions])
    if align is None and any(count != world for count in first.counts):
        raise MissingShardError(
            f"{folder.path}: its groups have their own partition counts {list(first.counts)}, so the model has experts;"
            " their files (layer_0_expert_0_mp_rank_00_model_states.pt and so on) are missing. Copy them from the"
            " nodes that wrote them"
        )
    return partitions


def master_entry(name: str, dtype: DType, shape: tuple[int, ...], layout: Any, ties: Ties, role: str) -> TensorEntry:
    """Return the entry of a tensor that is not in ``module`` under its name, with the aliases that it has there."""
    return TensorEntry(name, dtype, shape, layout, tuple(ties.get(name, ())), role)


def alignment_paddings(first: Partition, g: int, group: Shapes) -> list[int]:
    """Return the elements to skip after each parameter of a group.

    They come from ``zero_optimization.parameter_alignment`` (DeepSpeed ``runtime/zero/stage_1_and_2.py``).
    """
    paddings = first.state.get("param_alignment_paddings")
    if paddings is None:
        return [0] * len(group)
    try:
        row = list(paddings[g])
    except (TypeError, LookupError):
        row = []
    if len(row) != len(group) or not all(type(p) is int and p >= 0 for p in row):
        raise MalformedError(f"{first.path}: param_alignment_paddings of group {g} does not list {len(group)} paddings")
    return row


def walk_group(folder: TagFolder, members: Sequence[Partition], g: int, group: Shapes) -> Iterator[tuple[str, Place]]:
    """Yield each parameter of group ``g`` of ZeRO-1 or 2 with its place, in the order of the flat data.

    Args:
        folder: The tag's folder, for messages.
        members: The partitions that hold the group end to end.
        g: The number of the group.
        group: The names and shapes of its parameters.

    Raises:
        InconsistentCheckpointError: The partitions are too short, too long or of other lengths than ZeRO cuts.
    """
    parts = [member.groups[g] for member in members]
    starts = [0, *accumulate(part.numel for part in parts)]
    files = [member.file for member in members]
    position = 0
    for (name, shape), padding in zip(group.items(), alignment_paddings(members[0], g, group), strict=True):
        numel = math.prod(shape)
        if position + numel > starts[-1]:
            raise InconsistentCheckpointError(
                f"{folder.path}: parameter {quote(name)} of group {g} ends at element {position + numel}; the optimizer"
                f" files of {counted(len(members), 'rank')}, from {members[0].path.name} on, hold {starts[-1]}"
                " together. A file is from another save, or of another model"
            )
        yield name, Place(shape, g, partial(flat_pieces, files, starts=starts, begin=position, numel=numel))
        position += numel + padding
    _check_group(folder, g, position, [part.numel for part in parts])


def _check_group(folder: TagFolder, g: int, wanted: int, lengths: list[int]) -> None:
    """Raise InconsistentCheckpointError unless the ranks hold a group of ``wanted`` elements as ZeRO partitions it.

    All padding is at the group's end: cut off, or (BF16_Optimizer, old releases) kept.
    """
    have = sum(lengths)
    if not wanted <= have < wanted + group_padding_limit(len(lengths)):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g} has {wanted} elements by its parameter shapes and {have} in the optimizer files"
            f" of {counted(len(lengths), 'rank')}. The files are not from one save, or not all of one model"
        )
    full = max(lengths)
    if any(length != full for length in lengths[: have // full if full else 0]):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g}: the ranks hold {lengths[:8]} elements; all but the last ones should hold"
            f" {full}. Two ranks' files were swapped, or one is from another save"
        )


def frozen_entry(
    name: str, shape: tuple[int, ...], all_states: list[ModuleStates], world: int, ties: Ties
) -> TensorEntry:
    """Return the entry of a frozen weight at stage 3, of which each rank's model states hold an equal share.

    Raises:
        MalformedError: A rank's model states lack it.
        InconsistentCheckpointError: A rank's share has another size.
    """
    numel = math.prod(shape)
    share = share_numel(numel, world)
    fragments: list[tuple[TorchFile, TensorRef]] = []
    for states in all_states:
        fragment = states.frozen_fragments.get(name)
        if not isinstance(fragment, TensorRef):
            raise MalformedError(f"{states.path}: frozen parameter {quote(name)} has no fragment")
        if numel and fragment.numel != share:
            raise InconsistentCheckpointError(
                f"{states.path}: frozen parameter {quote(name)} of shape {list(shape)} has a fragment of"
                f" {fragment.numel} elements; expected {share} on each of {counted(world, 'rank')}"
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


def read_zero3_states(folder: TagFolder, world: int, every: Callable[[ModuleStates], bool]) -> list[ModuleStates]:
    """Return the model states of ZeRO-3's ranks, which are proved to be from one save.

    Args:
        folder: The files of one model-parallel rank.
        world: The number of data-parallel ranks.
        every: Whether, by rank 0's, those of the other ranks hold anything that rank 0's do not; if not, only rank 0's
            are read.

    Raises:
        MissingShardError: A rank's file is missing.
        InconsistentCheckpointError: The files are not from one save.
    """
    models = {dp: path for (_, dp), path in folder.zero3.items()}
    missing = sorted(set(range(world)) - set(models))
    if missing:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 of {counted(world, 'rank')}; missing the model states of rank"
            f" {', '.join(map(str, missing[:8]))}: expected such as"
            f" zero_pp_rank_{missing[0]}_mp_rank_{folder.mp_ranks[0]:02d}_model_states.pt"
        )
    first = states_of(folder, models[0])
    found = [first, *(read_module_states(models[dp]) for dp in range(1, world if every(first) else 1))]
    for dp, states in enumerate(found):
        consistency.written_as(states.file, dp)
        consistency.same_save(first, states)
    return found


def unwrapped_mappings(states: ModuleStates, partitions: list[Partition]) -> list[Partition]:
    """Return the partitions with the names of ``param_slice_mappings`` freed of wrappers."""
    listed = [partition.fields.listing("param_slice_mappings") for partition in partitions]
    mappings = [mapping for of_rank in listed for mapping in of_rank if isinstance(mapping, dict)]
    names = unwrap((name for mapping in mappings for name in mapping if isinstance(name, str)), outer=False)
    removed = (*names.removed, *(part for part in states.unwrapped.removed if part == OUTER))
    if not removed:
        return partitions
    clean = Unwrapped(removed)
    return [
        replace(
            partition,
            state={
                **partition.state,
                "param_slice_mappings": [
                    {clean(str(name)): value for name, value in mapping.items()}
                    if isinstance(mapping, dict)
                    else mapping
                    for mapping in of_rank
                ],
            },
        )
        for partition, of_rank in zip(partitions, listed, strict=True)
    ]
