"""What a watched run has saved, and when to look again.

A trainer says in one of three ways that a checkpoint is complete:

- DeepSpeed writes the tag into ``latest`` after all files of the tag (``runtime/engine.py`` ``save_checkpoint``).
- The Trainer writes ``checkpoint-N/trainer_state.json`` last (``Trainer._save_checkpoint``), with DeepSpeed or without.
- torch.distributed.checkpoint writes ``step-N/.metadata`` last; torchtitan's last step may be safetensors and an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.errors import CheckpointNotFoundError, MalformedError, UnsafeError
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import holds_states, read_latest, tags_in

TRAINER = re.compile(r"checkpoint-(\d+)")
STEP = re.compile(r"step-(\d+)")
STEP_IS_COMPLETE = (".metadata", "model.safetensors.index.json", "model.safetensors")
WRITTEN = ("created", "modified", "moved")  # events of watchdog's that are not of reading: the watcher itself reads
QUIET_SECONDS = 1.0  # after a sign of a new checkpoint, the next look comes so soon


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint: a digest of names, sizes and times, and the newest time in nanoseconds."""

    digest: str
    newest_ns: int


def files_of(folder: Path) -> Files:
    """Return what the files of a checkpoint are like now, or of any other folder."""
    found: list[str] = []
    paths: list[Path] = []
    newest = 0
    with contextlib.suppress(FileNotFoundError):  # a folder was deleted while we look
        paths = sorted(folder.rglob("*"))
    for path in paths:
        with contextlib.suppress(OSError):  # a link to nothing, or a file that is gone by now
            stat = path.stat()
            if not path.is_dir():  # the time of a folder changes when a file is removed
                newest = max(newest, stat.st_mtime_ns)
                found.append(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return Files(hashlib.sha256("\n".join(found).encode(errors="surrogateescape")).hexdigest(), newest)


class WatchedRun:
    """The folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Refuse what is no run's folder.

        Raises:
            CheckpointNotFoundError: it is missing, or is one checkpoint of a run.
        """
        if not self.folder.is_dir():
            raise CheckpointNotFoundError(
                f"{self.folder}: no such folder; watch the folder in which the trainer saves its checkpoints"
            )
        inside = TRAINER.fullmatch(self.folder.name) and (self.folder / "trainer_state.json").is_file()
        if inside or holds_states(self.folder) or (self.folder / ".metadata").is_file():
            raise CheckpointNotFoundError(
                f"{self.folder} is one checkpoint: watch the run's folder, {self.folder.absolute().parent}, or convert"
                " this one with dsconv merge --push-to-hub"
            )

    def names_one(self) -> bool:
        """Return whether a file ``latest`` names a checkpoint, which need not be there."""
        return (self.folder / "latest").is_file()

    def why_empty(self) -> str:
        """Say why nothing that was saved is found; "" where something is."""
        if self.saved(()):
            return ""
        if not (self.folder / "latest").is_file():
            return (
                f"{self.folder} holds no complete checkpoint yet: neither 'latest', nor checkpoint-N with"
                " trainer_state.json, nor step-N with .metadata"
            )
        try:
            tag = read_latest(self.folder / "latest")
        except (MalformedError, OSError) as error:
            return str(error)
        return f"{self.folder / 'latest'} names {quote(tag)}, and no checkpoint of that name is there"

    def saved(self, order: Iterable[str]) -> list[str]:
        """Return the names of the complete checkpoints, in the order of saving; the newest is the last.

        Args:
            order: names in the order in which they were first seen, for names without a number.
        """
        with contextlib.suppress(OSError):  # a folder went away under us
            if (self.folder / "latest").is_file():
                return self._tags(list(order))
            found = [path for path in self.folder.iterdir() if self._is_complete(path)]
            return [path.name for path in sorted(found, key=lambda path: _number(path.name) or 0)]
        return []

    def _is_complete(self, path: Path) -> bool:
        if TRAINER.fullmatch(path.name):
            return (path / "trainer_state.json").is_file()
        return bool(STEP.fullmatch(path.name)) and any((path / name).is_file() for name in STEP_IS_COMPLETE)

    def _tags(self, order: list[str]) -> list[str]:
        try:
            latest = read_latest(self.folder / "latest")
        except MalformedError:
            return []
        tags = tags_in(self.folder)
        if latest not in tags:  # not there yet, or half written
            return []
        last = _number(latest)
        # A larger number is one that is still being written, or what a run that went back has not reached again.
        before = [tag for tag in tags if tag != latest and (last is None or (_number(tag) or 0) < last)]
        seen = {name: position for position, name in enumerate(order)}
        before.sort(key=lambda tag: (_number(tag) or 0, seen.get(tag, len(seen))))
        return [*before, latest]

    def source(self, name: str) -> tuple[Path, str | None]:
        """Return the path and the tag with which ``merge`` opens a checkpoint.

        Raises:
            UnsafeError: its folder is a link that leaves the run: what it leads to would be pushed.
        """
        if (self.folder / "latest").is_file():
            return self.folder, name
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UnsafeError(
                f"{path}: a link that leaves the run, to {path.resolve()}; what it leads to is not pushed"
            )
        return path, None


def gap_before(name: str, known: Iterable[str]) -> list[str]:
    """Return the names of checkpoints that should have come before ``name`` and are not known.

    They are found where the last three checkpoints are equally far apart, and ``name`` is further away by a multiple.

    Args:
        name: A new checkpoint.
        known: The names of all that were seen before it.
    """
    stem, written = _parted(name)
    same = [text for other, text in map(_parted, known) if other == stem and text]
    before = sorted(int(text) for text in same if written and int(text) < int(written))
    if len(before) < 3:
        return []
    first, second, third = before[-3:]
    step, number = third - second, int(written)
    if not step or second - first != step or (number - third) % step:
        return []
    width = len(written) if any(text.startswith("0") for text in (*same, written)) else 0
    return [stem.replace("#", str(missed).zfill(width)) for missed in range(third + step, number, step)]


def step_in(name: str) -> int | None:
    """Return the training step that a name of the Trainer's or of torchtitan's states."""
    found = TRAINER.fullmatch(name) or STEP.fullmatch(name)
    return None if found is None else int(found[1])


def _parted(name: str) -> tuple[str, str]:
    """Return a name with ``#`` in place of its last number, and that number as it is written; "" for none."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", name, re.DOTALL)
    return (f"{found[1]}#{found[3]}", found[2]) if found else (name, "")


def _number(name: str) -> int | None:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


class Signs:
    """Signs of new checkpoints, from the file system's own events where watchdog is installed.

    They wake the watcher before its interval is over, and name checkpoints that came and went between two looks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._woken = threading.Event()
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def take(self) -> set[str]:
        """Return the names of checkpoints that were saved since the last call."""
        with self._lock:
            names, self._names = self._names, set()
        return names

    def wait(self, seconds: float) -> None:
        """Wait for a sign, for ``seconds`` at most, and then until the writer has had a moment of quiet."""
        if self._woken.wait(seconds):
            self._woken.clear()
            time.sleep(min(QUIET_SECONDS, seconds))

    def wake(self) -> None:
        """End the wait of another thread."""
        self._woken.set()

    def dispatch(self, event: Any) -> None:
        """Take an event of watchdog's."""
        if event.event_type not in WRITTEN:
            return
        for path in filter(None, (event.src_path, getattr(event, "dest_path", ""))):
            name = Path(str(path)).name
            if name == "latest":
                with contextlib.suppress(OSError, MalformedError):
                    self._add(read_latest(self._folder / "latest"))
            elif TRAINER.fullmatch(name) or STEP.fullmatch(name):
                self._woken.set()

    def _add(self, name: str) -> None:
        if name:
            with self._lock:
                self._names.add(name)
            self._woken.set()


@contextlib.contextmanager
def signs(folder: Path) -> Iterator[Signs]:
    """Follow the events of ``folder`` itself, not of what lies deeper, while the context is open."""
    found = Signs(folder)
    try:
        from watchdog.observers import Observer
    except ImportError:
        yield found
        return
    # An observer that stops while an event comes logs that it is inactive; without a handler, Python prints it.
    logging.getLogger("watchdog").addHandler(logging.NullHandler())
    observer = Observer()
    observer.schedule(found, str(folder))  # type: ignore[arg-type]  # dispatch is all that is called
    try:
        observer.start()
    except OSError:  # the system has no watches left: looks at intervals go on
        yield found
        return
    try:
        yield found
    finally:
        observer.stop()
        observer.join()
