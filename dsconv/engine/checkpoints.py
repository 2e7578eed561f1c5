"""RUN/checkpoints: each checkpoint is whole or absent, and ``latest`` names the last whole one.

A checkpoint is written into a hidden folder, synced, renamed, and only then named by ``latest``. A run that is killed
during a save therefore resumes from the checkpoint before. The folder is a DeepSpeed save dir (``latest`` holds a tag),
so every tool that reads one reads it.
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
from dsconv.engine.files import sync, write_file
from dsconv.engine.options import Layout
from dsconv.errors import CheckpointNotFoundError, MalformedError, OutputError

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "engine.json"
PARTIAL = ".partial"
_TAG = re.compile(r"step-(\d+)\Z")


@dataclass
class State:
    """What the engine saves besides weights and optimizer, in RUN/checkpoints/TAG/engine.json."""

    step: int
    position: Position = field(default_factory=Position)
    layout: Layout = field(default_factory=Layout)
    model: dict[str, Any] = field(default_factory=dict)  # sizes that identify the model


def tag_of(step: int) -> str:
    """Return the tag of a step's checkpoint."""
    return f"step-{step:08d}"


def begin(run: Path) -> Path:
    """Return an empty folder for the next checkpoint, without what a killed save left there. One rank calls it."""
    partial = run / FOLDER / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial} cannot be created: {error.strerror}") from None
    return partial


def abandon(run: Path) -> None:
    """Remove what a failed save has written. Never raises."""
    shutil.rmtree(run / FOLDER / PARTIAL, ignore_errors=True)


def write_state(folder: Path, state: State) -> None:
    """Write FOLDER/engine.json. Raises OutputError."""
    write_file(folder / STATE, json.dumps(asdict(state), indent=1).encode() + b"\n")


def commit(run: Path, step: int, keep: int) -> Path:
    """Sync what was written for ``step``, move it into place and name it in ``latest``.

    Of the checkpoints of earlier steps ``keep`` - 1 stay; all of them if ``keep`` is 0. Those of later steps stay too:
    a run that went back to an earlier checkpoint replaces them when it gets there. One rank calls this once all have
    written. Raises OutputError.
    """
    folder = run / FOLDER
    written, target = folder / PARTIAL / tag_of(step), folder / tag_of(step)
    try:
        for root, _, names in os.walk(written):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))
        if target.exists():  # the run reached this step before; `latest` still names an earlier one
            shutil.rmtree(target)
        written.rename(target)
        sync(folder)
    except OSError as error:
        raise OutputError(
            f"{target}: the checkpoint cannot be written: {error.strerror}; `latest` still names the one before"
        ) from None
    write_file(folder / LATEST, target.name.encode())
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    if keep:
        for old in [taken for taken in steps(run) if taken <= step][:-keep]:  # later ones are another branch's
            shutil.rmtree(folder / tag_of(old), ignore_errors=True)
    return target


def steps(run: Path) -> list[int]:
    """Return the steps whose checkpoints exist, in order."""
    folder = run / FOLDER
    found = (_TAG.match(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Path:
    """Return the checkpoint to resume from. Raises CheckpointNotFoundError or MalformedError."""
    path = run / FOLDER / LATEST
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointNotFoundError(
            f"{path} does not exist: this run has saved no checkpoint; start it with `dsconv train`"
        ) from None
    found = path.parent / tag
    if not _TAG.match(tag) or not found.is_dir():
        raise MalformedError(
            f"{path} names {tag!r}, which does not exist; there are: {', '.join(map(tag_of, steps(run))) or 'none'}"
        )
    return found


def read_state(folder: Path) -> State:
    """Return the engine's part of a checkpoint. Raises MalformedError."""
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return State(found["step"], Position(**found["position"]), Layout(**found["layout"]), found["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MalformedError(
            f"{path} was not written by dsconv's engine ({error}): the checkpoint cannot be resumed"
        ) from None


def randomness_path(folder: Path, rank: int) -> Path:
    """Return the file for a rank's random generators."""
    return folder / f"rng-rank-{rank}.safetensors"
