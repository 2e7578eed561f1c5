"""What a watcher tells of, a push at work, and the folder in which a watcher keeps its state."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from dsconv.convert.folders import opened
from dsconv.convert.marked_folders import MarkedFolder, open_marked
from dsconv.convert.progress import Progress
from dsconv.convert.push import push
from dsconv.errors import OutputError

HOME = ".dsconv-watch"
PUSHED, OLD, FAILED, WAITING = "pushed", "was there before", "failed", "waiting"
SEEN, MERGED, LOST, DROPPED = "seen", "merged", "lost", "dropped"


@dataclass(frozen=True)
class Event:
    """What became of a checkpoint.

    Attributes:
        name: The name of its folder in the run.
        outcome: ``pushed``; ``waiting`` (it is tried again); ``failed`` (it is tried again when its files or the
            options change); ``lost`` (it went away before it was merged); ``dropped`` (its copy had to make room).
        step: The training step, once it is known.
        url: The address of the commit, of what was pushed.
        error: Why it was not pushed.
        nbytes: Bytes that were merged.
        seconds: The time that merging and pushing took.
    """

    name: str
    outcome: str
    step: int | None = None
    url: str | None = None
    error: Exception | None = None
    nbytes: int = 0
    seconds: float = 0.0


class Push:
    """A push at work in a thread of its own, which the end of the process does not wait for."""

    def __init__(self, name: str, copy: Path) -> None:
        self.name = name
        self.copy = copy
        self.began = time.monotonic()
        self.result: Future[str | None] = Future()

    def start(
        self, repo: str, private: bool, progress: Progress | None, done: Callable[[], None] | None = None
    ) -> None:
        """Begin to push the copy; ``result`` gets the address of the commit."""

        def run() -> None:
            try:
                self.result.set_result(push(self.copy, repo, private=private, progress=progress).url)
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                self.result.set_exception(error)
            if done is not None:
                done()

        if done is None:
            run()
        else:
            threading.Thread(target=run, daemon=True).start()


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
            raise OutputError(f"{run}: another watcher pushes this run to {repo}; stop it first, or leave it running")
        with home:
            yield home
