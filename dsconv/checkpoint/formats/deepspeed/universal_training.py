"""The optimizer of a universal checkpoint: a file for each state of each parameter beside its ``fp32.pt``.

Read from DeepSpeed ``checkpoint/ds_to_universal.py``: a state's file has the form of the master's, ``step.pt`` holds
the step counter of one parameter, and ``optimizer_state.pt`` the settings: ``param_groups`` at its top, and from stage
3 also ``optimizer_state_dict``, whose states hold the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.settings import STEP, counters, members_of, optimizer_config
from dsconv.checkpoint.formats.deepspeed.zero_optimizer import SHARDED
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.torchfile.plain import plain
from dsconv.errors import InconsistentCheckpointError, MalformedError
from dsconv.text import quote

MASTER = "fp32"
GROUPS = "param_groups"
INNER = "optimizer_state_dict"
MEMBERS = "dsconv_parameter_groups"  # written by dsconv where the model states list no parameters: of stage 0


def read_training(
    zero: Path, settings: Path, stage: int, all_states: Sequence[ModuleStates], entries: Mapping[str, TensorEntry]
) -> Training:
    """Return the optimizer of a universal checkpoint.

    Args:
        zero: The folder ``zero/``.
        settings: Its ``optimizer_state.pt``.
        stage: The ZeRO stage of the source.
        all_states: The model states, those of rank 0 first.
        entries: The tensors of the whole model.

    Raises:
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: A state has another size than its parameter.
        UnsupportedError: The settings hold something that could not be written again.
    """
    first = all_states[0]
    file = TorchFile(settings)
    root = file.root if isinstance(file.root, dict) else {}
    found = root.get(INNER)
    inner: dict[Any, Any] = found if isinstance(found, dict) else {}
    listed = root.get(GROUPS, inner.get(GROUPS, []))
    groups = [plain(group, file, GROUPS) for group in listed] if isinstance(listed, list) else []
    if not all(isinstance(group, dict) for group in groups):
        raise MalformedError(f"{settings}: {GROUPS} does not hold mappings")
    states: dict[str, dict[str, TensorEntry]] = {}
    steps: dict[str, Any] = {}
    for name, entry in entries.items():
        if entry.role != "parameter":
            continue
        states[name] = {}
        for path in sorted((zero / first.stored.get(name, name)).glob("*.pt")):
            if path.stem == STEP:
                step = TorchFile(path)
                steps[name] = plain(step.root, step, f"the step of {quote(name)}")
            elif path.stem != MASTER:
                states[name][path.stem] = _state(path, entry)
    shared = _shared_step(inner, file)
    if shared is not None:
        steps = {name: steps.get(name, shared) for name in states}
    version = root.get("ds_version")
    return Training(
        stage=stage,
        states=states,
        steps=steps,
        param_groups=groups,
        settings={
            key: plain(value, file, safe_repr(key))
            for key, value in root.items()
            if isinstance(key, str) and key not in (*SHARDED, GROUPS, MEMBERS)
        },
        module={name: entry for name, entry in entries.items() if entry.role != "parameter"},
        model_files=tuple(of.path for of in all_states),
        counters=partial(counters, first),
        deepspeed_version=version if isinstance(version, str) else None,
        members=_members(groups, all_states, states, root.get(MEMBERS)),
        optimizer=optimizer_config(first),
        stored=first.stored,
    )


def _state(path: Path, master: TensorEntry) -> TensorEntry:
    """Return the entry of a state, which has the shape of its master, whatever view its file is cut in."""
    file = TorchFile(path)
    value = file.root.get("param") if isinstance(file.root, dict) else file.root
    if not isinstance(value, TensorRef):
        raise MalformedError(
            f"{path}: holds a {type(value).__name__}; expected the {quote(path.stem)} of parameter"
            f" {quote(master.name)}, one value per weight"
        )
    if value.numel != master.numel:
        raise InconsistentCheckpointError(
            f"{path}: {quote(path.stem)} of parameter {quote(master.name)} has shape {list(value.shape)}, and the"
            f" parameter has {list(master.shape)}. The files are not from one conversion"
        )
    layout = partial(file.pieces, value)
    layout()  # bounds are proved now
    return TensorEntry(f"{master.name}/{path.stem}", value.dtype, master.shape, layout)


def _shared_step(inner: Mapping[str, Any], file: TorchFile) -> Any:
    """Return the step of stage 3, which is one for all parameters; None where there is none."""
    rows = inner.get("state")
    for row in rows.values() if isinstance(rows, dict) else ():
        if isinstance(row, dict) and row.get(STEP) is not None:
            return plain(row[STEP], file, "the step")
    return None


def _members(
    groups: Sequence[Mapping[str, Any]],
    all_states: Sequence[ModuleStates],
    states: Mapping[str, object],
    noted: object,
) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each group; nothing where neither the model states nor the number of groups tell."""
    if len(groups) == 1:
        return (tuple(states),)
    if isinstance(noted, list) and len(noted) == len(groups) and _are_all(noted, states):
        return tuple(map(tuple, noted))
    sizes = [len(group["params"]) if isinstance(group.get("params"), list) else 0 for group in groups]
    masters = len(all_states[0].param_shapes)
    if not groups or sum(sizes) != masters or any(len(of.param_shapes) != masters for of in all_states):
        return ()
    of_names = {name: number for of in all_states for number, group in enumerate(of.param_shapes) for name in group}
    return members_of(sizes, ((name, of_names[name]) for name in states)) if set(states) <= set(of_names) else ()


def _are_all(noted: Sequence[Any], states: Mapping[str, object]) -> bool:
    """Return whether lists of names have each parameter once."""
    if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in noted):
        return False
    return sorted(name for group in noted for name in group) == sorted(states)
