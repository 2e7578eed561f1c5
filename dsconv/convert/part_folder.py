"""The hidden folder in which the parts of one output meet, and what is agreed on there.

Nothing else passes between the processes. Each holds the folder's lock together with the others while it writes, so
that a run of another kind, which wants the lock for itself, refuses to start. The first one marks the names of all
files, and then writes ``PARTS``: what all parts must agree on. A process whose terms differ is refused. A part that is
done leaves a file of its own (``part_mark``), in one rename, with the checksums of what it read and wrote.

Who finds that all parts are done waits for the lock alone, and puts the output into place. The folder is gone by that,
so the next one that waited finds nothing to do: it happens once. A process that is killed loses its locks. What it
wrote is written again, in the same places, by the next process that is given the same part.

Whoever removes the files removes ``PARTS`` before all of them: without it, nothing else in the folder counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.unfinished import PARTS, STAGING, STARTED, part_mark
from dsconv.convert.folders import Folder
from dsconv.convert.marked_folders import MarkedFolder, open_marked, open_shared
from dsconv.convert.staging import Move, Staging, conclude
from dsconv.errors import OutputError

WAIT_SECONDS = 10.0  # for another process that sets the folder up, which takes milliseconds
POLL_SECONDS = 0.02
MAX_PARTS_BYTES = 1 << 20
MAX_MARK_BYTES = 1 << 30


@dataclass(frozen=True)
class Terms:
    """What all parts of an output agree on. ``of`` is how many there are; the others are text and digests."""

    of: int
    version: str
    source: str
    settings: str
    plan: str

    def difference(self, other: Terms) -> str:
        """Return what is different about ``other``, the process that comes later; "" for nothing."""
        if self.version != other.version:
            return f"it was begun by dsconv {self.version}, and this is {other.version}"
        if self.of != other.of:
            return f"it is written in {self.of} parts, and this is one of {other.of}"
        if self.source != other.source:
            return "its source is another one, or was written to since"
        if self.settings != other.settings:
            return "it was begun with other options"
        return "it has another plan" if self.plan != other.plan else ""

    @staticmethod
    def read(hidden: Folder) -> Terms | None:
        """Return the terms of the parts in a hidden folder; None where there are none, or the output was moved."""
        if hidden.stat(STARTED) is not None:
            return None
        try:
            found = json.loads(hidden.read(PARTS, MAX_PARTS_BYTES))
            terms = Terms(**found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise OutputError(f"{hidden.path / PARTS}: cannot be read ({error}): remove {hidden.path}") from None
        return terms


@dataclass(frozen=True)
class Meeting:
    """Where the parts of an output meet, and how.

    Attributes:
        target: the folder of the output.
        terms: what they agree on.
        names: of all that they put into the hidden folder.
        check: raises OutputError where the output must not go into the target, or does not fit.
        placed: tells whether this very output is in the target, put there by its parts.
        sync: have everything on the disk.
    """

    target: Path
    terms: Terms
    names: tuple[str, ...]
    check: Callable[[], object]
    placed: Callable[[], bool]
    sync: bool

    @contextlib.contextmanager
    def joined(self) -> Iterator[tuple[Folder, MarkedFolder] | None]:
        """Open the target and its hidden folder together with the other parts, which set it up if need be.

        Yields:
            Both; None where another process has put the output in place while this one waited.

        Raises:
            OutputError: a run of another kind is at work there, or parts of another output lie there.
        """
        with contextlib.ExitStack() as stack:
            yield self._join(stack)

    def _join(self, stack: contextlib.ExitStack) -> tuple[Folder, MarkedFolder] | None:
        deadline = time.monotonic() + WAIT_SECONDS
        complete = False
        while True:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
                folder = opened.enter_context(Folder.open(self.target, make=True))
                if folder.stat(STAGING) is None and (complete or self.placed()):
                    return None
                hidden = open_shared(folder, STAGING)
                if hidden is not None and _or_closed(hidden, self._agreed):
                    opened.enter_context(hidden)
                    stack.enter_context(opened.pop_all())
                    return folder, hidden
                if self._set_up(folder):
                    continue
                with folder.inner(STAGING) as busy:
                    moving = busy.stat(STARTED) is not None
                    complete = moving or (Terms.read(busy) == self.terms and not self.missing(busy))
            if not complete and time.monotonic() > deadline:
                raise OutputError(
                    f"{self.target}: another dsconv run is writing here; wait for it or choose another folder"
                )
            time.sleep(POLL_SECONDS)

    def _agreed(self, hidden: MarkedFolder) -> bool:
        """Return whether the folder is set up. Raises OutputError where it is on other terms."""
        found = Terms.read(hidden)
        if found is not None and (difference := found.difference(self.terms)):
            done = [number for number in range(1, found.of + 1) if hidden.stat(part_mark(number)) is not None]
            raise OutputError(
                f"{hidden.path} holds another output that is written in parts ({len(done)} of {found.of} are done):"
                f" {difference}. Finish that one by its own command, or remove {hidden.path}"
            )
        return found is not None

    def _set_up(self, folder: Folder) -> bool:
        """Set the hidden folder up, or find it so. Returns False where other processes have its lock."""
        hidden = open_marked(folder, STAGING)
        if hidden is None:
            return False
        with hidden:
            move = Move.read(hidden)
            if move is not None:
                Staging(folder, hidden, self.sync).finish_or_say(move)
            if self._agreed(hidden):
                return True
            if self.placed():
                hidden.end()
                return True
            hidden.clear()
            try:
                self.check()
                hidden.mark([*self.names, PARTS, f"{PARTS}.new"])
                if self.sync:
                    hidden.sync_marks()
                put(hidden, PARTS, json.dumps(asdict(self.terms)).encode(), self.sync)
            except BaseException:
                with contextlib.suppress(OSError):
                    abandon(hidden)
                raise
        return True

    @contextlib.contextmanager
    def claimed(self, hidden: MarkedFolder, number: int) -> Iterator[None]:
        """Have a part to oneself. Raises OutputError where another process is writing it."""
        lock = hidden.open_file(part_lock(number), os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{self.target}: part {number}/{self.terms.of} is being written by another process: give each a"
                    " part of its own"
                ) from None
            yield
        finally:
            os.close(lock)

    def missing(self, hidden: Folder) -> tuple[int, ...]:
        """Return the numbers of the parts that are not done."""
        there = set(hidden.names())
        return tuple(number for number in range(1, self.terms.of + 1) if part_mark(number) not in there)

    @contextlib.contextmanager
    def alone(self) -> Iterator[tuple[Folder, MarkedFolder] | None]:
        """Wait until no other part is at work, and have the folder to oneself.

        Yields:
            The target and its hidden folder, in which all parts are done; None where another process has put them in
            place meanwhile.

        Raises:
            OutputError: files that were being moved cannot be.
        """
        with contextlib.ExitStack() as stack:
            yield self._take(stack)

    def _take(self, stack: contextlib.ExitStack) -> tuple[Folder, MarkedFolder] | None:
        while True:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
                folder = opened.enter_context(Folder.open(self.target))
                if folder.stat(STAGING) is None:
                    return None
                hidden = open_marked(folder, STAGING)
                if hidden is not None:
                    opened.enter_context(hidden)
                    terms = Terms.read(hidden)
                    if terms is None:  # the process that moved the files was killed, or has just ended
                        conclude(Staging(folder, hidden, self.sync), hidden)
                    if terms != self.terms or self.missing(hidden):
                        return None
                    stack.enter_context(opened.pop_all())
                    return folder, hidden
            time.sleep(POLL_SECONDS)

    def tidy(self) -> None:
        """Remove everything, if no part is done and no other process is at work."""
        with contextlib.suppress(OSError), Folder.open(self.target) as folder:
            if folder.stat(STAGING) is None:
                return
            hidden = open_marked(folder, STAGING)
            if hidden is None:
                return
            with hidden:
                if Terms.read(hidden) == self.terms and len(self.missing(hidden)) == self.terms.of:
                    abandon(hidden)


def part_lock(number: int) -> str:
    """Return the name of the file whose lock a process has while it writes a part."""
    return f"part-{number}.lock"


def part_names(of: int) -> Iterator[str]:
    """Yield the names of what the parts put into the hidden folder beside the output."""
    for number in range(1, of + 1):
        yield from (part_mark(number), f"{part_mark(number)}.new", part_lock(number))


def put(hidden: MarkedFolder, name: str, data: bytes, sync: bool) -> None:
    """Write a small file into the hidden folder in one step. Its name, and that with ``.new``, are marked already.

    Raises:
        OSError: the system refuses.
    """
    hidden.remove_marked(f"{name}.new")
    descriptor = hidden.open_file(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    hidden.rename(f"{name}.new", hidden, name)
    if sync:
        hidden.sync()


def read_mark(hidden: Folder, number: int) -> Mapping[str, Any]:
    """Return what a part that is done says. Raises OutputError where it cannot be read."""
    try:
        found = json.loads(hidden.read(part_mark(number), MAX_MARK_BYTES))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{hidden.path / part_mark(number)}: cannot be read ({error}): remove it and run that part again"
        ) from None
    return dict(found)


def abandon(hidden: MarkedFolder) -> None:
    """Remove the hidden folder with all parts. Raises OutputError or OSError."""
    hidden.remove_marked(PARTS)
    hidden.end()


def _or_closed(hidden: MarkedFolder, wanted: Callable[[MarkedFolder], bool]) -> bool:
    """Return whether a folder is ``wanted``. It is closed if not."""
    try:
        found = wanted(hidden)
    except BaseException:
        hidden.close()
        raise
    if not found:
        hidden.close()
    return found
