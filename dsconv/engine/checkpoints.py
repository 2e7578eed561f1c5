"""RUN/checkpoints: each checkpoint whole or absent, and ``latest`` naming the last whole one.

A checkpoint is written into a hidden folder, synced, renamed, and only then named by ``latest``, so that a run killed
in the middle of a save goes on from the one before. The folder is a DeepSpeed save dir (``latest`` holds a tag), so
every tool that reads one reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.engine.data import Position
from dsconv.engine.files import _sync, write_file
from dsconv.engine.options import Layout
from dsconv.errors import CheckpointNotFoundError, MalformedError, OutputError

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "engine.json"
PARTIAL = ".partial"
_TAG = re.compile(r"step-(\d+)\Z")


@dataclass
class State:
    """What the engine keeps beside the weights and the optimizer: RUN/checkpoints/TAG/engine.json."""

    step: int
    position: Position = field(default_factory=Position)
    layout: Layout = field(default_factory=Layout)
    model: dict[str, Any] = field(default_factory=dict)  # sizes that tell one model from another


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def begin(run: Path) -> Path:
    """The folder that the next checkpoint is written into; what a killed save left there goes first. One rank calls
    it.
    """
    partial = run / FOLDER / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial} cannot be made: {error.strerror}") from None
    return partial


def abandon(run: Path) -> None:
    """Take away what a save that failed has written. Never raises."""
    shutil.rmtree(run / FOLDER / PARTIAL, ignore_errors=True)


def write_state(folder: Path, state: State) -> None:
    write_file(folder / STATE, json.dumps(asdict(state), indent=1).encode() + b"\n")


def commit(run: Path, step: int, keep: int) -> Path:
    """Sync what was written for ``step``, put it in its place and name it in ``latest``; of the older ones leave
    ``keep`` - 1.

    One rank calls it, once all have written. ``keep`` 0 leaves all. Raises OutputError.
    """
    folder = run / FOLDER
    written, target = folder / PARTIAL / tag_of(step), folder / tag_of(step)
    try:
        for root, _, names in os.walk(written):
            for name in names:
                _sync(Path(root, name))
            _sync(Path(root))
        if target.exists():  # the run came this way before: `latest` still names an earlier one
            shutil.rmtree(target)
        written.rename(target)
        _sync(folder)
    except OSError as error:
        raise OutputError(
            f"{target}: the checkpoint cannot be written: {error.strerror}; `latest` names the one before"
        ) from None
    write_file(folder / LATEST, target.name.encode())
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    if keep:
        for old in steps(run)[:-keep]:
            shutil.rmtree(folder / tag_of(old), ignore_errors=True)
    return target


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints that are there, in order."""
    folder = run / FOLDER
    found = (_TAG.match(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Path:
    """The checkpoint to go on from. Raises CheckpointNotFoundError, MalformedError."""
    path = run / FOLDER / LATEST
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointNotFoundError(
            f"{path} is not there: this run has saved no checkpoint; start it with `dsconv train`"
        ) from None
    found = path.parent / tag
    if not _TAG.match(tag) or not found.is_dir():
        raise MalformedError(
            f"{path} names {tag!r}, which is not there; those that are: {', '.join(map(tag_of, steps(run))) or 'none'}"
        )
    return found


def read_state(folder: Path) -> State:
    """The engine's part of a checkpoint. Raises MalformedError."""
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return State(found["step"], Position(**found["position"]), Layout(**found["layout"]), found["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MalformedError(
            f"{path} is not what the engine writes ({error}): the checkpoint cannot be resumed"
        ) from None


def randomness_path(folder: Path, rank: int) -> Path:
    return folder / f"rng-rank-{rank}.safetensors"
