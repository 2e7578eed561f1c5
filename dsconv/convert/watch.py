"""``watch``: merge and push each new checkpoint of a run, once each, while it trains.

What there is to do follows from the run's folder and a state file, so a watcher may be killed at any moment and started
again: a merge is whole or absent, a push of what the Hub has changes nothing, and a checkpoint counts as done when the
state file, replaced in one step, says so.

- A checkpoint that was saved is merged at once, whether or not the Hub can be reached. Merged copies wait in line, so
  that the trainer may delete its own. They are pushed in the order of saving.
- A checkpoint is taken when none of its files has changed between two checks. One that cannot be merged is reported,
  and tried again when its files, or the options of the watcher, have changed.
- Losses are reported: a checkpoint that was deleted before it could be merged, and a copy that had to make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.roots import as_path
from dsconv.checkpoint.storage.unfinished import STAGING
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.marked_folders import MarkedFolder
from dsconv.convert.merge import merge
from dsconv.convert.progress import Progress
from dsconv.convert.push import check_repo, open_api
from dsconv.convert.watch_events import (
    DROPPED,
    FAILED,
    LOST,
    MERGED,
    OLD,
    PUSHED,
    SEEN,
    WAITING,
    Event,
    Push,
    locked_home,
)
from dsconv.convert.watched_run import QUIET_SECONDS, Files, Signs, WatchedRun, files_of, gap_before, signs, step_in
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, MismatchError, OutputError, RemoteError
from dsconv.text import count
from dsconv.urls import local_path, where

STATE, COPY = "state.json", "merged-"
MAX_STATE_BYTES = 64 << 20
DEFAULT_KEEP = 3
NO_FILES = Files("", 0)
DONE = (PUSHED, OLD, DROPPED)


class Watcher:
    """Watches one run for one repository. ``options`` are keywords of ``merge``; ``locked_home`` gives ``home``."""

    def __init__(
        self,
        run: Path,
        home: MarkedFolder,
        repo: str,
        private: bool,
        options: dict[str, Any],
        keep: int = DEFAULT_KEEP,
    ) -> None:
        self.run = WatchedRun(run)
        self.repo = repo
        self.private = private
        self.options = options
        self.keep = keep
        self.home = home
        self._looked: dict[str, Files] = {}  # name → its files at the last look
        self._reported: dict[str, str] = {}  # name → why it waits, as was reported
        read = self._read_state()
        self._is_first_look = read is None
        self._pushing: Push | None = None
        self._state = read or {}
        self.pending = False  # whether something was seen that the next look will take
        self._remove_strays()

    def look(
        self,
        settled: bool = False,
        progress: Progress | None = None,
        signs: Signs | None = None,
        done: Callable[[], None] | None = None,
    ) -> Iterator[Event]:
        """Merge what is new, push what is merged, and yield what became of each checkpoint.

        Args:
            settled: Take the files as they are, without a second look at them.
            progress: Called with (phase, bytes done, bytes in all), from any thread.
            signs: Names of checkpoints that were saved since the last look, which may be gone by now.
            done: Called from another thread when a push has ended, and the next look will tell of it. A slow push does
                not keep a look from merging what is new then. Without it, a look waits for its pushes.

        Raises:
            OutputError: The state cannot be kept.
        """
        self.pending = False
        names = self.run.saved(self._state)
        is_first_look, self._is_first_look = self._is_first_look, False
        if is_first_look:  # ever: begin with the newest
            for name in names[:-1]:
                self._note(name, OLD, files_of(self.run.folder / name))
            self._save()
        for name in sorted(signs.take() if signs is not None else ()):
            if name not in self._state and not (self.run.folder / name).is_dir():
                self._note(name, SEEN, NO_FILES)
        yield from self._tell_lost()
        if not is_first_look:
            yield from self._tell_gaps(names)
        for name in names:
            if self._pushing is not None and name == self._pushing.name:
                continue
            files, key = files_of(self.run.folder / name), self._key()
            if not self._is_new(name, files, key):
                continue
            if self._state.get(name, {}).get("outcome") != MERGED:
                self._note(name, SEEN, files)
            if not settled and self._looked.get(name) != files:
                self._looked[name] = files
                self.pending = True
            if self.pending:  # what was saved later waits for its turn
                continue
            yield from self._make_room(self.keep, self._planned_bytes(name))
            event = self._merge(name, files, key, progress)
            if event is not None and self._is_new_report(event):
                yield event
            if event is not None and event.outcome == WAITING:
                break
            yield from self._make_room(self.keep)
        yield from self._push_line(progress, done)

    def unpushed(self) -> Event | None:
        """Return what is known of the newest checkpoint, if it is not pushed."""
        names = self.run.saved(self._state)
        known = self._state.get(names[-1], {}) if names else {}
        if not names or known.get("outcome") in (PUSHED, OLD):
            return None
        error = OutputError(str(known.get("error") or f"{self.run.folder / names[-1]} is not pushed yet"))
        return Event(names[-1], str(known.get("outcome", WAITING)), known.get("step"), error=error)

    def _is_new(self, name: str, files: Files, key: str) -> bool:
        known = self._state.get(name, {})
        outcome = known.get("outcome")
        if outcome in DONE:  # saved again, and not half deleted: that leaves no newer file
            return bool(known["files"] != files.digest and files.newest_ns > known.get("newest_ns", 0))
        if outcome == LOST and known["newest_ns"]:  # what is left of it is not a new one
            return bool(files.newest_ns > known["newest_ns"])
        if outcome in (FAILED, MERGED):
            return bool(known["files"] != files.digest or known.get("key") != key)
        return True

    def _key(self) -> str:
        """Return a digest of the options and of what the configuration's folder holds."""
        config = self.options.get("config_from")
        folder = where(config) if config else ""
        beside = files_of(folder).digest if isinstance(folder, Path) and folder.is_dir() else ""
        return hashlib.sha256(f"{sorted(self.options.items(), key=str)} {beside}".encode()).hexdigest()[:16]

    def _tell_lost(self) -> Iterator[Event]:
        for name, known in list(self._state.items()):
            if known["outcome"] != SEEN or (self.run.folder / name).is_dir():
                continue
            if "copy" in known and self._is_whole(known["copy"]):  # a watcher was killed right after it merged
                step = self._step_of(known["copy"], name)
                self._line_up(name, Files(known["files"], known["newest_ns"]), known["key"], known["copy"], step, 0.0)
            else:
                yield self._lose(name)

    def _tell_gaps(self, names: list[str]) -> Iterator[Event]:
        """Tell of checkpoints that must have come and gone while nobody watched, by the distances of the others."""
        for name in names:
            if name in self._state:
                continue
            for missed in gap_before(name, self._state):
                error = CheckpointNotFoundError(
                    f"{self.run.folder / missed} was not seen: if the run saved it, as it saved the others, it was"
                    " deleted while no watcher was at work"
                )
                self._note(missed, LOST, NO_FILES, error=str(error))
                yield Event(missed, LOST, error=error)
            self._note(name, SEEN, NO_FILES)

    def _lose(self, name: str, left: Files = NO_FILES) -> Event:
        """Note a loss; ``left`` is what is still there of a checkpoint that is being deleted."""
        error = CheckpointNotFoundError(f"{self.run.folder / name} was deleted before it could be merged")
        self._note(name, LOST, left, error=str(error))
        return Event(name, LOST, error=error)

    def _merge(self, name: str, files: Files, key: str, progress: Progress | None) -> Event | None:
        """Merge a checkpoint into a copy that waits in line; an event where that did not work."""
        began = time.monotonic()
        copy = COPY + hashlib.sha256(f"{name} {files.digest} {key}".encode()).hexdigest()[:16]
        output = self.home.path / copy
        try:
            path, tag = self.run.source(name)
            self.home.mark([copy])
            if not self._is_whole(copy):
                self.home.remove_marked(copy)
                if self._state.get(name, {}).get("outcome") != MERGED:
                    self._note(name, SEEN, files, copy=copy, key=key)
                merge(path, output, tag=tag, progress=progress, **self.options)
            step = self._step_of(copy, name)
        except (DsconvError, OSError) as error:
            now = files_of(self.run.folder / name)
            if now.digest != files.digest and now.newest_ns <= files.newest_ns:  # files went, and none came
                return self._lose(name, now)
            if isinstance(error, (OutputError, RemoteError)):  # of the disk, or of where --config-from is
                return Event(name, WAITING, error=error)
            self._note(name, FAILED, files, key=key, error=str(error))
            return Event(name, FAILED, error=error)
        known = self._state.get(name, {})
        if known.get("outcome") == MERGED and known["copy"] != copy:
            self.home.remove_marked(known["copy"])
        self._line_up(name, files, key, copy, step, time.monotonic() - began)
        return None

    def _step_of(self, copy: str, name: str) -> int | None:
        """Return the step that a merged copy knows, or else the one in the checkpoint's name."""
        step = json.loads((self.home.path / copy / MANIFEST).read_bytes())["source"]["step"]
        return step_in(name) if step is None else int(step)

    def _is_whole(self, copy: str) -> bool:
        output = self.home.path / copy
        return (output / MANIFEST).is_file() and not (output / STAGING).exists()

    def _line_up(self, name: str, files: Files, key: str, copy: str, step: int | None, seconds: float) -> None:
        """Put a copy at the end of the line."""
        nbytes = sum(path.stat().st_size for path in (self.home.path / copy).iterdir() if path.is_file())
        order = 1 + max((known.get("order", 0) for known in self._state.values()), default=0)
        facts = {"key": key, "copy": copy, "step": step, "nbytes": nbytes, "order": order, "seconds": round(seconds, 3)}
        self._note(name, MERGED, files, **facts)

    def _planned_bytes(self, name: str) -> int:
        """Return the size of what a checkpoint will be merged into, where copies wait that could make room for it."""
        if not self._waiting():
            return 0
        with contextlib.suppress(DsconvError, OSError):
            path, tag = self.run.source(name)
            return merge(path, self.home.path / COPY, tag=tag, dry_run=True, **self.options).nbytes
        return 0

    def _waiting(self) -> list[str]:
        """Return the names of the copies in line, in the order of merging."""
        state = self._state or {}
        return sorted((n for n, known in state.items() if known["outcome"] == MERGED), key=lambda n: state[n]["order"])

    def _make_room(self, keep: int, nbytes: int = 0) -> Iterator[Event]:
        """Drop the oldest copies until ``keep`` are left and the disk has ``nbytes`` free; yield what was dropped."""
        while waiting := self._waiting():
            idle = [name for name in waiting if self._pushing is None or name != self._pushing.name]
            if not idle or not (len(waiting) > keep or nbytes > shutil.disk_usage(self.home.path).free):
                return
            name = idle[0]
            why = f"more than {count(keep, 'copy')} waited (--keep)" if len(waiting) > keep else "the disk was full"
            error = OutputError(f"{name} was merged and could not be pushed; its copy was dropped, since {why}")
            known = self._state[name]
            self.home.remove_marked(known["copy"])
            self._note(name, DROPPED, Files(known["files"], known["newest_ns"]), step=known["step"], error=str(error))
            yield Event(name, DROPPED, known["step"], error=error)

    def _push_line(self, progress: Progress | None, done: Callable[[], None] | None) -> Iterator[Event]:
        """Push the copies in line. With ``done`` this does not wait: it is called when the push at work has ended."""
        while True:
            if self._pushing is None:
                waiting = self._waiting()
                if not waiting:
                    return
                self._pushing = Push(waiting[0], self.home.path / self._state[waiting[0]]["copy"])
                self._pushing.start(self.repo, self.private, progress, done)
            if done is not None and not self._pushing.result.done():
                return
            pushed, self._pushing = self._pushing, None
            event = self._pushed(pushed)
            if event.outcome != WAITING or self._is_new_report(event):
                yield event
            if event.outcome == WAITING:
                return

    def _pushed(self, pushed: Push) -> Event:
        """Wait for a push, note what became of it, and return that."""
        name, known = pushed.name, self._state[pushed.name]
        try:
            url = pushed.result.result()
        except MismatchError as error:  # the copy is damaged: merge again, if the source is still there
            self.home.remove_marked(known["copy"])
            self._note(name, SEEN, NO_FILES, error=str(error))
            return Event(name, WAITING, known["step"], error=error)
        except (DsconvError, OSError) as error:
            known["error"] = str(error)
            self._save()
            return Event(name, WAITING, known["step"], error=error)
        seconds = known.get("seconds", 0.0) + time.monotonic() - pushed.began
        self._note(name, PUSHED, Files(known["files"], known["newest_ns"]), step=known["step"], url=url)
        self.home.remove_marked(known["copy"])
        return Event(name, PUSHED, known["step"], url, nbytes=known["nbytes"], seconds=seconds)

    def _is_new_report(self, event: Event) -> bool:
        """Return whether what became of a checkpoint was not reported in these words yet."""
        new = self._reported.get(event.name) != str(event.error)
        self._reported[event.name] = str(event.error)
        return new or event.outcome != WAITING

    def _remove_strays(self) -> None:
        """Remove copies that nobody waits for: a watcher was killed while it merged, or after it pushed."""
        wanted = {known.get("copy") for known in self._state.values() if known["outcome"] in (SEEN, MERGED)}
        for name in self.home.names():
            if name.startswith(COPY) and name not in wanted:
                self.home.remove_marked(name)

    def _note(self, name: str, outcome: str, files: Files, **more: Any) -> None:
        """Write down what became of a checkpoint."""
        self._state[name] = {**more, "outcome": outcome, "files": files.digest, "newest_ns": files.newest_ns}
        self._save()

    def _read_state(self) -> dict[str, dict[str, Any]] | None:
        path = self.home.path / STATE
        try:
            state = json.loads(self.home.read(STATE, MAX_STATE_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise MalformedError(
                f"{path}: cannot be read ({error}); remove it to begin with the newest checkpoint"
            ) from None
        if not isinstance(state, dict) or not all(map(_is_known, state.values())):
            raise MalformedError(f"{path}: not a watcher's state; remove it to begin with the newest checkpoint")
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


# What is noted of a checkpoint, and of which type: these always, and these where they are there.
NOTED: dict[str, tuple[type, ...]] = {"outcome": (str,), "files": (str,), "newest_ns": (int,)}
NOTED_AT_TIMES: dict[str, tuple[type, ...]] = {
    "key": (str,), "copy": (str,), "step": (int, type(None)), "nbytes": (int,), "order": (int,),
    "seconds": (int, float), "url": (str, type(None)), "error": (str,),
}  # fmt: skip


def _is_known(item: Any) -> bool:
    """Return whether a watcher wrote down ``item`` of a checkpoint."""
    if not isinstance(item, dict) or not set(NOTED) <= set(item):
        return False
    kinds = NOTED | NOTED_AT_TIMES
    if any(type(value) not in kinds.get(key, (type(value),)) for key, value in item.items()):
        return False
    if item["outcome"] == MERGED:
        return {"key", "copy", "step", "nbytes", "order"} <= set(item)
    return "copy" not in item or "key" in item


def watch(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    interval_seconds: float = 30.0,
    once: bool = False,
    keep: int = DEFAULT_KEEP,
    on_event: Callable[[Event], None] = lambda event: None,
    on_message: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Event]:
    """Watch the save folder ``run`` and push each new checkpoint to ``repo``.

    Args:
        run: The folder in which the trainer saves: DeepSpeed's ``latest``, a Trainer's ``checkpoint-N``, or ``step-N``.
        repo: ``org/model``.
        private: Make the repository a private one, and refuse one that is there and public.
        interval_seconds: The longest time between two looks. A sign of the file system's brings the next look earlier.
        once: Push what is there, and return.
        keep: How many merged copies may wait for the Hub; beyond it the oldest is dropped, and reported.
        on_event: Called with what became of each checkpoint.
        on_message: Called with what is worth saying besides: that nothing is there yet, and why.
        progress: Called with (phase, bytes done, bytes in all), from any thread.
        options: Keywords of ``merge``: dtype, max_shard_size, exclude_frozen, adapter, config_from, workers.

    Returns:
        What became of each checkpoint, and of the newest in any case where it is not pushed. Only with ``once``:
        otherwise it does not return.

    Raises:
        DsconvError: CheckpointNotFoundError where ``run`` is no run's folder, or with ``once`` where ``latest`` names
            no checkpoint that is there, OutputError where another watcher is at work or its state cannot be kept,
            RemoteError where the Hub cannot be used at all (no token, offline), MissingPackageError where
            huggingface_hub is not installed.
        ValueError: ``repo`` is not written as a repository is.
    """
    check_repo(repo)
    folder = local_path(run, "the folder of a run that is watched")
    if options.get("config_from") is not None:
        as_path(options["config_from"])  # a URL that nothing reads will not become one
    watched = WatchedRun(folder)
    watched.check()
    open_api(repo)
    events = []
    said = ""
    with locked_home(folder, repo) as home, signs(folder) as seen:
        watcher = Watcher(folder, home, repo, private, options, keep)
        while True:
            why = watched.why_empty()
            lost = bool(why) and once and watched.names_one()
            if why and why != said and not lost:
                on_message(why)
            said = why
            for event in watcher.look(once, progress, seen, None if once else seen.wake):
                on_event(event)
                events.append(event)
            if lost:
                raise CheckpointNotFoundError(f"{why}: nothing was pushed")
            if once:
                rest = watcher.unpushed()
                if rest is not None and all(event.name != rest.name for event in events):
                    on_event(rest)
                    events.append(rest)
                return events
            events.clear()
            seen.wait(min(QUIET_SECONDS, interval_seconds) if watcher.pending else interval_seconds)
