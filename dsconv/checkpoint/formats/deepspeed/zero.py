"""ZeRO-1, 2 and 3 checkpoints: fp32 masters from the optimizer files, the rest from the model states.

Facts read from DeepSpeed 0.19.8: ``runtime/engine.py`` (``_common_checkpoint_state``, ``_get_zero_param_shapes``: the
order of ``param_shapes`` is the only key into the flat data), ``runtime/zero/stage_1_and_2.py`` and
``runtime/bf16_optimizer.py`` (``state_dict``), ``runtime/zero/stage3.py`` (``_rigid_state_dict``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial
from itertools import accumulate

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.flat import EqualShares, RankFlats, flat_pieces
from dsconv.checkpoint.formats.deepspeed.model_states import (
    read_module_states,
    refuse_missing_experts,
)
from dsconv.checkpoint.formats.deepspeed.partitions import (
    Partition,
    Place,
    ShapesOf,
    alignment_paddings,
    check_group,
    frozen_entry,
    master_entry,
    read_partitions,
)
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import FragmentAddress, TensorRef
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from dsconv.zero_utils.files import TagFolder
from dsconv.zero_utils.partition import share_numel


def read_rank(folder: TagFolder, warnings: list[str], shapes_of: ShapesOf | None = None) -> RankMap:
    """The map of a model-parallel rank from its files alone (``TagFolder.of_rank``); raises what ``read_zero`` does.

    ``shapes_of`` is for a checkpoint that keeps its weights elsewhere than in ``module``.
    """
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        raise UnsupportedError(
            f"{partitions[0].path}: AutoEP folded with model parallelism; this version does not merge that"
        )
    return _map_of(folder, partitions, warnings, shapes_of)


def _map_of(
    folder: TagFolder, partitions: list[Partition], warnings: list[str], shapes_of: ShapesOf | None = None
) -> RankMap:
    if partitions[0].is_zero3:
        return _read_zero3(folder, partitions)
    return _read_zero12(folder, partitions, warnings, shapes_of)


def _shapes_from_mappings(partitions: list[Partition], shapes_of: ShapesOf) -> list[dict[str, tuple[int, ...]]]:
    """The parameters of each group, in order, of a stage-0 run with BF16_Optimizer.

    Such a run writes optimizer files and no ``param_shapes`` (0.19.8 ``runtime/engine.py``
    ``_common_checkpoint_state``): names and order are in the ranks' ``param_slice_mappings``, shapes are those of the
    weights.
    """
    numels: list[dict[str, int]] = [{} for _ in partitions[0].groups]
    for partition in partitions:
        mappings = partition.state.get("param_slice_mappings")
        if not isinstance(mappings, list) or len(mappings) != len(numels):
            raise MalformedError(
                f"{partition.path}: no param_slice_mappings of {len(numels)} groups, and no param_shapes beside it"
            )
        for group, mapping in zip(numels, mappings, strict=True):
            held = (
                [(f.start, name, f) for name, f in mapping.items() if isinstance(f, FragmentAddress)]
                if isinstance(mapping, dict)
                else []
            )
            for _, name, fragment in sorted(held, key=lambda item: item[:2]):
                group[name] = group.get(name, 0) + fragment.numel
    shapes = shapes_of({name: numel for group in numels for name, numel in group.items()})
    for group in numels:
        for name, numel in group.items():
            if math.prod(shapes.get(name, (0,))) != numel:
                raise MissingShardError(
                    f"{partitions[0].path}: holds parameter {name!r} of {numel} elements, and no file beside it has a"
                    " weight like that"
                )
    return [{name: shapes[name] for name in group} for group in numels]


def _read_zero12(
    folder: TagFolder, partitions: list[Partition], warnings: list[str], shapes_of: ShapesOf | None = None
) -> RankMap:
    if not folder.model:
        mp = folder.mp_ranks[0]
        raise MissingShardError(
            f"{folder.path}: no mp_rank_{mp:02d}_model_states.pt, which holds the names and shapes of the parameters"
        )
    states = read_module_states(next(iter(folder.model.values())))
    consistency.own_name(states.file)
    refuse_missing_experts(states)
    world = len(partitions)
    first = partitions[0]
    in_stage0 = not states.param_shapes and any(group.numel for group in first.groups)
    if in_stage0:
        module = {name: tensor.shape for name, tensor in states.module.items() if isinstance(tensor, TensorRef)}
        states.param_shapes = _shapes_from_mappings(partitions, shapes_of or (lambda _: module))
    shapes = states.param_shapes
    if len(shapes) != len(first.groups):
        raise InconsistentCheckpointError(
            f"{states.path} lists {len(shapes)} parameter groups, {first.path} holds {len(first.groups)}"
        )
    files = [p.file for p in partitions]
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Place] = {}
    ties = states.ties()
    for g, group in enumerate(shapes):
        parts = [p.groups[g] for p in partitions]
        starts = [0, *accumulate(part.numel for part in parts)]
        paddings = alignment_paddings(first, g, group)
        position = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            numel = math.prod(shape)
            if position + numel > starts[-1]:
                raise InconsistentCheckpointError(
                    f"{folder.path}: parameter {name!r} of group {g} ends at element {position + numel}; the optimizer"
                    f" files of {world} ranks hold {starts[-1]} together. A file is of another save, or of another"
                    " model"
                )
            places[name] = Place(shape, g, partial(flat_pieces, files, starts=starts, begin=position, numel=numel))
            layout = partial(flat_pieces, files, parts, starts, position, numel)
            entries[name] = master_entry(name, parts[0].dtype, shape, layout, ties, "parameter")
            position += numel + padding
        check_group(folder, g, position, [part.numel for part in parts])
    if first.state.get("param_slice_mappings") is not None:
        lengths = [[p.groups[g].numel for p in partitions] for g in range(len(shapes))]
        for partition_rank, partition in enumerate(partitions):
            consistency.slice_mappings(partition.path, partition.state, shapes, lengths, partition_rank)
    entries.update(states.module_entries(exclude=set(entries), ties=ties))
    consistency.masters_match_module(states, entries, warnings)
    stage = first.state.get("zero_stage")
    kind = f"ZeRO-{stage}" if stage else f"{'DeepSpeed stage 0' if in_stage0 else 'ZeRO-1'} (BF16_Optimizer)"
    return RankMap(states, entries, partitions, kind, 0 if in_stage0 else stage or 1, world, places=places)


def _read_zero3(folder: TagFolder, partitions: list[Partition]) -> RankMap:
    world = len(partitions)
    models = {dp: path for (_, dp), path in folder.zero3.items()}
    missing = sorted(set(range(world)) - set(models))
    if missing:
        raise MissingShardError(
            f"{folder.path}: ZeRO-3 of {world} ranks; missing the model states of rank"
            f" {', '.join(map(str, missing[:8]))}: expected such as"
            f" zero_pp_rank_{missing[0]}_mp_rank_{folder.mp_ranks[0]:02d}_model_states.pt"
        )
    states = read_module_states(models[0])
    has_frozen = any(math.prod(shape) for shape in states.frozen_shapes.values())
    # Without frozen weights the other ranks' model states hold nothing that rank 0's does not.
    all_states = [states] + ([read_module_states(models[dp]) for dp in range(1, world)] if has_frozen else [])
    for dp, other in enumerate(all_states):
        consistency.written_as(other.file, dp)
        consistency.same_save(states, other)
    _refuse_offloaded(folder, partitions)
    ranks = RankFlats([p.file for p in partitions], [p.groups for p in partitions], alone=True)
    totals = ranks.totals
    if len(set(totals)) > 1:
        low = totals.index(min(totals))
        raise InconsistentCheckpointError(
            f"{partitions[low].path} holds {totals[low]} master elements, another rank's file {max(totals)}; ZeRO-3"
            " ranks hold equal shares"
        )
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Place] = {}
    ties = states.ties()
    position = 0
    wanted_total = sum(
        share_numel(math.prod(shape), world) for group in states.param_shapes for shape in group.values()
    )
    if wanted_total != totals[0]:
        raise InconsistentCheckpointError(
            f"{folder.path}: the parameter shapes of {states.path.name} need {wanted_total} elements of each of {world}"
            f" ranks, {partitions[0].path.name} holds {totals[0]}. The files are not of one save"
        )
    for group in states.param_shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            share = share_numel(numel, world)
            # One without elements at the very end lies in no sub-group; it has no pieces to look for.
            group_number = min(bisect_right(ranks.starts[0], position), len(ranks.starts[0]) - 1) - 1
            places[name] = Place(
                shape, group_number, partial(ranks.pieces_of, begin=position, share=share, numel=numel)
            )
            entries[name] = master_entry(
                name, ranks.dtype, shape, EqualShares(ranks, position, share, numel), ties, "parameter"
            )
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
            f"{folder.path}: fp32 masters were offloaded to NVMe and lie in {swapped[0].parent.parent.name}/"
            f" ({len(swapped)} files, such as {swapped[0].name}), which dsconv does not merge: the checkpoint does not"
            " say which parameters are in which file. Resume the run with offload_optimizer to cpu and save once more,"
            " or take the 16-bit weights that stage3_gather_16bit_weights_on_model_save saves"
        )
