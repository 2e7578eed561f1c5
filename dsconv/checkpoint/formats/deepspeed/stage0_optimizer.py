"""The optimizer states of a checkpoint without ZeRO: the base optimizer's own ``state_dict``, which has no names.

Read from DeepSpeed. In fp32 ``optimizer`` is torch's ``state_dict``. With 16-bit weights that lies inside, under
``optimizer_state_dict``, and its parameters are the masters: one tensor each (``runtime/fp16/unfused_optimizer.py``
``fp32_groups``), or one for each group (``runtime/fp16/fused_optimizer.py`` ``fp32_groups_flat``).

With masters, the states of a parameter lie where its master does, which ``unnamed_masters`` found out. In fp32 the
weights are the masters and their values tell nothing. If the optimizer was made of ``named_parameters()``, it names
them (``param_names``); else the states get the names of the one assignment by which their shapes fit the module in its
order. Where two fit, nothing tells which is right: a guess would give weights the momentum of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsconv.checkpoint.formats.deepspeed.fields import Fields
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.param_names import names_of_groups
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.settings import STEP, counters, members_of, optimizer_config
from dsconv.checkpoint.formats.deepspeed.stage0 import module_order
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import (
    FlatTensor,
    MasterSlot,
    Matcher,
    groups_of,
    part_of,
)
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training, whole_rows
from dsconv.checkpoint.pickles.values import Instance, TensorRef, safe_repr
from dsconv.checkpoint.torchfile.plain import plain
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import count, quote
from dsconv.zero_utils.tag_folder import TagFolder

INNER = "optimizer_state_dict"
NO_SETTINGS = frozenset({INNER, "fp32_groups", "fp32_groups_flat", "state", "param_groups"})
OTHERWISE = "Its weights can still be merged; the optimizer then starts afresh"
SCALERS = "deepspeed.runtime.fp16.loss_scaler"

Row = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Kept:
    """What the optimizer keeps of one parameter: its group, its states by name, and with 16-bit weights its master."""

    group: int
    row: Row
    master: TensorRef | None = None


@dataclass(frozen=True)
class _Rows:
    """A group of fp32 training, which lists the states of each parameter; those of one value per weight have its
    shape.
    """

    number: int
    rows: Sequence[Row]
    shapes: Mapping[str, Shape]

    @property
    def end(self) -> int:
        return len(self.rows)

    def slot(self, position: int, name: str) -> MasterSlot | None:
        fits = _fits(self.rows[position], self.shapes[name])
        return MasterSlot(self.number, position, position + 1) if fits else None


def read_training(folder: TagFolder, rank: RankMap) -> Training:
    """Return the optimizer of one model-parallel rank.

    Args:
        folder: The files of the rank.
        rank: Its map.

    Raises:
        MalformedError: The optimizer's state is not what it should be.
        UnsupportedError: Which states belong to which parameter cannot be determined, or there are none.
    """
    states, optimizer = rank.states, rank.states.optimizer
    inner = Fields.of(
        states.path,
        optimizer.get(INNER, optimizer) if isinstance(optimizer, dict) else None,
        "the state of an optimizer",
    )
    rows = _rows(inner)
    names = names_of_groups(inner.listing("param_groups"), rank.entries, states.stored)
    warnings: list[str] = []
    if rank.masters:
        found = _with_masters(rank, rows)
    elif names is not None and INNER not in states.optimizer:
        found = _by_name(rank, rows, names)
    else:
        found = _by_shape(rank, rows)
        warnings.append(
            "without ZeRO in fp32 the optimizer's states have no names: they were matched by their order and shapes"
        )
    trained = {name: kept for name, kept in found.items() if kept.row or kept.master is not None}
    if not trained:
        raise UnsupportedError(
            f"{states.path}: the optimizer keeps no state of any parameter (as SGD without momentum, or before the"
            f" first step), so nothing tells which were trained. {OTHERWISE}"
        )
    idle = [name for name, kept in found.items() if name not in trained and rank.entries[name].numel]
    if idle:
        warnings.append(
            f"{count(len(idle), 'parameter', 'has')} no optimizer states, such as {quote(idle[0])} (frozen, or never"
            " given a gradient)"
        )
    entries, left_out = _entries(trained, rank.entries, states, warnings)
    groups = [plain(group, states.file, "param_groups") for group in inner.listing("param_groups")]
    info = states.universal_info
    return Training(
        stage=0,
        states=entries,
        steps=_steps(trained, states),
        param_groups=groups,
        settings=_settings(states),
        module=states.module_entries(exclude=set(trained), ties={}),
        model_files=tuple(folder.model.values()),
        counters=partial(counters, states),
        cut=UniversalInfo(info, states.path, states.stored).cut if info else whole_rows,
        deepspeed_version=states.ds_version,
        members=members_of([1] * len(groups), ((name, kept.group) for name, kept in trained.items())),
        optimizer=optimizer_config(states),
        left_out=left_out,
        stored=states.stored,
        warnings=tuple(warnings),
    )


def _rows(inner: Fields) -> list[list[Row]]:
    """Return the states of each parameter of each group; an empty row where the optimizer has made none."""
    table = inner.required("state")
    rows: list[list[Row]] = []
    for group in inner.listing("param_groups"):
        numbers = group.get("params") if isinstance(group, dict) else None
        mine = [table.get(n, {}) if type(n) is int else None for n in numbers] if isinstance(numbers, list) else [None]
        if not all(isinstance(row, dict) for row in mine):
            raise MalformedError(
                f"{inner.path}: a parameter group of the optimizer does not list its parameters by number"
            )
        known = [row for row in mine if isinstance(row, dict)]
        rows.append([{k: v for k, v in row.items() if isinstance(k, str) and v is not None} for row in known])
    return rows


def _with_masters(rank: RankMap, rows: list[list[Row]]) -> dict[str, _Kept]:
    """Return what the optimizer keeps of each parameter that has a master: states lie where the master does."""
    states = rank.states
    groups = groups_of(states.optimizer, rank.entries)
    lengths = [1 if isinstance(group, FlatTensor) else group.end for group in groups]
    if [len(group) for group in rows] != lengths:
        raise MalformedError(
            f"{states.path}: the optimizer has masters of {lengths[:8]} parameters in its groups and states of"
            f" {[len(group) for group in rows][:8]}"
        )
    found: dict[str, _Kept] = {}
    for name, slot in rank.masters.items():
        group = groups[slot.number]
        if isinstance(group, FlatTensor):
            row, shape = rows[slot.number][0], rank.entries[name].shape
            whole = group.flat.shape
            fits = _fits(row, whole)
            row = {
                key: part_of(value, slot.position, shape)
                if isinstance(value, TensorRef) and value.shape == whole
                else value
                for key, value in row.items()
            }
        else:
            row = rows[slot.number][slot.position]
            fits = _fits(row, rank.entries[name].shape)
        if not fits:
            raise UnsupportedError(
                f"{states.path}: the optimizer's states of {quote(name)} do not have the shape of its master."
                f" {OTHERWISE}"
            )
        if slot.is_any and row:
            raise UnsupportedError(
                f"{states.path}: the master of {quote(name)} is equal to others', so nothing tells which optimizer"
                f" states belong to it. {OTHERWISE}"
            )
        found[name] = _Kept(slot.number, row, slot.master)
    return found


def _by_name(rank: RankMap, rows: list[list[Row]], names: list[list[str]]) -> dict[str, _Kept]:
    """Return what the optimizer of fp32 training keeps of each parameter, by the names that it has itself."""
    shapes = {name: entry.shape for name, entry in rank.entries.items()}
    groups = [_Rows(number, group, shapes) for number, group in enumerate(rows)]
    found = Matcher(list(shapes), groups, {}, _any_fits).by_names(names)
    if found is None:
        raise MalformedError(
            f"{rank.states.path}: the optimizer's param_names do not fit its states: their number or a shape differs."
            f" {OTHERWISE}"
        )
    return {name: _Kept(slot.number, rows[slot.number][slot.position]) for name, slot in found.items()}


def _any_fits(slot: MasterSlot, name: str) -> bool:
    return True


def _by_shape(rank: RankMap, rows: list[list[Row]]) -> dict[str, _Kept]:
    """Return what the optimizer of fp32 training keeps of each parameter, by the one assignment that fits."""
    states = rank.states
    if INNER in states.optimizer:
        raise MalformedError(
            f"{states.path}: the optimizer of 16-bit weights holds no fp32_groups and no fp32_groups_flat"
        )
    names = list(module_order(states, rank.entries))
    shapes = {name: rank.entries[name].shape for name in names}
    groups = [_Rows(number, group, shapes) for number, group in enumerate(rows)]

    ways, found = Matcher(names, groups, dict.fromkeys(names, 1), _any_fits).in_order()
    if ways != 1:
        why = "fit the parameters in several ways" if ways else "do not fit the module's parameters in their order"
        raise UnsupportedError(
            f"{states.path}: the optimizer's states have no names, and their shapes {why} (some were frozen, or groups"
            f" of parameters have equal shapes): the checkpoint does not say which state"
            f" belongs to which parameter. {OTHERWISE}"
        )
    return {name: _Kept(slot.number, rows[slot.number][slot.position]) for name, slot in found.items()}


def _fits(row: Row, shape: Shape) -> bool:
    """Return whether the states of ``row`` can be those of a parameter of ``shape``.

    States of one value per weight have its shape, others are 0-d; a row without states fits any parameter.
    """
    sizes = {value.shape for key, value in row.items() if key != STEP and isinstance(value, TensorRef)}
    return not row or (shape in sizes and sizes <= {shape, ()}) or (not sizes and not shape)


def _entries(
    trained: Mapping[str, _Kept], entries: Mapping[str, TensorEntry], states: ModuleStates, warnings: list[str]
) -> tuple[dict[str, dict[str, TensorEntry]], tuple[str, ...]]:
    """Return the states of one value per weight, by parameter and name, and the names of the others, which are added
    to the warnings.
    """
    rows = {name: {k: v for k, v in kept.row.items() if k != STEP} for name, kept in trained.items()}
    wide = {
        k
        for name, row in rows.items()
        for k, v in row.items()
        if isinstance(v, TensorRef) and v.shape and entries[name].shape
    }
    every = {k for row in rows.values() for k in row}
    # Of 0-d parameters only.
    wide = wide or {k for row in rows.values() for k, v in row.items() if isinstance(v, TensorRef)}
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
    return result, tuple(sorted(every - wide))


def _steps(trained: Mapping[str, _Kept], states: ModuleStates) -> dict[str, Any]:
    """Return the step counters; raise UnsupportedError where they differ, as ZeRO keeps one for a whole group."""
    steps = {
        name: plain(kept.row[STEP], states.file, f"the step of {quote(name)}")
        for name, kept in trained.items()
        if STEP in kept.row
    }
    first = next(iter(steps), None)
    other = next((name for name, step in steps.items() if first is not None and step != steps[first]), None)
    if other is not None:
        raise UnsupportedError(
            f"{states.path}: {quote(other)} has not taken as many steps as {quote(first)}: some parameters had no"
            f" gradient for a while, and ZeRO counts steps for all of them together. {OTHERWISE}"
        )
    return steps


def _settings(states: ModuleStates) -> dict[str, Any]:
    """Return what the optimizer's wrapper saved, its loss scaler as ZeRO saves one (DeepSpeed
    ``runtime/fp16/loss_scaler.py``).
    """
    optimizer = states.optimizer
    settings = {
        k: plain(v, states.file, f"optimizer[{safe_repr(k)}]") for k, v in optimizer.items() if k not in NO_SETTINGS
    }
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
    fp16 = states.config.get("fp16")
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
