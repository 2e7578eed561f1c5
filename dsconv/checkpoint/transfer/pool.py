"""The pool of copying threads. All of them end on the first error, or when the caller is interrupted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Jobs(Iterator[T], Generic[T]):
    """Jobs that several threads take from one iterable. It ends for all of them once ``stop`` has been called."""

    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __next__(self) -> T:
        with self._lock:
            if self._stop.is_set():
                raise StopIteration
            return next(self._jobs)

    @property
    def stopped(self) -> bool:
        """Return whether a job that takes long should end early."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Let no thread take another job."""
        self._stop.set()


def run_jobs(jobs: Iterable[T], worker: Callable[[Jobs[T]], None], count: int) -> None:
    """Run ``worker`` in ``count`` threads, each of which takes from the same ``jobs``, until all of them have ended.

    If the system starts fewer threads than requested, those do the work, or the calling thread does.

    Args:
        jobs: the jobs. The iterable is advanced by one thread at a time.
        worker: takes jobs until there are none. Buffers and open files that a thread needs are made here.
        count: the number of threads; at least 1.

    Raises:
        The first error that a worker raised, or the caller's own interrupt, once every thread has stopped.
    """
    shared = Jobs(jobs)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            worker(shared)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
            shared.stop()

    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=work, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # "can't start new thread": a limit of the system
                break
            threads.append(thread)
        if not threads:
            work()
        for thread in threads:
            thread.join()
    except BaseException:
        shared.stop()
        _join(threads)
        raise
    if errors:
        raise errors[0]


def _join(threads: list[threading.Thread]) -> None:
    """Wait for threads that were told to stop, even if more interrupts come, since what they use is released next."""
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(BaseException):
                thread.join()
