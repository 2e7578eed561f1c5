"""The optimizer of a DCP directory as a ``Training``: states, step counts, parameter groups, counters.

The optimizer lies beside the model in one directory, as torch's own recipes and torchtitan save it, or in a directory
of its own: ``optimizer_0/`` of accelerate (``utils/fsdp_utils.py`` ``save_fsdp_optimizer``), which the Trainer calls
too, and ``optim/`` of NeMo Automodel. Its masters are the model's parameters, which FSDP2 keeps in fp32 under mixed
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.dcp.chunks import entries_of, files_of
from dsconv.checkpoint.formats.dcp.counters import lost_scale, read_counters
from dsconv.checkpoint.formats.dcp.fused import Fused, cut_fused
from dsconv.checkpoint.formats.dcp.metadata import read_metadata
from dsconv.checkpoint.formats.dcp.names import leaves_of
from dsconv.checkpoint.formats.dcp.optimizer_items import PARAMS, OptimizerItems, sort_items
from dsconv.checkpoint.formats.dcp.steps import optimizer_folders
from dsconv.checkpoint.formats.dcp.values import Directory, places_of, read_values
from dsconv.checkpoint.formats.items.models import MODEL_KEYS, TOP, Items
from dsconv.checkpoint.formats.items.optimizers import optimizer_parts
from dsconv.checkpoint.formats.items.state_dicts import Parts
from dsconv.checkpoint.map.renaming import unwrap
from dsconv.checkpoint.map.tensors import TensorEntry, prove_tiling
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import quote

STEP = "step"
OTHERWISE = "Its weights can still be converted; the optimizer then starts afresh"


@dataclass(frozen=True)
class Model:
    """The model that an optimizer trained.

    Attributes:
        entries: Its tensors.
        stored: {name in the file: name in ``entries``}.
        path: The keys that lead to it in its directory.
        directory: Its directory, which may hold counters.
        top: The folder of the step, which may hold the files of a trainer.
        step: The step that the folder's name tells.
        config: Its config.json, if there is one.
        others: The keys of the other models in its directory.
    """

    entries: Mapping[str, TensorEntry]
    stored: Mapping[str, str]
    path: Parts
    directory: Directory
    top: Path
    step: int | None
    config: Path | None
    others: tuple[str, ...] = ()


class Names:
    """Finds the tensors of a model by the names that its optimizer has for them."""

    def __init__(self, model: Model, wanted: Iterable[str]) -> None:
        self._stored = model.stored
        self._own = {alias: entry.name for entry in model.entries.values() for alias in (entry.name, *entry.aliases)}
        self._unwrapped = unwrap(wanted)

    def find(self, name: str) -> str | None:
        """Return the name in the model's entries, or None if there is none."""
        for given in (name, self._unwrapped(name)):
            own = self._own.get(self._stored.get(given, given))
            if own is not None:
                return own
        return None


@dataclass
class _Found:
    """What is read of the items of one optimizer, by the model's names."""

    chosen: dict[str, tuple[str, str]] = field(default_factory=dict)  # flat name → parameter, state
    steps: dict[str, str] = field(default_factory=dict)  # parameter → flat name
    left_out: set[str] = field(default_factory=set)


def optimizers_of(directory: Directory, names: Items, models: int) -> tuple[Callable[[], list[Directory]] | None, str]:
    """Return what opens the directories of a model's optimizer, or None and why there is none.

    Args:
        directory: The model's directory.
        names: The model's items.
        models: How many directories of models lie beside each other.
    """
    if names.holders:
        return lambda: [directory], ""
    beside = optimizer_folders(directory.folder)
    if beside and models > 1:
        return None, f"{models} models lie beside the optimizers, and nothing tells which one each of them trained"
    if beside:
        return lambda: [_open(folder) for folder in beside], ""
    if names.optimizers:
        return None, "its optimizer's states are in a form that dsconv does not read"
    return None, "it holds no optimizer states"


def _open(folder: Path) -> Directory:
    metadata = read_metadata(folder)
    leaves = leaves_of(metadata)
    return Directory(folder, metadata, leaves, optimizer_parts(leaves).holders)


def read_training(
    model: Model, open_optimizers: Callable[[], list[Directory]], fetch: Callable[[Iterable[Path]], None]
) -> Training:
    """Return the optimizer of a model.

    Args:
        model: The model.
        open_optimizers: Opens the directories in which its optimizer may lie.
        fetch: ``Root.fetch``.

    Raises:
        MissingShardError: A file is missing.
        MalformedError: A file is damaged.
        InconsistentCheckpointError: Items do not fit together, or are of another save.
        UnsupportedError: Several optimizers fit, or one trained what the model lacks.
    """
    directory, items, names, fused = _pick(open_optimizers(), model)
    found, sizes = _sorted(items, names, fused, directory, model)
    metadata, folder = directory.metadata, directory.folder
    chosen = {flat: f"{name}/{state}" for flat, (name, state) in found.chosen.items()}
    of_groups = [flat for of in (items.groups, items.settings) for one in of.values() for flat in one.values()]
    wanted = [*found.steps.values(), *of_groups]
    files = {*files_of(metadata, chosen), *(stored.file for stored in places_of(metadata, wanted).values())}
    fetch(folder / name for name in sorted(files))
    entries, warnings = entries_of(metadata, chosen, folder)
    values = read_values(metadata, wanted, folder)
    states = _states(found, entries, fused, sizes)
    steps = {own: values[flat] for name, flat in found.steps.items() for own in _parts(name, fused)}
    groups, members = _groups(items, values, names, fused, directory, list(states))
    if found.left_out:
        warnings.append(
            f"the optimizer's {', '.join(sorted(map(safe_repr, found.left_out)))} is not of one value a weight: left"
            " out"
        )
    warnings += lost_scale(directory)
    if not items.groups and not items.settings:
        warnings.append(
            "the optimizer was saved without its hyperparameters and parameter groups: those of the new run's"
            " configuration are used, which must have one group"
        )
    elif not items.groups and len(groups) > 1:
        warnings.append(
            f"each parameter has hyperparameters of its own: {len(groups)} parameter groups were made of those that"
            " share them, in the order of the model"
        )
    directories = (model.directory, directory) if directory is not model.directory else (directory,)
    trained = {name for group in members for name in group} | set(states)
    in_order = {name: states.get(name, {}) for name in model.entries if name in trained}
    return Training(
        stage=0,
        states=in_order,
        steps={name: steps[name] for name in in_order if name in steps},
        param_groups=groups,
        settings={},
        module={
            name: replace(entry, role="frozen" if entry.dtype.floating else "buffer")
            for name, entry in model.entries.items()
            if name not in trained
        },
        model_files=(),
        counters=partial(read_counters, directories, model.top, model.step, steps),
        members=members,
        left_out=tuple(sorted(found.left_out)),
        warnings=tuple(warnings),
    )


def _pick(directories: list[Directory], model: Model) -> tuple[Directory, OptimizerItems, Names, Fused]:
    """Return the one optimizer that trained the model, and the directory that it lies in."""
    known = {*model.stored, *model.entries}
    fitting: list[tuple[Directory, OptimizerItems, Names, Fused]] = []
    lacking: list[tuple[Directory, OptimizerItems, str]] = []
    for directory in directories:
        for items in sort_items(directory.leaves, directory.holders, known):
            names = Names(model, items.parameters)
            fused = Fused(model.entries, names.find, model.config)
            strange = next((n for n in items.parameters if names.find(n) is None and not fused.parts(n)), None)
            if strange is None:
                fitting.append((directory, items, names, fused))
            else:
                lacking.append((directory, items, strange))
    if len(fitting) > 1:
        depths = [_shared(items.holder, model.path) for _, items, _, _ in fitting]
        nearest = [one for one, depth in zip(fitting, depths, strict=True) if depth == max(depths)]
        fitting = nearest if len(nearest) == 1 else fitting
    if len(fitting) == 1:
        _refuse_rivals(fitting[0][1], model)
        return fitting[0]
    if fitting:
        listed = ", ".join(f"{quote(items.label)} in {directory.folder.name}" for directory, items, _, _ in fitting)
        raise UnsupportedError(
            f"{directories[0].folder}: several optimizers hold states of the model's parameters: {listed}. dsconv reads"
            f" the states of one. {OTHERWISE}"
        )
    if lacking:
        directory, items, strange = lacking[0]
        raise UnsupportedError(
            f"{directory.folder}: {quote(items.label)} holds states of {quote(strange)}, and the model has no such"
            f" parameter. {OTHERWISE}"
        )
    raise UnsupportedError(
        f"{directories[0].folder}: it holds no states of an optimizer in a form that dsconv reads. {OTHERWISE}"
    )


def _refuse_rivals(items: OptimizerItems, model: Model) -> None:
    """Raise UnsupportedError where the optimizer may have trained another model, such as the one that this averages."""
    near = _shared(items.holder, model.path)
    is_named = bool(model.path) and model.path[-1] in MODEL_KEYS
    for key in model.others:
        path = () if key == TOP else tuple(key.split("."))
        held = {
            ".".join(leaf.path)[len(key) + 1 :] if path else ".".join(leaf.path)
            for leaf in model.directory.leaves.values()
            if leaf.is_tensor and ".".join(leaf.path).startswith(f"{key}." if path else "")
        }
        if _shared(items.holder, path) < near or not held.issuperset(items.parameters):
            continue
        if not is_named or (path and path[-1] in MODEL_KEYS):
            own = ".".join(model.path) or TOP
            raise UnsupportedError(
                f"{model.directory.folder}: nothing tells whether {quote(items.label)} trained the model {quote(own)}"
                f" or {quote(key)}, which have parameters of the same names. {OTHERWISE}"
            )


def _shared(holder: Parts, path: Parts) -> int:
    """Return how many words an optimizer's path and a model's begin with alike."""
    words = [word for part in path for word in part.split(".")]
    return next(
        (n for n, (a, b) in enumerate(zip(holder, words, strict=False)) if a != b), min(len(holder), len(words))
    )


def _sorted(
    items: OptimizerItems, names: Names, fused: Fused, directory: Directory, model: Model
) -> tuple[_Found, dict[str, tuple[int, ...]]]:
    """Return what to read of each state, and the shapes of the parameters that are fused ones."""
    found, owners = _Found(), dict[str, str]()
    sizes: dict[str, tuple[int, ...]] = {}
    metadata = directory.metadata
    for given, states in items.states.items():
        name = names.find(given)
        if name is None:
            name, sizes[given] = given, fused.shape(given)
        if owners.setdefault(name, given) != given:
            raise InconsistentCheckpointError(
                f"{directory.folder}: {quote(items.label)} holds states of {quote(given)} and of {quote(owners[name])},"
                " which are one parameter"
            )
        shape = sizes[given] if given in sizes else model.entries[name].shape
        for state, flat in states.items():
            meta = metadata.tensors.get(flat)
            if state == STEP:
                found.steps[name] = flat
            elif meta is None or meta.shape != shape:
                found.left_out.add(state)
            else:
                found.chosen[flat] = name, state
    found.chosen = {flat: place for flat, place in found.chosen.items() if place[1] not in found.left_out}
    return found, sizes


def _parts(name: str, fused: Fused) -> tuple[str, ...]:
    """Return the parameters of the model that a name of the optimizer stands for."""
    return fused.parts(name) or (name,)


def _states(
    found: _Found, entries: Mapping[str, TensorEntry], fused: Fused, sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, TensorEntry]]:
    """Return the states by parameter, each proved to be whole."""
    by_name = {name: entry for entry in entries.values() for name in (entry.name, *entry.aliases)}
    states: dict[str, dict[str, TensorEntry]] = {}
    for name, state in found.chosen.values():
        entry = replace(by_name[f"{name}/{state}"], name=f"{name}/{state}", aliases=())
        prove_tiling(entry)
        if name not in sizes:
            states.setdefault(name, {})[state] = entry
            continue
        for own, part in cut_fused(entry, fused, name).items():
            states.setdefault(own, {})[state] = replace(part, name=f"{own}/{state}")
    return states


def _groups(
    items: OptimizerItems,
    values: Mapping[str, Any],
    names: Names,
    fused: Fused,
    directory: Directory,
    trained: list[str],
) -> tuple[list[dict[str, Any]], tuple[tuple[str, ...], ...]]:
    """Return the parameter groups, and the parameters of each; none where the checkpoint does not tell."""

    def own(given: str) -> tuple[str, ...]:
        name = names.find(given)
        parts = (name,) if name is not None else fused.parts(given)
        if not parts:
            raise UnsupportedError(
                f"{directory.folder}: a parameter group of {quote(items.label)} lists {quote(given)}, and the model has"
                f" no such parameter. {OTHERWISE}"
            )
        return parts

    if items.groups:
        listed = [
            {setting: values[flat] for setting, flat in items.groups[number].items()}
            for number in sorted(items.groups, key=lambda text: (len(text), text))
        ]
        lists = [group.pop(PARAMS, None) for group in listed]
        groups = [{**group, PARAMS: [number]} for number, group in enumerate(listed)]
        if any(given is None for given in lists):
            return groups, (tuple(trained),) if len(groups) == 1 else ()
        for number, given in enumerate(lists):
            if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
                raise MalformedError(
                    f"{directory.folder}: the parameters of group {number} of {quote(items.label)} are"
                    f" {safe_repr(given, 200)}; expected names"
                )
        return groups, tuple(tuple(part for name in given for part in own(name)) for given in lists)
    groups, members = list[dict[str, Any]](), list[list[str]]()
    for given, flats in items.settings.items():
        settings = {setting: values[flat] for setting, flat in flats.items()}
        number = next((n for n, group in enumerate(groups) if group == settings), len(groups))
        if number == len(groups):
            groups.append(settings)
            members.append([])
        members[number] += own(given)
    if not groups:
        return [{}], (tuple(trained),)
    return [{**group, PARAMS: [n]} for n, group in enumerate(groups)], tuple(map(tuple, members))
