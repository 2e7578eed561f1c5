"""What the commands share: options, and everything that they print.

All output passes ``say``, ``table`` or ``show_json``, which make text from files harmless (``dsconv.text``). No command
prints in any other way.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from dsconv.text import MAX_NAME, clean, redact
from dsconv.text import count as count
from dsconv.text import size as size
from dsconv.urls import local_path

LOG_SECONDS = 10.0  # between two lines of progress where stderr is no terminal
QUICK_BYTES = 64 << 20  # work below this ends before a bar is drawn
SCHEMA_VERSION = 1
SAME_SCHEMA = {"zero-to-fp32": "merge", "resume": "train"}  # commands that print what another one prints
HEAD_ROWS, TAIL_ROWS = 32, 8  # what is shown of a long table
SMALLEST_PLAIN_BYTES = 1000  # a smaller size without a unit is a mistake

Progress = Callable[[str, int, int], None]
Decorator = Callable[[Any], Any]


class Page(click.Path):
    """A file on this disk, as a Path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return local_path(str(super().convert(value, param, ctx)), "--html")


JSON: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
FOLLOW_LINKS: Decorator = click.option(
    "--follow-links", is_flag=True, help="Follow links that leave the checkpoint (default: refuse them)."
)
ITEM: Decorator = click.option("--item", metavar="KEY", help="Model to read, if CKPT holds several, such as actor.")
ITEMS: Decorator = click.option(
    "--item", metavar="KEY", help="Model to compare, if A or B holds several, such as actor."
)
ITEM_B: Decorator = click.option("--item-b", metavar="KEY", help="Model of B, if it is another than --item.")
PART: Decorator = click.option(
    "--part", metavar="I/N|auto", help="Write part I of N; auto asks torchrun, Slurm, MPI or an indexed job."
)
HTML: Decorator = click.option(
    "--html", "page", type=Page(dir_okay=False), metavar="PAGE", help="Write a page for browsers."
)
QUIET: Decorator = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
DEBUG: Decorator = click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")


def with_options(*options: Decorator) -> Decorator:
    """Return a decorator that adds ``options`` to a command, in the order in which --help shows them."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Command(click.Command):
    """A command that refuses empty arguments: they come from variables that a script did not set."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            if parameter.name is None or ctx.get_parameter_source(parameter.name) is not COMMAND_LINE:
                continue
            value = ctx.params.get(parameter.name)
            if value == "" or (isinstance(value, (tuple, list)) and "" in value):
                raise click.BadParameter("the value is empty: is a variable of your script unset?", ctx, parameter)
        return rest


class Group(click.Group):
    """A group whose commands are ``Command``."""

    command_class = Command


COMMAND_LINE = click.core.ParameterSource.COMMANDLINE
command: Callable[..., Decorator] = partial(click.command, cls=Command)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """Bytes as people write them: 5GB, 500MB, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from dsconv.convert.plan import parse_size

        try:
            found = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if str(value).strip().isdigit() and found < SMALLEST_PLAIN_BYTES:
            self.fail(
                f"{value!r} has no unit and would mean {count(found, 'byte')}: write it like 5GB or 500MB", param, ctx
            )
        return found


class Dtype(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on only
    """fp32, bf16 or fp16; torch's names are taken too."""

    LONG = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

    def __init__(self) -> None:
        super().__init__(["fp32", "bf16", "fp16"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(self.LONG.get(value, value), param, ctx)


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


def say(*lines: str, err: bool = False, label: str = "", fg: str | None = None) -> None:
    """Print lines on stdout, or on stderr with ``err``. Each is one line, whatever its text holds.

    Args:
        lines: What to print.
        err: Print on stderr.
        label: A word before each line.
        fg: The colour of the label, if the stream takes colours.
    """
    stream = sys.stderr if err else sys.stdout
    shown = click.style(label, fg=fg) if label and fg and colour(stream) else label
    stream.write("".join(f"{shown}{' ' if shown else ''}{clean(line)}\n" for line in lines))
    stream.flush()


def say_text(text: str, err: bool = False) -> None:
    """Print text of dsconv's own that has several lines, such as a configuration."""
    say(*text.splitlines(), err=err)


def table(
    columns: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[str | Sequence[str]]],
    *,
    bold: int | None = None,
    wrap: bool = True,
    pipe_columns: int = 200,
) -> None:
    """Print a table on stdout.

    Args:
        columns: (title, "left" or "right").
        rows: Cells; a sequence is a cell of several lines.
        bold: The row to print in bold.
        wrap: Fold cells that are too long; otherwise they are kept whole.
        pipe_columns: The width if stdout is no terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", show_header=any(title for title, _ in columns))
    for title, justify in columns:
        made.add_column(title, justify=justify, overflow="fold", no_wrap=not wrap)  # type: ignore[arg-type]
    for number, row in enumerate(rows):
        cells = ["\n".join(clean(line, MAX_NAME) for line in ([c] if isinstance(c, str) else c)) for c in row]
        made.add_row(*map(Text, cells), style="bold" if number == bold else None)
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    width = None if terminal else pipe_columns
    Console(file=out, width=width, highlight=False, force_terminal=terminal and colour(sys.stdout)).print(made)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()))
    sys.stdout.flush()


def long_table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Sequence[str]]], all_of_them: str
) -> None:
    """Print the first and last rows of a table, how many are between, and what shows ``all_of_them``."""
    hidden = len(rows) - HEAD_ROWS - TAIL_ROWS
    if hidden <= 1:
        table(columns, rows)
        return
    more = [f"… {count(hidden, 'more row')}; {all_of_them}", *[""] * (len(columns) - 1)]
    table(columns, [*rows[:HEAD_ROWS], more, *rows[HEAD_ROWS + hidden :]])


def plan_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return dtype, shape, offset and bytes of a tensor's row in a plan."""
    cast = "" if row["dtype"] == row["stored_dtype"] else f" from {row['stored_dtype']}"
    return f"{row['dtype']}{cast}", shape(row["shape"]), f"{row['offset']:,}", f"{row['bytes']:,}"


def shape(sizes: Sequence[int]) -> str:
    """Return ``16 × 8``, or ``scalar``."""
    return " × ".join(map(str, sizes)) or "scalar"


def counts(found: dict[str, int], shown: int = 8) -> str:
    """Return ``35 optim, 7 lr_scheduler``, for names out of a file: the largest counts first, and how many more."""
    largest = sorted(found.items(), key=lambda item: -item[1])
    parts = [f"{number:,} {name if name.isprintable() else repr(name)}"[:100] for name, number in largest[:shown]]
    more = sum(number for _, number in largest[shown:])
    return ", ".join(parts) + (f" and {count(more, 'other')}" if more else "")


def show_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII and without credentials. It names the schema that it follows.

    docs/json.md lists the schemas. A field that is renamed, removed or given another type makes a new version.
    """
    name = click.get_current_context().command.name or ""
    found = {"schema": f"dsconv.{SAME_SCHEMA.get(name, name)}/{SCHEMA_VERSION}", **_redacted(data)}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def warn(messages: Iterable[str]) -> None:
    """Print warnings on stderr."""
    say(*messages, err=True, label="Warning:", fg="yellow")


def quiet_downloads(quiet: bool) -> None:
    """Keep the Hub's client from drawing bars, by the variable that it reads when it is imported."""
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        if "huggingface_hub" in sys.modules:
            sys.modules["huggingface_hub"].utils.disable_progress_bars()  # the variable was read before


def colour(stream: Any) -> bool:
    """Return whether a stream takes colours: it is a terminal and NO_COLOR is not set (https://no-color.org)."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def check_page(path: Path, what: str) -> None:
    """Refuse before the work what ``--html PAGE`` would refuse after it. Raises MissingPackageError and OutputError."""
    from dsconv.errors import require_packages
    from dsconv.page import check_page as check

    require_packages(what, "html", "plotly")
    check(path)


@contextlib.contextmanager
def progress(quiet: bool, unit: str = "bytes") -> Iterator[Progress | None]:
    """Yield a callback that shows phase, amount, rate and time left on stderr; None if ``quiet``.

    ``unit`` is what it counts. It may be called from any thread.
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
    """One progress bar of rich for each phase. rich is imported for the first."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._ended = ""  # the phase that ended last; other threads may still report it
        self._lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if (self._unit == "bytes" and total < QUICK_BYTES) or phase == self._ended:
            return
        with self._lock:
            if self._progress is None:
                self._progress = _make_bar(self._unit)
                self._progress.start()
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(clean(phase, MAX_NAME).replace("[", "\\["), total=total)
            self._progress.update(self._tasks[phase], completed=done)
            if done >= total:  # what follows may draw bars of its own, as the Hub's client does
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
    """A line every few seconds, for the logs of batch jobs."""

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
                del self._began[phase]  # a watcher repeats its phases
            if now - max(self._last, began) < LOG_SECONDS:  # what is quick needs no line
                return
            self._last = now
            elapsed = now - began
        rate = done / elapsed if elapsed else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        say(f"{phase}: {self._show(done)} of {self._show(total)}, {self._show(rate)}/s{left}", err=True)


def show_report(report: Any, seconds: float, as_json: bool, quiet: bool) -> bool:
    """Print a conversion's report as JSON, or its warnings and first line; return whether to print the details."""
    if as_json:
        show_json({**report.to_dict(), "seconds": round(seconds, 3)})
    elif not quiet:
        warn(report.warnings)
        step = "" if report.step is None else f", step {report.step}"
        say(f"{report.source} ({report.format}{step}) → {report.output}")
        return report.part is None or _show_part(report, seconds)
    return False


def _show_part(report: Any, seconds: float) -> bool:
    """Print what became of a part of an output; return whether this process put the output into its place."""
    part = report.part
    head = f"part {part.number}/{part.of}: {size(part.nbytes)}, {seconds:.2f} s"
    if part.placed:
        say(f"{head}; all parts are done{'' if part.by_this else ', and another process put them in place'}")
    else:
        shown = ", ".join(f"{number}/{part.of}" for number in part.missing[:8])
        more = f" and {len(part.missing) - 8} more" if len(part.missing) > 8 else ""
        say(f"{head}; still missing: {shown}{more}")
    return bool(part.by_this)


def show_push(pushed: dict[str, Any]) -> None:
    """Print what a push did."""
    warn(pushed["warnings"])
    made = (
        " (created, private)"
        if pushed["created"] and pushed["private"]
        else " (created, public)"
        if pushed["created"]
        else ""
    )
    say(f"{pushed['folder']} → {pushed['repo']}{made}, {pushed['revision']}")
    how = "checked against its manifest" if pushed["checked"] else "not checked"
    new = "" if pushed["changed"] else "; the Hub already had all of it"
    say(f"{count(len(pushed['files']), 'file')}, {size(pushed['nbytes'])}, {how}{new}")
    if pushed["deleted"]:
        say(f"removed there: {', '.join(pushed['deleted'])}")
    if pushed["left_out"]:
        say(f"left out: {', '.join(pushed['left_out'])}")
    say(pushed["pull_request"] or pushed["url"])
