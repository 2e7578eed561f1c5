"""ZeRO-1, 2 and 3 checkpoints: fp32 masters from the optimizer files, the rest from the model states.

Facts read from DeepSpeed 0.19.8: ``runtime/engine.py`` (``_common_checkpoint_state``, ``_get_zero_param_shapes``: the
order of ``param_shapes`` is the only key into the flat data), ``runtime/zero/stage_1_and_2.py`` and
``runtime/bf16_optimizer.py`` (``state_dict``), ``runtime/zero/stage3.py`` (``_rigid_state_dict``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from dsconv.checkpoint.dtypes import DType
from dsconv.checkpoint.formats import crosscheck
from dsconv.checkpoint.formats.flat_layouts import EqualShares, RankFlats, flat_pieces
from dsconv.checkpoint.formats.module_states import ModuleStates, read_module_states, refuse_missing_experts, require
from dsconv.checkpoint.formats.rank_map import RankMap, of_one_rank
from dsconv.checkpoint.formats.zero_optimizer import Place
from dsconv.checkpoint.standins import FragmentAddress, TensorRef, shown
from dsconv.checkpoint.tensormap import Checkpoint, Piece, TensorEntry
from dsconv.checkpoint.torch_file import TorchFile
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
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
        raise MalformedError(f"{path}: not a ZeRO optimizer file: it has neither fp32_flat_groups nor single_partition_of_fp32_groups")
    if not all(isinstance(group, TensorRef) and len(group.shape) == 1 for group in groups):
        raise MalformedError(f"{path}: {key} holds something else than flat tensors")
    count = state.get("partition_count")
    counts = tuple(count) if isinstance(count, (list, tuple)) else (count,)
    if not counts or not all(type(c) is int and c > 0 for c in counts):
        raise MalformedError(f"{path}: partition_count is {shown(count)}; expected the number of ranks")
    stage = state.get("zero_stage")
    if stage is not None and (stage == 3) != is_zero3:
        raise MalformedError(f"{path}: says ZeRO stage {stage} and holds {key}")
    return Partition(file, state, list(groups), counts, is_zero3)


def read_zero(folder: TagFolder) -> Checkpoint:
    """The tensor map of a ZeRO checkpoint of one model-parallel rank whose optimizer files are there.

    Raises MissingShardError, MalformedError, InconsistentCheckpointError or UnsupportedError, each naming the file.
    """
    warnings = list(folder.warnings)
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        from dsconv.checkpoint.formats.autoep import read_zero3_experts

        return read_zero3_experts(folder, partitions, warnings)
    return of_one_rank(folder, _map_of(folder, partitions, warnings), warnings)


def read_rank(folder: TagFolder, warnings: list[str], shapes_of: ShapesOf | None = None) -> RankMap:
    """The map of a model-parallel rank from its files alone (``TagFolder.of_rank``); raises what ``read_zero`` does.

    ``shapes_of`` is for a checkpoint that keeps its weights elsewhere than in ``module``.
    """
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        raise UnsupportedError(f"{partitions[0].path}: AutoEP folded with model parallelism; this version does not merge that")
    return _map_of(folder, partitions, warnings, shapes_of)


def _map_of(folder: TagFolder, partitions: list[Partition], warnings: list[str], shapes_of: ShapesOf | None = None) -> RankMap:
    if partitions[0].is_zero3:
        return _read_zero3(folder, partitions)
    return _read_zero12(folder, partitions, warnings, shapes_of)


def read_partitions(
    folder: TagFolder, warnings: list[str], align: Callable[[Partition, Partition], Partition] | None = None, ranks: int = 1
) -> list[Partition]:
    """Each data-parallel rank's partition in order; what is missing, surplus or stale is told apart here.

    ``align`` is given for a model with experts: it puts a rank's groups in the order of rank 0's, and groups may then be
    partitioned over fewer than ``ranks``.
    """
    paths = {dp: path for (_, dp), path in folder.optimizer.items()}
    lowest = paths[min(paths)]
    first = read_partition(lowest)
    world = max(*first.counts, ranks)
    missing = list(islice((dp for dp in range(world) if dp not in paths), 9))
    if missing:
        raise MissingShardError(
            f"{folder.path}: {lowest.name} says {world} ranks; missing the optimizer files of rank "
            f"{', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}: expected such as "
            f"{lowest.name.replace(f'pp_rank_{min(paths)}_', f'pp_rank_{missing[0]}_')}. Copy them from the nodes that wrote them"
        )
    partitions = [first] + [read_partition(paths[dp]) for dp in range(min(paths) + 1, world)]
    if align is not None:
        partitions = [align(first, partition) for partition in partitions]
    for partition in partitions[1:]:
        if partition.counts != first.counts or partition.is_zero3 != first.is_zero3 or len(partition.groups) != len(first.groups):
            raise InconsistentCheckpointError(
                f"{partition.path} is of another save than {first.path}: partition counts {list(partition.counts)[:4]} and "
                f"{list(first.counts)[:4]}, groups {len(partition.groups)} and {len(first.groups)}. A file was overwritten or left "
                "over from another run: restore the files of one save"
            )
        for mine, theirs in zip(partition.groups, first.groups, strict=True):
            if mine.dtype != theirs.dtype:
                raise InconsistentCheckpointError(f"{partition.path} holds {mine.dtype} masters, {first.path} {theirs.dtype}")
    surplus = sorted(set(paths) - set(range(world)))
    if surplus:
        kind = "left over from an older save with more ranks"
        warnings.append(f"ignored {len(surplus)} optimizer files of rank {surplus[0]} and above, {kind}: this checkpoint has {world} ranks")
    for dp, partition in enumerate(partitions):
        crosscheck.written_as(partition.file, dp)
    crosscheck.same_step([(p.file, p.state) for p in partitions])
    if align is None and any(count != world for count in first.counts):
        raise MissingShardError(
            f"{folder.path}: groups with their own partition counts {list(first.counts)}, so of a model with experts; their files "
            "(layer_0_expert_0_mp_rank_00_model_states.pt and so on) are not there. Copy them from the nodes that wrote them"
        )
    return partitions


def _entry(name: str, dtype: DType, shape: tuple[int, ...], layout: Any, ties: dict[str, list[str]], role: str) -> TensorEntry:
    return TensorEntry(name, dtype, shape, layout, tuple(ties.get(name, ())), role)


def _shapes_from_mappings(partitions: list[Partition], shapes_of: ShapesOf) -> list[dict[str, tuple[int, ...]]]:
    """The parameters of each group, in order, of a stage-0 run with BF16_Optimizer.

    Such a run writes optimizer files and no ``param_shapes`` (0.19.8 ``runtime/engine.py`` ``_common_checkpoint_state``): names
    and order are in the ranks' ``param_slice_mappings``, shapes are those of the weights.
    """
    numels: list[dict[str, int]] = [{} for _ in partitions[0].groups]
    for partition in partitions:
        mappings = partition.state.get("param_slice_mappings")
        if not isinstance(mappings, list) or len(mappings) != len(numels):
            raise MalformedError(f"{partition.path}: no param_slice_mappings of {len(numels)} groups, and no param_shapes beside it")
        for group, mapping in zip(numels, mappings, strict=True):
            held = (
                [(f.start, name, f) for name, f in mapping.items() if isinstance(f, FragmentAddress)] if isinstance(mapping, dict) else []
            )
            for _, name, fragment in sorted(held, key=lambda item: item[:2]):
                group[name] = group.get(name, 0) + fragment.numel
    shapes = shapes_of({name: numel for group in numels for name, numel in group.items()})
    for group in numels:
        for name, numel in group.items():
            if math.prod(shapes.get(name, (0,))) != numel:
                raise MissingShardError(
                    f"{partitions[0].path}: holds parameter {name!r} of {numel} elements, and no file beside it has a weight like that"
                )
    return [{name: shapes[name] for name in group} for group in numels]


def _read_zero12(folder: TagFolder, partitions: list[Partition], warnings: list[str], shapes_of: ShapesOf | None = None) -> RankMap:
    if not folder.model:
        mp = folder.mp_ranks[0]
        raise MissingShardError(f"{folder.path}: no mp_rank_{mp:02d}_model_states.pt, which holds the names and shapes of the parameters")
    states = read_module_states(next(iter(folder.model.values())))
    crosscheck.own_name(states.file)
    refuse_missing_experts(states)
    world = len(partitions)
    first = partitions[0]
    in_stage0 = not states.param_shapes and any(group.numel for group in first.groups)
    if in_stage0:
        module = {name: tensor.shape for name, tensor in states.module.items() if isinstance(tensor, TensorRef)}
        states.param_shapes = _shapes_from_mappings(partitions, shapes_of or (lambda _: module))
    shapes = states.param_shapes
    if len(shapes) != len(first.groups):
        raise InconsistentCheckpointError(f"{states.path} lists {len(shapes)} parameter groups, {first.path} holds {len(first.groups)}")
    files = [p.file for p in partitions]
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Place] = {}
    ties = states.ties()
    for g, group in enumerate(shapes):
        parts = [p.groups[g] for p in partitions]
        starts = [0, *accumulate(part.numel for part in parts)]
        paddings = _alignment_paddings(first, g, group)
        position = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            numel = math.prod(shape)
            if position + numel > starts[-1]:
                raise InconsistentCheckpointError(
                    f"{folder.path}: parameter {name!r} of group {g} ends at element {position + numel}; the optimizer files "
                    f"of {world} ranks hold {starts[-1]} together. A file is of another save, or of another model"
                )
            places[name] = Place(shape, g, partial(flat_pieces, files, starts=starts, begin=position, numel=numel))
            layout = partial(flat_pieces, files, parts, starts, position, numel)
            entries[name] = _entry(name, parts[0].dtype, shape, layout, ties, "parameter")
            position += numel + padding
        _check_group(folder, g, position, [part.numel for part in parts])
    if first.state.get("param_slice_mappings") is not None:
        lengths = [[p.groups[g].numel for p in partitions] for g in range(len(shapes))]
        for partition_rank, partition in enumerate(partitions):
            crosscheck.slice_mappings(partition.path, partition.state, shapes, lengths, partition_rank)
    entries.update(states.module_entries(exclude=set(entries), ties=ties))
    crosscheck.masters_match_module(states, entries, warnings)
    stage = first.state.get("zero_stage")
    kind = f"ZeRO-{stage}" if stage else f"{'DeepSpeed stage 0' if in_stage0 else 'ZeRO-1'} (BF16_Optimizer)"
    return RankMap(states, entries, partitions, kind, 0 if in_stage0 else stage or 1, world, places=places)


def _alignment_paddings(first: Partition, g: int, group: dict[str, tuple[int, ...]]) -> list[int]:
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


def _check_group(folder: TagFolder, g: int, wanted: int, lengths: list[int]) -> None:
    """All padding is at the group's end: cut off, or (BF16_Optimizer, old releases) kept."""
    have = sum(lengths)
    if not wanted <= have < wanted + group_padding_limit(len(lengths)):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g} has {wanted} elements by its parameter shapes and {have} in the optimizer files of "
            f"{len(lengths)} ranks. The files are not of one save, or not all of one model"
        )
    full = max(lengths)
    if any(length != full for length in lengths[: have // full if full else 0]):
        raise InconsistentCheckpointError(
            f"{folder.path}: group {g}: the ranks hold {lengths[:8]} elements; all but the last ones should hold {full}. "
            "Two ranks' files were swapped, or one is of another save"
        )


def _read_zero3(folder: TagFolder, partitions: list[Partition]) -> RankMap:
    world = len(partitions)
    models = {dp: path for (_, dp), path in folder.zero3.items()}
    missing = sorted(set(range(world)) - set(models))
    if missing:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 of {world} ranks; missing the model states of rank {', '.join(map(str, missing[:8]))}: "
            f"expected such as zero_pp_rank_{missing[0]}_mp_rank_{folder.mp_ranks[0]:02d}_model_states.pt"
        )
    states = read_module_states(models[0])
    has_frozen = any(math.prod(shape) for shape in states.frozen_shapes.values())
    # Without frozen weights the other ranks' model states hold nothing that rank 0's does not.
    all_states = [states] + ([read_module_states(models[dp]) for dp in range(1, world)] if has_frozen else [])
    for dp, other in enumerate(all_states):
        crosscheck.written_as(other.file, dp)
        crosscheck.same_save(states, other)
    _refuse_offloaded(folder, partitions)
    ranks = RankFlats([p.file for p in partitions], [p.groups for p in partitions], alone=True)
    totals = ranks.totals
    if len(set(totals)) > 1:
        low = totals.index(min(totals))
        raise InconsistentCheckpointError(
            f"{partitions[low].path} holds {totals[low]} master elements, another rank's file {max(totals)}; ZeRO-3 ranks hold equal shares"
        )
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Place] = {}
    ties = states.ties()
    position = 0
    wanted_total = sum(share_numel(math.prod(shape), world) for group in states.param_shapes for shape in group.values())
    if wanted_total != totals[0]:
        raise InconsistentCheckpointError(
            f"{folder.path}: the parameter shapes of {states.path.name} need {wanted_total} elements of each of {world} ranks, "
            f"{partitions[0].path.name} holds {totals[0]}. The files are not of one save"
        )
    for group in states.param_shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            share = share_numel(numel, world)
            # One without elements at the very end lies in no sub-group; it has no pieces to look for.
            group_number = min(bisect_right(ranks.starts[0], position), len(ranks.starts[0]) - 1) - 1
            places[name] = Place(shape, group_number, partial(ranks.pieces_of, begin=position, share=share, numel=numel))
            entries[name] = _entry(name, ranks.dtype, shape, EqualShares(ranks, position, share, numel), ties, "parameter")
            position += share
    for name, shape in states.frozen_shapes.items():
        if name not in entries:
            entries[name] = frozen_entry(name, shape, all_states, world, ties)
    buffers = states.module_entries(exclude=set(entries), ties=ties, only=set(states.buffer_names))
    entries.update(buffers)
    return RankMap(states, entries, partitions, "ZeRO-3", 3, world, places=places)


def _refuse_offloaded(folder: TagFolder, partitions: list[Partition]) -> None:
    """A sub-group that was swapped to NVMe is an empty tensor here (0.19.8 ``stage3.py`` ``_create_fp32_partitions``).

    Its file is named by the ids that parameters had in the process, which the checkpoint does not record: which
    parameters a file holds would be a guess.
    """
    swapped = sorted((folder.path / "offloaded_tensors").glob("rank*/*.swp"))
    if swapped and any(group.numel == 0 for partition in partitions for group in partition.groups):
        raise UnsupportedError(
            f"{folder.path}: fp32 masters were offloaded to NVMe and lie in {swapped[0].parent.parent.name}/ "
            f"({len(swapped)} files, such as {swapped[0].name}), which dsconv does not merge: the checkpoint does not say which "
            "parameters are in which file. Resume the run with offload_optimizer to cpu and save once more, or take the 16-bit "
            "weights that stage3_gather_16bit_weights_on_model_save saves"
        )


def frozen_entry(name: str, shape: tuple[int, ...], all_states: list[ModuleStates], world: int, ties: dict[str, list[str]]) -> TensorEntry:
    numel = math.prod(shape)
    share = share_numel(numel, world)
    fragments: list[tuple[TorchFile, TensorRef]] = []
    for states in all_states:
        fragment = states.frozen_fragments.get(name)
        if not isinstance(fragment, TensorRef):
            raise MalformedError(f"{states.path}: frozen parameter {name!r} has no fragment")
        if numel and fragment.numel != share:
            raise InconsistentCheckpointError(
                f"{states.path}: frozen parameter {name!r} of shape {list(shape)} has a fragment of {fragment.numel} elements; "
                f"expected {share} on each of {world} ranks"
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

    return _entry(name, fragments[0][1].dtype, shape, layout, ties, "frozen")
