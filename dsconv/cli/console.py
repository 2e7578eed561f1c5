"""What the commands share: sizes for people, warnings on stderr, one JSON object on stdout, and the progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

LOG_SECONDS = 10.0  # between two lines of progress where stderr is no terminal
QUICK_BYTES = 64 << 20  # work below this is over before a bar is drawn

Progress = Callable[[str, int, int], None]
Decorator = Callable[[Any], Any]

JSON: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
QUIET: Decorator = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
DEBUG: Decorator = click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")


def with_options(*options: Decorator) -> Decorator:
    """Return a decorator that adds ``options`` to a command, in the order in which --help shows them."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """Bytes as people write them: 5GB, 500MB, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from dsconv.convert.plan import parse_size

        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Repo(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """A repository of the Hub: org/model."""

    name = "repo"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from dsconv.convert.push import check_repo

        try:
            check_repo(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def size(nbytes: float) -> str:
    """``1.55 GB``; decimal units, as disks and the Hub count."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def count(number: int, noun: str) -> str:
    """``1 tensor``, ``1,234 tensors``, ``2 mismatches``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('h') else 's'}"


def show_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=1))


def warn(messages: list[str]) -> None:
    for message in messages:
        click.echo(click.style("Warning: ", fg="yellow" if colour() else None) + message, err=True)


def quiet_downloads(quiet: bool) -> None:
    """Keep the Hub's client, which reads the environment when it is imported, from drawing bars where none are
    wanted.
    """
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def colour() -> bool:
    """Whether stderr takes colours: a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


@contextlib.contextmanager
def progress(quiet: bool, unit: str = "bytes") -> Iterator[Progress | None]:
    """A callback that shows on stderr the phase, how much of it is done, rate and time left; ``unit`` is what it
    counts.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        bar = _Bar(unit)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield _Log(unit)


class _Bar:
    """A rich progress bar a phase; rich is imported when the first one is needed."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._ended = ""  # the phase that ended last: other threads may still tell of it
        self._lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if (self._unit == "bytes" and total < QUICK_BYTES) or phase == self._ended:
            return
        with self._lock:
            if self._progress is None:
                self._progress = _make_bar(self._unit)
                self._progress.start()
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total)
            self._progress.update(self._tasks[phase], completed=done)
            if done >= total:  # what follows may draw its own bars, as the Hub's client does
                self._ended = phase
                self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()


def _make_bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    return Progress(
        TextColumn("{task.description:>7}"), BarColumn(), *amount, TimeRemainingColumn(), console=Console(stderr=True)
    )


class _Log:
    """A line now and then, for logs of batch jobs."""

    def __init__(self, unit: str) -> None:
        self._show = size if unit == "bytes" else lambda amount: f"{amount:,.4g} {unit}"
        self._began: dict[str, float] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            began = self._began.setdefault(phase, now)
            if done >= total:
                del self._began[phase]  # a watcher has it again
            if now - self._last < LOG_SECONDS:
                return
            self._last = now
            elapsed = now - began
        rate = done / elapsed if elapsed else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        click.echo(f"{phase}: {self._show(done)} of {self._show(total)}, {self._show(rate)}/s{left}", err=True)


def show_report(report: Any, seconds: float, as_json: bool, quiet: bool) -> bool:
    """The report of a conversion as JSON, or its warnings and first line; whether its details are to follow."""
    if as_json:
        show_json({**report.to_dict(), "seconds": round(seconds, 3)})
    elif not quiet:
        warn(report.warnings)
        step = "" if report.step is None else f", step {report.step}"
        click.echo(f"{report.source} ({report.format}{step}) → {report.output}")
        return True
    return False


def show_push(pushed: dict[str, Any]) -> None:
    """What a push did, for people."""
    warn(pushed["warnings"])
    made = (
        " (made, private)"
        if pushed["created"] and pushed["private"]
        else " (made, public)"
        if pushed["created"]
        else ""
    )
    click.echo(f"{pushed['folder']} → {pushed['repo']}{made}, {pushed['revision']}")
    how = "checked against its manifest" if pushed["checked"] else "not checked"
    new = "" if pushed["changed"] else "; the Hub had all of it"
    click.echo(f"{count(len(pushed['files']), 'file')}, {size(pushed['nbytes'])}, {how}{new}")
    if pushed["deleted"]:
        click.echo(f"taken away there: {', '.join(pushed['deleted'])}")
    if pushed["left_out"]:
        click.echo(f"left out: {', '.join(pushed['left_out'])}")
    click.echo(pushed["pull_request"] or pushed["url"])
