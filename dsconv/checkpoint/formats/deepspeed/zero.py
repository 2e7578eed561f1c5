"""ZeRO-1, 2 and 3 checkpoints: fp32 masters from the optimizer files, the rest from the model states.

Facts read from DeepSpeed: ``runtime/engine.py`` (``_common_checkpoint_state``, ``_get_zero_param_shapes``: the
order of ``param_shapes`` is the only key into the flat data), ``runtime/zero/stage_1_and_2.py`` and
``runtime/bf16_optimizer.py`` (``state_dict``), ``runtime/zero/stage3.py`` (``_rigid_state_dict``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.fields import Shapes
from dsconv.checkpoint.formats.deepspeed.flat import EqualShares, RankFlats
from dsconv.checkpoint.formats.deepspeed.model_states import (
    ModuleStates,
    refuse_missing_experts,
    states_of,
    warn_of_absent,
    warn_of_unlisted,
)
from dsconv.checkpoint.formats.deepspeed.partitions import (
    Partition,
    Place,
    ShapesOf,
    frozen_entry,
    master_entry,
    read_partitions,
    read_zero3_states,
    unwrapped_mappings,
    walk_group,
)
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import FragmentAddress, TensorRef
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from dsconv.text import count, quote
from dsconv.zero_utils.partition import share_numel
from dsconv.zero_utils.tag_folder import TagFolder


def read_rank(folder: TagFolder, warnings: list[str], shapes_of: ShapesOf | None = None) -> RankMap:
    """Return the map of a model-parallel rank with optimizer files.

    Args:
        folder: The files of the rank (``TagFolder.of_rank``).
        warnings: What was found is added.
        shapes_of: Gives the shapes of parameters of a checkpoint that keeps its weights elsewhere than in ``module``.

    Raises:
        MissingShardError: A file is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: The checkpoint has a feature that dsconv does not read.
    """
    partitions = read_partitions(folder, warnings)
    if "ds_zero_partition_groups" in partitions[0].state:
        raise UnsupportedError(
            f"{partitions[0].path}: AutoEP folded with model parallelism; this version does not merge that"
        )
    return map_of(folder, partitions, warnings, shapes_of)


def map_of(
    folder: TagFolder, partitions: list[Partition], warnings: list[str], shapes_of: ShapesOf | None = None
) -> RankMap:
    """Return the map of a rank whose partitions have been read; the rest is as in ``read_rank``."""
    if partitions[0].is_zero3:
        return _read_zero3(folder, partitions, warnings)
    return _read_zero12(folder, partitions, warnings, shapes_of)


def _shapes_from_mappings(partitions: list[Partition], shapes_of: ShapesOf) -> list[Shapes]:
    """Return the parameters of each group, in order, of a stage-0 run with BF16_Optimizer.

    Such a run writes optimizer files and no ``param_shapes`` (DeepSpeed ``runtime/engine.py``
    ``_common_checkpoint_state``): names and order are in the ranks' ``param_slice_mappings``, shapes are those of the
    weights.
    """
    numels: list[dict[str, int]] = [{} for _ in partitions[0].groups]
    for partition in partitions:
        mappings = partition.state.get("param_slice_mappings")
        if not isinstance(mappings, list) or len(mappings) != len(numels):
            raise MalformedError(
                f"{partition.path}: no param_slice_mappings of {count(len(numels), 'group')}, and no param_shapes"
                " beside it"
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
                    f"{partitions[0].path}: holds parameter {quote(name)} of {numel} elements, and no file beside it"
                    " has a weight like that"
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
    states = states_of(folder, next(iter(folder.model.values())))
    consistency.own_name(states.file)
    refuse_missing_experts(states)
    partitions = unwrapped_mappings(states, partitions)
    first = partitions[0]
    in_stage0 = not states.param_shapes and any(group.numel for group in first.groups)
    if in_stage0:
        module = {name: tensor.shape for name, tensor in states.module.items() if isinstance(tensor, TensorRef)}
        states.param_shapes = _shapes_from_mappings(partitions, shapes_of or (lambda _: module))
    shapes = states.param_shapes
    if len(shapes) != len(first.groups):
        raise InconsistentCheckpointError(
            f"{states.path} lists {count(len(shapes), 'parameter group')}, {first.path} holds {len(first.groups)}"
        )
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Place] = {}
    ties = states.ties()
    for g, group in enumerate(shapes):
        parts = [p.groups[g] for p in partitions]
        for name, place in walk_group(folder, partitions, g, group):
            places[name] = place
            entries[name] = master_entry(
                name, parts[0].dtype, place.shape, partial(place.layout, parts), ties, "parameter"
            )
    if first.state.get("param_slice_mappings") is not None:
        lengths = [[p.groups[g].numel for p in partitions] for g in range(len(shapes))]
        for partition_rank, partition in enumerate(partitions):
            consistency.slice_mappings(partition.path, partition.state, shapes, lengths, partition_rank)
    entries.update(states.module_entries(exclude=set(entries), ties=ties))
    differing = consistency.masters_match_module(states, entries, warnings)
    if differing and folder.chosen:
        raise InconsistentCheckpointError(
            f"{folder.path}: holds optimizer files from two runs ({' and '.join(folder.kinds)}), and those that"
            f" {states.path.name} names by its configuration do not hold its weights, such as {quote(differing[0])}."
            " Restore the files of one save"
        )
    warn_of_unlisted(states, warnings)
    warn_of_absent(states, entries, warnings)
    stage = first.stage
    kind = f"ZeRO-{stage}" if stage else f"{'DeepSpeed stage 0' if in_stage0 else 'ZeRO-1'} (BF16_Optimizer)"
    return RankMap(states, entries, partitions, kind, 0 if in_stage0 else stage or 1, len(partitions), places=places)


def _read_zero3(folder: TagFolder, partitions: list[Partition], warnings: list[str]) -> RankMap:
    world = len(partitions)
    all_states = read_zero3_states(folder, world, _has_frozen)
    states = all_states[0]
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
            f"{folder.path}: the parameter shapes of {states.path.name} need {wanted_total} elements of each of"
            f" {count(world, 'rank')}, {partitions[0].path.name} holds {totals[0]}. The files are not from one save"
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
    entries.update(states.module_entries(exclude=set(entries), ties=ties, only=set(states.buffer_names)))
    if 0 in folder.mp_ranks:  # the others' model states do not say which weights are tied
        warn_of_absent(states, entries, warnings)
    return RankMap(states, entries, partitions, "ZeRO-3", 3, world, places=places)


def _has_frozen(states: ModuleStates) -> bool:
    """Return whether each rank's model states hold a share of frozen weights."""
    return any(math.prod(shape) for shape in states.frozen_shapes.values())


def _refuse_offloaded(folder: TagFolder, partitions: list[Partition]) -> None:
    """Raise UnsupportedError if masters were swapped to NVMe.

    Such a sub-group is an empty tensor here (DeepSpeed ``stage3.py`` ``_create_fp32_partitions``). Its file is named by
    the ids that parameters had in the process, which the checkpoint does not record: which parameters a file holds
    would be a guess.
    """
    swapped = sorted((folder.path / "offloaded_tensors").glob("rank*/*.swp"))
    if swapped and any(group.numel == 0 for partition in partitions for group in partition.groups):
        raise UnsupportedError(
            f"{folder.path}: fp32 masters were offloaded to NVMe and lie in {swapped[0].parent.parent.name}/"
            f" ({count(len(swapped), 'file')}, such as {swapped[0].name}), which dsconv does not merge: the checkpoint"
            " does not say which parameters are in which file. Resume the run with offload_optimizer to cpu and save"
            " again, or take the 16-bit weights that stage3_gather_16bit_weights_on_model_save saves"
        )
