"""The counters of a DeepSpeed engine, and the name of the optimizer's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.torchfile.plain import plain

STEP = "step"  # a number, whatever the optimizer; every other state of one value per weight is a flat tensor


def counters(states: ModuleStates) -> dict[str, Any]:
    """Return what ``load_checkpoint`` sets of the engine itself (DeepSpeed ``runtime/engine.py`` ``_load_checkpoint``).

    Raises:
        UnsupportedError: One of them is not a plain value.
    """
    names = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")
    return {name: plain(states.raw[name], states.file, name) for name in names if name in states.raw}


def optimizer_config(states: ModuleStates) -> dict[str, Any]:
    """Return what the run's configuration says of its optimizer; nothing where the trainer made it itself."""
    found = states.config.get("optimizer")
    return {key: found.get(key) for key in ("type", "params")} if isinstance(found, dict) else {}


def members_of(sizes: Sequence[int], groups: Iterable[tuple[str, int]]) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each group of hyperparameters.

    Args:
        sizes: How many groups of masters each group of hyperparameters has.
        groups: Each parameter, and the number of its group of masters.
    """
    of_masters = [number for number, size in enumerate(sizes) for _ in range(size)]
    members: list[list[str]] = [[] for _ in sizes]
    for name, group in groups:
        members[of_masters[group]].append(name)
    return tuple(map(tuple, members))
