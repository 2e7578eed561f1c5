"""The optimizer states of a checkpoint without ZeRO: the base optimizer's own ``state_dict``, inline, which has no
names.

Read from DeepSpeed 0.19.8. In fp32 ``optimizer`` is torch's ``state_dict``. With 16-bit weights it is inside, under
``optimizer_state_dict``, and its parameters are the masters: one tensor each (``runtime/fp16/unfused_optimizer.py``
``fp32_groups``), or one for each group (``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``).

An optimizer lists the parameters of a group in the module's order, with others between them that are frozen or of
another group. States get the names of the one assignment by which shapes (of masters: values too) fit in that order.
Where two fit, nothing tells which is right: a guess would give weights the momentum of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.settings import STEP, counters, plain
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import agrees, row_major
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training, whole_rows
from dsconv.checkpoint.pickles.values import Instance, TensorRef, safe_repr
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.zero_utils.files import TagFolder

INNER = "optimizer_state_dict"
NO_SETTINGS = frozenset({INNER, "fp32_groups", "fp32_groups_flat", "state", "param_groups"})
MAX_LIVE = 10_000  # partial assignments at a time; a sound checkpoint has a few
OTHERWISE = "Its weights can be merged all the same; an optimizer then starts anew"
SCALERS = "deepspeed.runtime.fp16.loss_scaler"

Row = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    """What the optimizer keeps of one parameter: its states by name, None for one that it has not, and in 16 bit its
    master.
    """

    row: Row
    master: TensorRef | None = None


# (group, position in it, parameter) → (what the optimizer keeps of it, the next position), or None where it is not that
# parameter's.
Take = Callable[[int, int, str], tuple[_Found, int] | None]


def read_training(folder: TagFolder, rank: RankMap) -> Training:
    """Of one model-parallel rank. Raises MalformedError, and UnsupportedError where states cannot be told apart, or
    are none.
    """
    states, optimizer = rank.states, rank.states.optimizer
    path = states.path
    inner: Any = optimizer.get(INNER, optimizer) if isinstance(optimizer, dict) else None
    rows = _rows(inner, states)
    names = _module_order(rank)
    take, ends, sizes = _reader(states, rank, names, rows)
    found = _assigned(names, sizes, ends, take, path)
    if rank.masters and {name: kept.master for name, kept in found.items()} != rank.masters:
        raise UnsupportedError(
            f"{path}: the fp32 masters and the optimizer's states can be matched to the parameters in two ways."
            f" {OTHERWISE}"
        )
    trained = {name: kept for name, kept in found.items() if kept.row or kept.master is not None}
    if not trained:
        raise UnsupportedError(
            f"{path}: the optimizer keeps no state of any parameter (as SGD without momentum, or before the first"
            f" step), so nothing tells which were trained. {OTHERWISE}"
        )
    warnings: list[str] = []
    if not rank.masters:
        warnings.append(
            "without ZeRO in fp32 the optimizer's states have no names: they were matched by their order and shapes"
        )
    idle = [name for name, kept in found.items() if name not in trained and rank.entries[name].numel]
    if idle:
        warnings.append(
            f"{len(idle)} parameters, such as {idle[0]!r}, have no optimizer states (frozen, or never given a gradient)"
        )
    info = states.raw.get("universal_checkpoint_info")
    return Training(
        stage=0,
        states=_entries(trained, rank.entries, states, warnings),
        steps=_steps(trained, states),
        param_groups=[plain(group, states.file, "param_groups") for group in inner["param_groups"]],
        settings=_settings(states),
        module=states.module_entries(exclude=set(trained), ties={}),
        model_files=tuple(folder.model.values()),
        counters=partial(counters, states),
        cut=UniversalInfo(info, path).cut if isinstance(info, dict) else whole_rows,
        deepspeed_version=states.ds_version,
        warnings=tuple(warnings),
    )


def _rows(inner: Any, states: ModuleStates) -> list[list[Row]]:
    """The states of each parameter of each group; an empty row where the optimizer has made none."""
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    table = inner.get("state") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not isinstance(table, dict):
        raise MalformedError(f"{states.path}: the optimizer holds no 'state' and 'param_groups'")
    rows: list[list[Row]] = []
    for group in groups:
        numbers = group.get("params") if isinstance(group, dict) else None
        mine = [table.get(n, {}) if type(n) is int else None for n in numbers] if isinstance(numbers, list) else [None]
        if not all(isinstance(row, dict) for row in mine):
            raise MalformedError(
                f"{states.path}: a parameter group of the optimizer does not list its parameters by number"
            )
        rows.append(
            [
                {k: v for k, v in row.items() if isinstance(k, str) and v is not None}
                for row in mine
                if isinstance(row, dict)
            ]
        )
    return rows


def _module_order(rank: RankMap) -> list[str]:
    """The parameters as ``named_parameters`` has them: a tied one where its first name is."""
    order = {name: i for i, name in enumerate(rank.states.module)}
    entries = [entry for entry in rank.entries.values() if entry.role != "buffer"]
    return [
        entry.name
        for entry in sorted(entries, key=lambda entry: min(order[name] for name in (entry.name, *entry.aliases)))
    ]


def _reader(
    states: ModuleStates, rank: RankMap, names: list[str], rows: list[list[Row]]
) -> tuple[Take, list[int], list[int]]:
    """How a group is read along the module, where its positions end, and how far each parameter of ``names`` could
    move one.
    """
    optimizer, file = states.optimizer, states.file
    shapes = {name: rank.entries[name].shape for name in names}
    masters, flats = optimizer.get("fp32_groups"), optimizer.get("fp32_groups_flat")
    if flats is None and masters is None:
        if INNER in optimizer:
            raise MalformedError(
                f"{states.path}: the optimizer of 16-bit weights holds no fp32_groups and no fp32_groups_flat"
            )

        def take_row(group: int, position: int, name: str) -> tuple[_Found, int] | None:
            row = rows[group][position]
            return (_Found(row), position + 1) if _fits(row, shapes[name]) else None

        return take_row, [len(group) for group in rows], [1] * len(names)
    if not rank.masters:
        raise UnsupportedError(
            f"{states.path}: the fp32 masters could not be matched to the parameters by order, shape and values."
            f" {OTHERWISE}"
        )
    weights = {name: (file, states.module[name]) for name in names}
    known: dict[tuple[str, TensorRef], bool] = {}

    def is_master(name: str, master: TensorRef) -> bool:
        if shapes[name] != master.shape:
            return False
        if (name, master) not in known:
            known[name, master] = agrees(file, weights, name, master)
        return known[name, master]

    if masters is not None:
        if [len(group) for group in masters] != [len(group) for group in rows]:
            raise MalformedError(
                f"{states.path}: the optimizer has {len(masters)} groups of masters and other ones of states"
            )

        def take_master(group: int, position: int, name: str) -> tuple[_Found, int] | None:
            row, master = rows[group][position], masters[group][position]
            return (_Found(row, master), position + 1) if is_master(name, master) and _fits(row, master.shape) else None

        return take_master, [len(group) for group in rows], [1] * len(names)
    if [len(group) for group in rows] != [1] * len(flats):
        raise MalformedError(
            f"{states.path}: the optimizer has {len(flats)} groups of masters and other ones of states"
        )

    def take_part(group: int, position: int, name: str) -> tuple[_Found, int] | None:
        flat, numel, (row,) = flats[group], rank.entries[name].numel, rows[group]
        if not numel or position + numel > flat.numel or not _fits(row, flat.shape):
            return None
        master = _part(flat, position, shapes[name])
        cut = {
            k: _part(v, position, shapes[name]) if isinstance(v, TensorRef) and v.shape == flat.shape else v
            for k, v in row.items()
        }
        return (_Found(cut, master), position + numel) if is_master(name, master) else None

    return take_part, [flat.numel for flat in flats], [rank.entries[name].numel for name in names]


def _part(flat: TensorRef, position: int, shape: Shape) -> TensorRef:
    return TensorRef(flat.storage, flat.dtype, flat.offset + position, shape, row_major(shape))


def _fits(row: Row, shape: Shape) -> bool:
    """Whether the states of ``row`` can be of a parameter of ``shape``: those of one value a weight have it. No
    states fit any.
    """
    sizes = {value.shape for key, value in row.items() if key != STEP and isinstance(value, TensorRef)}
    return not row or (shape in sizes and sizes <= {shape, ()}) or (not sizes and not shape)


def _assigned(names: list[str], sizes: list[int], ends: list[int], take: Take, path: Any) -> dict[str, _Found]:
    """What the optimizer keeps of each parameter that it owns, by the one assignment that fits.

    Walks the module with a position in each group; a parameter is the next of some group, or of none (frozen).
    Positions that are reached in several ways count as such, so that in the end the ways are known. Raises
    UnsupportedError unless it is one.
    """
    left = list(accumulate(reversed(sizes), initial=0))[::-1]  # what the parameters from here on could take at most
    levels: list[dict[tuple[int, ...], tuple[int, tuple[int, ...], _Found | None]]] = [
        {(0,) * len(ends): (1, (), None)}
    ]
    for at, name in enumerate(names):
        reached: dict[tuple[int, ...], tuple[int, tuple[int, ...], _Found | None]] = {}
        for positions, (ways, *_) in levels[-1].items():
            steps: list[tuple[tuple[int, ...], _Found | None]] = [(positions, None)]
            for group, position in enumerate(positions):
                taken = take(group, position, name) if position < ends[group] else None
                if taken is not None:
                    steps.append(((*positions[:group], taken[1], *positions[group + 1 :]), taken[0]))
            for after, kept in steps:
                if sum(ends) - sum(after) <= left[at + 1]:
                    before = reached[after][0] if after in reached else 0
                    reached[after] = (min(before + ways, 2), positions, kept)
        if len(reached) > MAX_LIVE:
            raise UnsupportedError(
                f"{path}: the optimizer's states fit the parameters in too many ways to tell them apart. {OTHERWISE}"
            )
        levels.append(reached)
    end = tuple(ends)
    ways = levels[-1][end][0] if end in levels[-1] else 0
    if ways != 1:
        why = "fit the parameters in several ways" if ways else "do not fit the module's parameters in their order"
        raise UnsupportedError(
            f"{path}: the optimizer's states have no names, and their shapes {why} (some were frozen, or groups of "
            f"parameters have equal shapes): which state is whose the checkpoint does not say. {OTHERWISE}"
        )
    found: dict[str, _Found] = {}
    for at in range(len(names), 0, -1):
        _, end, kept = levels[at][end]
        if kept is not None:
            found[names[at - 1]] = kept
    return {name: found[name] for name in names if name in found}


def _entries(
    trained: Mapping[str, _Found], entries: Mapping[str, TensorEntry], states: ModuleStates, warnings: list[str]
) -> dict[str, dict[str, TensorEntry]]:
    rows = {name: {k: v for k, v in kept.row.items() if k != STEP} for name, kept in trained.items()}
    wide = {
        k
        for name, row in rows.items()
        for k, v in row.items()
        if isinstance(v, TensorRef) and v.shape and entries[name].shape
    }
    every = {k for row in rows.values() for k in row}
    wide = wide or {
        k for row in rows.values() for k, v in row.items() if isinstance(v, TensorRef)
    }  # of 0-d parameters only
    if every - wide:
        warnings.append(
            f"the optimizer's {', '.join(sorted(map(safe_repr, every - wide)))} is not of one value a weight: left out"
        )
    result: dict[str, dict[str, TensorEntry]] = {}
    for name, row in rows.items():
        result[name] = {}
        for key in sorted(wide):
            if isinstance(value := row.get(key), TensorRef):
                entry = TensorEntry(
                    f"{name}/{key}", value.dtype, entries[name].shape, partial(states.file.pieces, value)
                )
                entry.layout()
                result[name][key] = entry
    return result


def _steps(trained: Mapping[str, _Found], states: ModuleStates) -> dict[str, Any]:
    """The step counters, which ZeRO keeps one of for a whole group; raises UnsupportedError where they differ."""
    steps = {
        name: plain(kept.row[STEP], states.file, f"the step of {name!r}")
        for name, kept in trained.items()
        if STEP in kept.row
    }
    first = next(iter(steps), None)
    other = next((name for name, step in steps.items() if first is not None and step != steps[first]), None)
    if other is not None:
        raise UnsupportedError(
            f"{states.path}: {other!r} has taken other steps than {first!r}: some had no gradient for a while, and ZeRO"
            f" counts the steps of all together. {OTHERWISE}"
        )
    return steps


def _settings(states: ModuleStates) -> dict[str, Any]:
    """What the optimizer's wrapper saved, and its loss scaler as ZeRO saves one (0.19.8
    ``runtime/fp16/loss_scaler.py``).
    """
    optimizer, config = states.optimizer, states.raw.get("ds_config")
    settings = {k: plain(v, states.file, f"optimizer[{k!r}]") for k, v in optimizer.items() if k not in NO_SETTINGS}
    scale = settings.pop("cur_scale", None)
    moving = {
        key: settings.pop(key, None) for key in ("cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
    }
    if scale is None:
        return settings
    settings["overflow"] = False
    if not settings.get("dynamic_loss_scale"):
        settings["loss_scaler"] = Instance(f"{SCALERS}.LossScaler", (), {"cur_scale": scale, "dynamic": False})
        return settings
    fp16 = config.get("fp16") if isinstance(config, dict) else None
    asked: Mapping[str, Any] = fp16 if isinstance(fp16, dict) else {}
    shift = asked.get("hysteresis", 2)  # defaults of ``runtime/precision_config.py``
    settings["loss_scaler"] = Instance(
        f"{SCALERS}.DynamicLossScaler",
        (),
        {
            "cur_scale": scale,
            "dynamic": True,
            **moving,
            "min_scale": asked.get("min_loss_scale", 1),
            "delayed_shift": shift,
            "cur_hysteresis": shift,
            "consecutive_hysteresis": asked.get("consecutive_hysteresis", False),
            "raise_error_at_min_scale": True,
            "dtype": BY_NAME["float16"],
        },
    )
    return settings
