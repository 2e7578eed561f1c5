"""RUN/checkpoints: each checkpoint is whole or absent, and ``latest`` names the last whole one.

A checkpoint is written into a hidden folder, synced, renamed, and only then named by ``latest``. A run that is killed
during a save therefore resumes from the checkpoint before. The folder is a DeepSpeed save dir (``latest`` holds a tag),
so every tool that reads one reads it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.storage.roots import PathRoot
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.convert.folders import Folder, opened
from dsconv.convert.marked_folders import ALL, MarkedFolder, open_marked
from dsconv.engine.data import Position
from dsconv.engine.files import check_types, read_object, write_file
from dsconv.engine.options import Layout
from dsconv.errors import CheckpointNotFoundError, MalformedError, OutputError
from dsconv.text import quote

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "engine.json"
PARTIAL = ".partial"
UNIVERSAL = ".universal"
MAX_LATEST_BYTES = 4096
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
    """Return an empty folder for the next checkpoint. One rank calls it.

    What a killed save left there is removed.

    Raises:
        OutputError: the folder is a link or was not made by the engine, or the system refuses.
    """
    return _make_hidden(run, PARTIAL)


def abandon(run: Path) -> None:
    """Remove what a failed save has written. Never raises."""
    _remove_hidden(run, PARTIAL)


def begin_universal(run: Path, name: str) -> Path:
    """Return the path of a universal checkpoint that is made for this run's ranks, in an empty hidden folder."""
    return _make_hidden(run, UNIVERSAL) / name


def end_universal(run: Path) -> None:
    """Remove the universal checkpoint of ``begin_universal``. Never raises."""
    _remove_hidden(run, UNIVERSAL)


def write_state(folder: Path, state: State) -> None:
    """Write FOLDER/engine.json. Raises OutputError."""
    write_file(folder / STATE, json.dumps(asdict(state), indent=1).encode() + b"\n")


def commit(run: Path, step: int, keep: int) -> Path:
    """Sync what was written for ``step``, move it into place and name it in ``latest``.

    Of the checkpoints of earlier steps ``keep`` - 1 stay; all of them if ``keep`` is 0. Those of later steps stay too:
    a run that went back to an earlier checkpoint replaces them when it gets there. One rank calls this once all have
    written. Raises OutputError.
    """
    tag = tag_of(step)
    target = run / FOLDER / tag
    try:
        with _hidden(run, PARTIAL) as (folder, partial):
            partial.sync_below(files=True)
            _remove_checkpoint(folder, tag)  # the run reached this step before; `latest` still names an earlier one
            partial.rename(tag, folder, tag)
            folder.sync()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{target}: the checkpoint cannot be written: {error.strerror}; `latest` still names the one before"
        ) from None
    write_file(run / FOLDER / LATEST, tag.encode())
    _remove_hidden(run, PARTIAL)
    if keep:
        earlier = [taken for taken in steps(run) if taken <= step]  # later ones are another branch's
        with opened(run) as root, root.inner(FOLDER) as folder:
            for old in earlier[:-keep]:
                with contextlib.suppress(OSError):  # what is not the engine's own, or cannot be removed, stays
                    _remove_checkpoint(folder, tag_of(old))
    return target


def _remove_checkpoint(folder: Folder, tag: str) -> None:
    """Remove a checkpoint of the engine's, if it is there.

    Raises:
        OutputError: it is a link or something else that the engine did not save.
        OSError: the system refuses.
    """
    if folder.stat(tag) is None:
        return
    with folder.inner(tag) as checkpoint:
        if checkpoint.stat(STATE) is None:
            raise OutputError(f"{checkpoint.path} is no checkpoint of the engine (no {STATE} in it): move it away")
    folder.remove(tag)


@contextlib.contextmanager
def _hidden(run: Path, name: str) -> Iterator[tuple[Folder, MarkedFolder]]:
    """Open RUN/checkpoints, and the hidden folder ``name`` in it. Raises OutputError or OSError."""
    with opened(run, make=True) as root, root.inner(FOLDER, make=True) as folder:
        hidden = open_marked(folder, name)
        if hidden is None:
            raise OutputError(f"{folder.path / name}: another process is at work there")
        with hidden:
            yield folder, hidden


def _make_hidden(run: Path, name: str) -> Path:
    try:
        with _hidden(run, name) as (_, hidden):
            hidden.clear()
            hidden.mark([ALL])
            return hidden.path
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{run / FOLDER / name} cannot be created: {error.strerror}") from None


def _remove_hidden(run: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        if (run / FOLDER / name).is_dir():
            with _hidden(run, name) as (_, hidden):
                hidden.end()


def steps(run: Path) -> list[int]:
    """Return the steps whose checkpoints exist, in order."""
    folder = run / FOLDER
    found = (_TAG.match(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Path:
    """Return the checkpoint to resume from. Raises CheckpointNotFoundError or MalformedError."""
    path = run / FOLDER / LATEST
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path} does not exist: this run has saved no checkpoint; start it with `dsconv train`"
        )
    tag = read_small(path, MAX_LATEST_BYTES).decode(errors="replace").strip()
    found = path.parent / tag
    if not _TAG.match(tag) or not found.is_dir():
        raise MalformedError(
            f"{path} names {quote(tag)}, which does not exist; there are:"
            f" {', '.join(map(tag_of, steps(run))) or 'none'}"
        )
    return found


def require_harmless(run: Path, checkpoint: Path) -> None:
    """Read every ``.pt`` file of a checkpoint, before DeepSpeed does: it would run what one of them names.

    torch's own ``.metadata`` is read by ``native_state.load`` before torch does.

    Raises:
        UnsafeError: A file asks to run code, or a link leaves the run's folder.
        DsconvError: A file was not written by torch.save.
    """
    for path in sorted(PathRoot(run).path.joinpath(checkpoint.relative_to(run)).rglob("*.pt")):
        TorchFile(path, may_hold_unread=True)


def read_state(folder: Path) -> State:
    """Return the engine's part of a checkpoint. Raises MalformedError."""
    path = folder / STATE
    try:
        found = read_object(path)
        for kind, values in ((State, found), (Position, found["position"]), (Layout, found["layout"])):
            check_types(path, kind, values)
        return State(found["step"], Position(**found["position"]), Layout(**found["layout"]), dict(found["model"]))
    except (CheckpointNotFoundError, OSError, ValueError, TypeError, KeyError) as error:
        raise MalformedError(
            f"{path} was not written by dsconv's engine ({error}): the checkpoint cannot be resumed"
        ) from None


def randomness_path(folder: Path, rank: int) -> Path:
    """Return the file for a rank's random generators."""
    return folder / f"rng-rank-{rank}.safetensors"
