"""One self-contained HTML page: text, tables, and figures that plotly draws, with its script inside.

A page loads nothing: its content security policy forbids it, so it opens from a disk, in a notebook and behind a
firewall, and tells nobody that it was opened. Names come from whoever wrote the checkpoint, and pass ``shown``.
"""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.errors import OutputError, require_packages
from dsconv.text import MAX_NAME, clean

GENERATOR = '<meta name="generator" content="dsconv">'
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
CONFIG = {"displaylogo": False, "responsive": True}
HEAD_BYTES = 4096
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1200px; margin: 0 auto;
       padding: 16px; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem } p { margin: .25rem 0 }
.scroll { overflow-x: auto; margin: .75rem 0 } table { border-collapse: collapse; font-size: .875rem }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; overflow-wrap: normal }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tbody tr:nth-child(odd) { background: #f5f7f9 } .problem { color: #a40e26 } summary { cursor: pointer }
footer { margin-top: 2rem; color: #59636e; font-size: .875rem }
"""


def shown(text: object) -> str:
    """Return text that comes from a file as HTML that can only be read: for a page, and for labels of plotly."""
    return html.escape(clean(str(text), MAX_NAME))


class Page:
    """A page that is put together from top to bottom.

    Args:
        title: The heading, in HTML.
        what: What makes it, for the error where plotly is missing.

    Raises:
        MissingPackageError: plotly is not installed.
    """

    def __init__(self, title: str, what: str) -> None:
        require_packages(what, "html", "plotly")
        self._title = title
        self._parts: list[str] = []
        self._figures = 0

    def heading(self, text: str, *paragraphs: str) -> None:
        """Add a heading and paragraphs under it, in HTML."""
        self._parts.append(f"<h2>{text}</h2>" + "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs))

    def problems(self, messages: Iterable[str]) -> None:
        """Add messages, as text."""
        self._parts += [f'<p class="problem">{html.escape(clean(message))}</p>' for message in messages]

    def table(
        self, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]], folded: str | None = None
    ) -> None:
        """Add a table; columns are (title, "left" or "right"), cells are text. ``folded`` is what unfolds it."""
        kinds = [' class="number"' if side == "right" else "" for _, side in columns]
        titles = "".join(f"<th{kind}>{title}</th>" for (title, _), kind in zip(columns, kinds, strict=True))
        head = f"<thead><tr>{titles}</tr></thead>" if any(title for title, _ in columns) else ""
        lines = [
            "<tr>" + "".join(f"<td{kind}>{shown(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
            for row in rows
        ]
        made = f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'
        self._parts.append(f"<details><summary>{folded}</summary>{made}</details>" if folded else made)

    def figure(self, figure: Any, height: int) -> None:
        """Add a figure of plotly, as wide as the page and ``height`` pixels high."""
        figure.update_layout(
            height=height, margin={"l": 8, "r": 8, "t": 48, "b": 8}, template="plotly_white", autosize=True
        )
        figure.update_xaxes(automargin=True)
        figure.update_yaxes(automargin=True)
        self._figures += 1
        self._parts.append(
            str(
                figure.to_html(
                    full_html=False,
                    include_plotlyjs=self._figures == 1,
                    include_mathjax=False,
                    config=CONFIG,
                    div_id=f"figure-{self._figures}",
                )
            )
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all. It replaces an older page of dsconv, and nothing else.

        Raises:
            OutputError: Another file is there, or the page cannot be written.
        """
        check_page(path)
        text = (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{self._title}</title><style>{STYLE}</style></head><body><h1>{self._title}</h1>"
            f"{''.join(self._parts)}<footer>Made by dsconv {__version__}. This page loads nothing.</footer>"
            "</body></html>\n"
        )
        made = None
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=".dsconv-", delete=False, encoding="utf-8"
            ) as file:
                made = Path(file.name)
                file.write(text)
            made.chmod(0o666 & ~_umask())
            made.replace(path)
        except BaseException as error:
            if made is not None:
                made.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OutputError(f"{path}: the page cannot be written: {error.strerror or error}") from None
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def check_page(path: Path) -> None:
    """Raise OutputError where a page must not be written to ``path``; call it before the work that fills the page."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent} for the page")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_file():
        raise OutputError(f"{path} is no regular file; name another one for the page")
    with path.open("rb") as file:
        if GENERATOR.encode() not in file.read(HEAD_BYTES):
            raise OutputError(f"{path} is no page of dsconv and is not replaced; name another file")
