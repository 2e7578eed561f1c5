"""The command line: one file per command, each of which parses, calls one function and prints.

This file imports only the standard library at its top: an interrupt during the other imports must be handled too.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from dsconv.cli import streams

SAME_REQUEST_SECONDS = 5.0  # supervisors repeat a signal, and send SIGHUP beside SIGTERM
REPORT = "Please report it with the output of `dsconv doctor` and of this command with --debug."


class Terminated(SystemExit):
    """A signal asks the process to end. Like an interrupt, it removes what was half written."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code (see ``dsconv.errors``). No exception leaves it."""
    arguments = sys.argv[1:] if args is None else args
    try:
        _handle_signals()
        gc.set_threshold(50_000)  # what a command imports is no garbage: looking through it takes a tenth of its start
        streams.prepare()
        from dsconv.cli.commands import run

        code = run(arguments)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - each ends as a line and an exit code
        _hold_signals()
        code = _report(error, arguments)
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            _hold_signals(for_good=True)
    sys.exit(code)


def _handle_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    asked_at = float("-inf")

    def terminate(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if now - asked_at > SAME_REQUEST_SECONDS:  # a repeated signal must not stop the clearing up
            asked_at = now
            raise Terminated(128 + signum)

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, terminate)


def _hold_signals(for_good: bool = False) -> None:
    """Let the report end, whose exit code a repeated signal must not change; an interrupt ends the process at once.

    ``for_good``: Python takes its handlers away before it ends, and only what is ignored stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    began = time.monotonic()

    def end(signum: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > SAME_REQUEST_SECONDS:
            os._exit(128 + signum)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if for_good else end)


def _report(error: BaseException, arguments: list[str]) -> int:
    """Say on stderr what ended the run, with ``--json`` on stdout too, and return the exit code."""
    from dsconv.errors import EXIT_UNREADABLE
    from dsconv.text import clean

    if isinstance(error, streams.StdoutError):
        streams.discard_stdout()
        if not error.gone:
            print(f"Error: stdout cannot be written: {clean(str(error))}", file=sys.stderr)
        return 0 if error.gone else EXIT_UNREADABLE
    if isinstance(error, SystemExit) and not isinstance(error, Terminated):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if "-d" in arguments or "--debug" in arguments:
        import traceback

        traceback.print_exception(error)
    code, lines = _explain(error)
    lines = [clean(line) for line in lines]
    for line in lines:
        print(line, file=sys.stderr)
    if "--json" in arguments:
        name = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        found: dict[str, Any] = {
            "schema": "dsconv.error/1",
            "error": lines[-1].removeprefix("Error: "),
            "type": name,
            "exit_code": code,
        }
        try:
            print(json.dumps(found), flush=True)
        except streams.StdoutError:
            streams.discard_stdout()
    return code


def _explain(error: BaseException) -> tuple[int, list[str]]:
    """Return the exit code of an error and the lines that report it."""
    from dsconv.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_UNREADABLE, DsconvError, as_missing_package

    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ["Interrupted. Every output is complete or absent."]
    if isinstance(error, Terminated):
        return int(error.code or 0), ["Terminated. Every output is complete or absent."]
    if isinstance(error, ImportError):
        error = as_missing_package("this command", error) or error
    if isinstance(error, DsconvError):
        return error.exit_code, [f"Error: {error}"]
    if isinstance(error, MemoryError):
        return EXIT_UNREADABLE, ["Error: not enough memory"]
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return EXIT_UNREADABLE, [f"Error: {where}{error.strerror or error}"]
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    at = "" if place is None else f" ({place.tb_frame.f_globals.get('__name__', '?')}, line {place.tb_lineno})"
    return EXIT_BUG, [f"Error: this is a bug in dsconv: {type(error).__name__}: {error}{at}. {REPORT}"]
