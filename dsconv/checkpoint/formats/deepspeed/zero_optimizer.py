"""The optimizer states of a ZeRO checkpoint: flat tensors beside the masters, with the masters' own layout.

Read from DeepSpeed: ``runtime/zero/stage_1_and_2.py`` and ``runtime/bf16_optimizer.py`` (``state_dict``: one
flat tensor a group, whose states are the base optimizer's own ``state_dict`` and keep the padding that the masters may
lack; with ``elastic_checkpoint`` a list of states without padding and without hyperparameters),
``runtime/zero/stage3.py`` (``_rigid_state_dict``: one flat tensor per sub-group, numbered in the order of the parameter
groups).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.formats.deepspeed.fields import Fields
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.settings import STEP, counters, members_of, optimizer_config
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.formats.deepspeed.values import decode
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import SmallTensor, Training, whole_rows
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import is_contiguous
from dsconv.checkpoint.torchfile.plain import plain
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import count
from dsconv.zero_utils.partition import group_padding_limit
from dsconv.zero_utils.tag_folder import TagFolder

if TYPE_CHECKING:
    from dsconv.checkpoint.formats.deepspeed.partitions import Partition, Place

# What is not a setting: the states themselves, and where they lie.
SHARDED = frozenset(
    {
        "base_optimizer_state",
        "optimizer_state_dict",
        "single_partition_of_fp32_groups",
        "fp32_flat_groups",
        "param_slice_mappings",
        "ds_zero_partition_groups",
    }
)


def read_training(folder: TagFolder, rank: RankMap) -> Training:
    """Return the optimizer of one model-parallel rank.

    Args:
        folder: The files of the rank.
        rank: Its map.

    Raises:
        MalformedError: An optimizer file does not hold what it should.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: The optimizer keeps states that are not one value per weight.
    """
    states, partitions, stage, places = rank.states, rank.partitions, rank.stage, rank.places
    first = partitions[0]
    rows = [_rows(partition) for partition in partitions]
    groups = range(len(first.groups))
    flats = [_flat_states(partitions, [of_rank[g] for of_rank in rows], g) for g in groups]
    steps = [_step(partitions, [of_rank[g] for of_rank in rows], g) for g in groups]
    warnings: list[str] = []
    entries: dict[str, dict[str, TensorEntry]] = {}
    for name in sorted({name for flat in flats for name in flat}):
        # The masters stand in for the state of sub-groups that lack it; no parameter that has the state reaches them.
        by_rank = [
            [flats[g][name][dp] if name in flats[g] else p.groups[g] for g in groups] for dp, p in enumerate(partitions)
        ]
        for parameter, place in places.items():
            if name not in flats[place.group]:
                continue
            parts = by_rank if first.is_zero3 else flats[place.group][name]
            dtype = flats[place.group][name][0].dtype
            entry = TensorEntry(f"{parameter}/{name}", dtype, place.shape, partial(place.layout, parts))
            entries.setdefault(parameter, {})[name] = entry
    others = {name for of_rank in rows for row in of_rank for name in row if name != STEP} - {
        name for flat in flats for name in flat
    }
    if others:
        warnings.append(
            f"the optimizer's {', '.join(sorted(map(safe_repr, others)))} is not of one value a weight: left out"
        )
    groups_found = _param_groups(first)
    if not groups_found:
        groups_found = [{} for _ in groups]
        warnings.append(
            f"{first.path.name} was saved with elastic_checkpoint, which keeps no hyperparameters: those of the new"
            " run's config are used"
        )
    version = first.state.get("ds_version", first.file.root.get("ds_version"))
    settings = {
        k: plain(v, first.file, f"optimizer_state_dict[{safe_repr(k)}]")
        for k, v in first.state.items()
        if k not in SHARDED
    }
    info = states.universal_info
    return Training(
        stage=stage,
        states={parameter: entries.get(parameter, {}) for parameter in places},
        steps={parameter: steps[place.group] for parameter, place in places.items() if steps[place.group] is not None},
        param_groups=groups_found,
        settings=settings,
        module={} if stage == 3 else states.module_entries(exclude=set(places), ties={}),
        model_files=tuple(path for _, path in sorted((folder.zero3 if stage == 3 else folder.model).items()))[
            : len(partitions)
        ],
        counters=partial(counters, states),
        cut=UniversalInfo(info, states.path, states.stored).cut if info else whole_rows,
        deepspeed_version=version if isinstance(version, str) else None,
        members=_members(first, places),
        optimizer=optimizer_config(states),
        left_out=tuple(sorted(others)),
        stored=states.stored,
        warnings=tuple(warnings),
    )


def _base(partition: Partition) -> Any:
    """Return the state of the base optimizer, which ZeRO wraps."""
    return partition.state.get("optimizer_state_dict" if partition.is_zero3 else "base_optimizer_state")


def _rows(partition: Partition) -> list[dict[str, Any]]:
    """Return the states of each group or sub-group of one rank; an empty row where the optimizer has none yet."""
    base = _base(partition)
    if isinstance(base, dict) and isinstance(base.get("state"), dict) and isinstance(base.get("param_groups"), list):
        listed = [Fields.of(partition.path, group, "a mapping in param_groups") for group in base["param_groups"]]
        numbers = [number for group in listed for number in group.listing("params")]
        rows = [base["state"].get(n, {}) if type(n) is int else None for n in numbers]
    elif isinstance(base, list):
        rows = list(base)
    else:
        raise MalformedError(
            f"{partition.path}: holds no state of the base optimizer; expected 'state' and 'param_groups'"
        )
    if len(rows) != len(partition.groups) or not all(isinstance(row, dict) for row in rows):
        raise MalformedError(
            f"{partition.path}: the optimizer lists {count(len(rows), 'state')} for"
            f" {count(len(partition.groups), 'group')} of masters"
        )
    return [
        {k: v for k, v in row.items() if isinstance(k, str) and v is not None} for row in rows if isinstance(row, dict)
    ]


def _flat_states(partitions: list[Partition], rows: list[dict[str, Any]], g: int) -> dict[str, list[TensorRef]]:
    """Return {state: its flat tensor on each rank} of group or sub-group ``g``.

    A rank without elements may lack the state.
    """
    masters = [p.groups[g] for p in partitions]
    longest = max(m.numel for m in masters) + group_padding_limit(len(partitions))
    found: dict[str, list[TensorRef]] = {}
    for name in {n: None for row in rows for n, v in row.items() if n != STEP and isinstance(v, TensorRef) and v.shape}:
        parts = []
        for partition, row, master in zip(partitions, rows, masters, strict=True):
            value = row.get(name)
            if value is None and master.numel == 0:
                value = master
            where = f"{partition.path}: the optimizer's state {safe_repr(name)} of group {g}"
            if not isinstance(value, TensorRef):
                raise InconsistentCheckpointError(
                    f"{where} is missing here and present on another rank: the files are not from one save"
                )
            if (
                len(value.shape) != 1
                or not master.numel <= value.numel < longest
                or not is_contiguous(value.shape, value.strides)
            ):
                raise UnsupportedError(
                    f"{where} has shape {list(value.shape)} for {master.numel} weights: that is not one value per"
                    " weight. An optimizer may compress its state so; a universal checkpoint cannot hold it"
                )
            parts.append(value)
        if len({part.dtype for part, master in zip(parts, masters, strict=True) if master.numel}) > 1:
            raise InconsistentCheckpointError(
                f"{partitions[0].path}: the optimizer's state {safe_repr(name)} has another dtype on other ranks"
            )
        parts_with_data = [p for p, m in zip(parts, masters, strict=True) if m.numel]
        if parts_with_data:
            fill = parts_with_data[0]
            found[name] = [part if master.numel else fill for part, master in zip(parts, masters, strict=True)]
    return found


def _step(partitions: list[Partition], rows: list[dict[str, Any]], g: int) -> Any:
    """Return the step counter of a group, on which all ranks must agree, or None if there is none."""
    found: dict[float, Any] = {}
    for partition, row in zip(partitions, rows, strict=True):
        if row.get(STEP) is None or partition.groups[g].numel == 0:
            continue
        value = plain(row[STEP], partition.file, f"the step of group {g}")
        numbers = decode(value.data, value.dtype) if isinstance(value, SmallTensor) else [value]
        if not numbers or len(numbers) != 1 or not isinstance(numbers[0], (int, float)):
            raise MalformedError(
                f"{partition.path}: the optimizer's step of group {g} is {safe_repr(row[STEP])}; expected a number"
            )
        found.setdefault(float(numbers[0]), value)
    if len(found) > 1:
        raise InconsistentCheckpointError(
            f"{partitions[0].path.parent}: group {g} is at the optimizer steps {sorted(found)} on different ranks: "
            "files from two saves lie in one folder"
        )
    return next(iter(found.values()), None)


def _param_groups(partition: Partition) -> list[dict[str, Any]]:
    """Return the groups of hyperparameters; none with elastic_checkpoint."""
    base = _base(partition)
    groups = base["param_groups"] if isinstance(base, dict) else []
    return [plain(group, partition.file, "param_groups") for group in groups]


def _members(partition: Partition, places: Mapping[str, Place]) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each group of hyperparameters, which at stage 3 is of several sub-groups."""
    base = _base(partition)
    sizes = [len(group["params"]) for group in base["param_groups"]] if isinstance(base, dict) else [1] * len(base)
    return members_of(sizes, ((name, place.group) for name, place in places.items()))
