"""``watch``: merge and push each new checkpoint of a DeepSpeed run, once each, while it trains.

What there is to do follows from the run's folder and a state file, so a watcher may be killed at any moment and started
again: a merge is whole or absent, a push of what the Hub has changes nothing, and a checkpoint counts as done when the
state file, replaced in one step, says so.

- ``latest`` names the newest checkpoint that the trainer calls saved; of a Trainer's ``checkpoint-N``, those count that
  have ``latest`` and ``trainer_state.json``, which is written last (transformers ``Trainer._save_checkpoint``).
- A checkpoint is taken when none of its files has changed between two looks. One that cannot be merged is reported, and
  tried again when its files have changed: an asynchronous writer, or another host, may still have been at it.
- What fails for want of the Hub or of disk space is reported once and tried again at each look, in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.convert.folders import opened
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.marked_folders import MarkedFolder, open_marked
from dsconv.convert.merge import merge
from dsconv.convert.progress import Progress
from dsconv.convert.push import check_repo, open_api, push
from dsconv.convert.staging import STAGING
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, MismatchError, OutputError
from dsconv.zero_utils.files import read_latest, tags_in

HOME = ".dsconv-watch"
STATE, MERGED = "state.json", "merged"
MAX_STATE_BYTES = 64 << 20
PUSHED, OLD, FAILED, WAITING = "pushed", "was there before", "failed", "waiting"
TRAINER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Event:
    """What became of a checkpoint: it was ``pushed``, ``failed`` (until its files change) or is ``waiting`` (to be
    tried
    again).
    """

    name: str
    outcome: str
    step: int | None = None
    url: str | None = None
    error: Exception | None = None


class Watcher:
    """Watches one run for one repository. ``options`` are keywords of ``merge``; ``locked_home`` gives ``home``."""

    def __init__(self, run: Path, home: MarkedFolder, repo: str, private: bool, options: dict[str, Any]) -> None:
        self.run = run
        self.repo = repo
        self.private = private
        self.options = options
        self.home = home
        self._seen: dict[str, str] = {}  # name → its files at the last look
        self._told: dict[str, str] = {}  # name → why it waits, as was reported
        self._state = self._read_state()

    def look(self, settled: bool = False, progress: Progress | None = None) -> Iterator[Event]:
        """Merge and push what is new, in order, and yield what became of each.

        Args:
            settled: take the files as they are, without a second look at them.
            progress: called with (phase, bytes done, bytes in all), from any thread.

        Raises:
            OutputError: the state cannot be kept.
        """
        for name in self._new():
            files = fingerprint(self.run / name)
            known = self._known(name)
            if known.get("outcome") == FAILED and known["files"] == files:
                continue
            if not settled and self._seen.get(name) != files:
                self._seen[name] = files
                return
            event = self._take(name, files, progress)
            if event.outcome == WAITING:
                if self._told.get(name) != str(event.error):
                    self._told[name] = str(event.error)
                    yield event
                return
            self._note(event, files)
            self._clear()
            yield event

    def _new(self) -> list[str]:
        """Return what is not done, in the order of saving, up to the newest that the trainer calls saved."""
        try:
            saved = self._saved()
        except OSError:  # a folder went away under us
            return []
        if self._state is None:  # the first look ever: begin with the newest
            self._state = {name: {"outcome": OLD, "files": fingerprint(self.run / name)} for name in saved[:-1]}
            self._save()
        new = [name for name in saved if self._known(name).get("outcome") not in (PUSHED, OLD)]
        # A run that went back to an earlier step saves under the same name again: that is a new checkpoint.
        if saved and saved[-1] not in new and self._known(saved[-1])["files"] != fingerprint(self.run / saved[-1]):
            new.append(saved[-1])
        return new

    def _saved(self) -> list[str]:
        if not (self.run / "latest").is_file():
            names = [path.name for path in self.run.iterdir() if TRAINER.fullmatch(path.name)
                     and (path / "latest").is_file() and (path / "trainer_state.json").is_file()]  # fmt: skip
            return sorted(names, key=lambda name: int(name.rpartition("-")[2]))
        tags = tags_in(self.run)
        try:
            latest = read_latest(self.run / "latest")
        except MalformedError:
            return []
        if latest not in tags:  # not there yet, or half written
            return []
        times = {tag: max(path.stat().st_mtime_ns for path in (self.run / tag).iterdir()) for tag in tags}
        order = sorted(tags, key=lambda tag: times[tag])  # where times are equal, by number
        return order[: order.index(latest) + 1]

    def _take(self, name: str, files: str, progress: Progress | None) -> Event:
        wanted = hashlib.sha256(f"{files} {sorted(self.options.items())}".encode()).hexdigest()[:16]
        output = self.home.path / MERGED / f"{name}-{wanted}"
        tag = None if TRAINER.fullmatch(name) and (self.run / name / "latest").is_file() else name
        step = None
        try:
            if not (output / MANIFEST).is_file() or (output / STAGING).exists():
                self._clear()  # of another checkpoint, or half put into place
                self.home.mark([MERGED])
                self.home.inner(MERGED, make=True).close()
                merge(self.run if tag else self.run / name, output, tag=tag, progress=progress, **self.options)
        except OutputError as error:
            return Event(name, WAITING, error=error)
        except (DsconvError, OSError) as error:
            gone = CheckpointNotFoundError(f"{self.run / name} was taken away before it could be merged")
            return Event(name, FAILED, error=error if (self.run / name).is_dir() else gone)
        try:
            step = json.loads((output / MANIFEST).read_bytes())["source"]["step"]
            report = push(output, self.repo, private=self.private, progress=progress)
        except (DsconvError, OSError) as error:
            if isinstance(error, MismatchError):
                self._clear()  # to be merged again
            return Event(name, WAITING, step, error=error)
        return Event(name, PUSHED, step, report.url)

    def _clear(self) -> None:
        """Remove what was merged. Raises OutputError."""
        try:
            self.home.remove_marked(MERGED)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.home.path / MERGED}: cannot be removed: {error.strerror}") from None

    def _known(self, name: str) -> dict[str, Any]:
        return (self._state or {}).get(name, {})

    def _note(self, event: Event, files: str) -> None:
        state = self._state = self._state or {}
        noted = {"outcome": event.outcome, "files": files, "step": event.step, "url": event.url}
        state[event.name] = noted if event.error is None else {**noted, "error": str(event.error)}
        self._save()

    def _read_state(self) -> dict[str, dict[str, Any]] | None:
        path = self.home.path / STATE
        try:
            state = json.loads(self.home.read(STATE, MAX_STATE_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise MalformedError(
                f"{path}: cannot be read ({error}); take it away to begin with the newest checkpoint"
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(item, dict) and {"outcome", "files"} <= set(item) for item in state.values()
        ):
            raise MalformedError(f"{path}: not a watcher's state; take it away to begin with the newest checkpoint")
        return state

    def _save(self) -> None:
        try:
            self.home.mark([STATE, f"{STATE}.new"])
            self.home.remove_marked(f"{STATE}.new")  # of a watcher that was killed
            self.home.replace_file(STATE, json.dumps(self._state, indent=1).encode(), f"{STATE}.new")
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.home.path / STATE}: cannot be written: {error.strerror}") from None


def watch(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    interval_seconds: float = 30.0,
    once: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Event]:
    """Watch the save folder ``run`` and push each new checkpoint to ``repo``.

    Args:
        run: the folder in which the trainer writes ``latest``.
        repo: ``org/model``.
        private: make the repository a private one, and refuse one that is there and public.
        interval_seconds: the time between two looks.
        once: push what is there, and return.
        on_event: called with what became of each checkpoint.
        progress: called with (phase, bytes done, bytes in all), from any thread.
        options: keywords of ``merge``: dtype, max_shard_size, exclude_frozen, adapter, config_from, workers.

    Returns:
        What became of each checkpoint. Only with ``once``: otherwise it does not return.

    Raises:
        DsconvError: OutputError where another watcher is at work or its state cannot be kept, RemoteError where the Hub
            cannot be used at all (no package, no token, offline).
        ValueError: ``repo`` is not written as a repository is.
    """
    check_repo(repo)
    folder = Path(run)
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"{folder}: no such folder; what is watched is a run's save dir, where 'latest' is written"
        )
    open_api(repo)
    events = []
    with locked_home(folder, repo) as home:
        watcher = Watcher(folder, home, repo, private, options)
        while True:
            for event in watcher.look(settled=once, progress=progress):
                on_event(event)
                events.append(event)
            if once:
                return events
            events.clear()
            time.sleep(interval_seconds)


def fingerprint(folder: Path) -> str:
    """Return a digest of the names, sizes and times of a checkpoint's files, which changes when one was written to."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # taken away while we look
        for path in sorted(folder.rglob("*")):
            stat = path.stat()
            found.append(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


@contextlib.contextmanager
def locked_home(run: Path, repo: str) -> Iterator[MarkedFolder]:
    """Open the watcher's own folder in ``run`` and hold its lock, which the system takes back when the process ends.

    Raises:
        OutputError: another watcher has the lock, or the folder cannot be written to or is not dsconv's own.
    """
    name = repo.replace("/", "--")
    with opened(run) as folder:
        try:
            with folder.inner(HOME, make=True) as shelf:
                home = open_marked(shelf, name)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{run / HOME / name}: cannot be written to, and what was pushed is noted there: {error.strerror}"
            ) from None
        if home is None:
            raise OutputError(f"{run}: another watcher pushes this run to {repo}; end it first, or leave it at work")
        with home:
            yield home
