"""What a run counted, and the state of its learning-rate schedule, out of a DCP directory and the files beside it.

Trainers put them in the same dictionary (torchtitan ``train_state.step``, torch's recipes ``step`` and
``lr_scheduler``) or in files beside the directories: the Trainer ``trainer_state.json`` and ``scheduler.pt``,
accelerate ``scheduler.bin``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.dcp.values import Directory, nested, number_of, read_values
from dsconv.checkpoint.formats.items.state_dicts import Parts
from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.torchfile.plain import plain
from dsconv.errors import MalformedError

COUNTERS = "counters"  # what to-dcp --optimizer writes of a DeepSpeed run
KEPT = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")
LOSS_SCALE = "loss_scale"
SCHEDULERS = ("lr_scheduler", "scheduler")
STEP_PATHS: tuple[Parts, ...] = (("train_state", "step"), ("global_step",), ("step",))
TRAINER_STATE = "trainer_state.json"
SCHEDULER_FILES = ("scheduler.pt", "scheduler.bin")
MAX_ABOVE = 2  # {"app": {"model": …, "lr_scheduler": …}}
LAST_EPOCH = "last_epoch"  # torch counts the steps that were taken
LAST_BATCH = "last_batch_iteration"  # DeepSpeed counts from -1: runtime/lr_schedules.py


def read_counters(
    directories: tuple[Directory, ...], top: Path, step: int | None, steps: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what DeepSpeed's engine counts, as far as the checkpoint tells.

    Args:
        directories: The DCP directories of the model and of the optimizer.
        top: The folder of the step, with the files of a trainer.
        step: The step in the folder's name.
        steps: The optimizer's own step counts, by parameter.

    Returns:
        ``global_steps``, ``skipped_steps``, and where the checkpoint has them ``global_samples`` and ``lr_scheduler``.
        A run without DeepSpeed's loss scaler skips no steps.

    Raises:
        MalformedError: A file is damaged.
        UnsupportedError: The state of the schedule holds something else than plain values.
    """
    found: dict[str, Any] = {}
    for directory in directories:
        found |= {key: value for key, value in _below(directory, (COUNTERS,)).items() if key in KEPT}
    if "global_steps" not in found:
        counted = _counted(directories, top)
        first = next(iter(steps.values()), None)
        taken = next((n for n in (counted, step, number_of(first)) if n is not None), 0)
        found["global_steps"] = int(taken)
    found.setdefault("skipped_steps", 0)
    schedule = found.get("lr_scheduler") or _schedule(directories, top)
    if isinstance(schedule, dict) and schedule:
        last = number_of(schedule.get(LAST_EPOCH))
        if last is not None and LAST_BATCH not in schedule:
            schedule = {**schedule, LAST_BATCH: int(last) - 1}
        found["lr_scheduler"] = schedule
    return found


def _below(directory: Directory, keys: Sequence[str]) -> dict[str, Any]:
    """Return what lies below one of ``keys``, at most MAX_ABOVE keys deep; nothing where none is there."""
    for key in keys:
        for above in range(MAX_ABOVE + 1):
            flats = [
                flat
                for flat, leaf in directory.leaves.items()
                if len(leaf.path) > above + 1 and leaf.path[above] == key and flat not in directory.holders
            ]
            if flats:
                values = read_values(directory.metadata, flats, directory.folder)
                return nested(directory.leaves, values, above + 1)
    return {}


def _counted(directories: tuple[Directory, ...], top: Path) -> float | None:
    """Return the step that the run counted."""
    for directory in directories:
        by_path = {leaf.path: flat for flat, leaf in directory.leaves.items() if leaf.path in STEP_PATHS}
        for path in STEP_PATHS:
            if path in by_path:
                flat = by_path[path]
                number = number_of(read_values(directory.metadata, [flat], directory.folder)[flat])
                if number is not None:
                    return number
    if (top / TRAINER_STATE).is_file():
        try:
            state = json.loads(read_small(top / TRAINER_STATE))
        except (ValueError, RecursionError):
            raise MalformedError(f"{top / TRAINER_STATE}: not JSON; copy it again") from None
        number = state.get("global_step") if isinstance(state, dict) else None
        if type(number) is int:
            return number
    return None


def _schedule(directories: tuple[Directory, ...], top: Path) -> Any:
    for directory in directories:
        if found := _below(directory, SCHEDULERS):
            return found
    for name in SCHEDULER_FILES:
        if (top / name).is_file():
            file = TorchFile(top / name)
            return plain(file.root, file, "the state of the schedule")
    return None


def lost_scale(directory: Directory) -> list[str]:
    """Return a warning where the checkpoint keeps the loss scale of the DeepSpeed run that it was converted from."""
    if any(leaf.path[-2:] == (COUNTERS, LOSS_SCALE) for leaf in directory.leaves.values()):
        return ["the loss scale of the fp16 run is left out: the new run begins with that of its configuration"]
    return []
