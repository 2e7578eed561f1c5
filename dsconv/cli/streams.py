"""The standard streams of a process: closed, full, or a pipe whose reader has gone, each ends well.

Only the standard library is imported here, since ``main`` prepares the streams before anything else.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import Any

ASCII = {"→": "->", "×": "x", "…": "...", "–": "-", "—": "-", "✓": "yes", "✗": "no", "≤": "<=", "≥": ">="}
HANDLER = "dsconv"


class StdoutError(Exception):
    """stdout cannot be written. ``gone``: its reader has ended, as ``head`` does."""

    def __init__(self, error: OSError | ValueError) -> None:
        self.gone = isinstance(error, BrokenPipeError)
        super().__init__(getattr(error, "strerror", None) or str(error))


class _Stream:
    """A text stream that passes everything on to ``inner``, but handles the errors of writing.

    ``strict`` raises StdoutError; otherwise errors are ignored, since a message that cannot be shown must not end the
    work that it tells of.
    """

    def __init__(self, inner: Any, strict: bool) -> None:
        self._inner, self._strict = inner, strict

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        try:
            return int(self._inner.write(text))
        except (OSError, ValueError) as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._inner.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        if self._strict:
            raise StdoutError(error) from None


def prepare() -> None:
    """Replace sys.stdout and sys.stderr by streams that no state of theirs can surprise.

    A closed descriptor is opened on /dev/null: the next file that is opened would get its number, and with it
    everything that is printed. Characters that an encoding lacks are written as ASCII or escapes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    codecs.register_error(HANDLER, _replace)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(descriptor, "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)
        setattr(sys, name, _Stream(stream, strict=descriptor == 1))


def discard_stdout() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lacking), error.end
