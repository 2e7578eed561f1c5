"""The one rule for what a user names: a path of this disk, or a URL. Every command and every function follows it.

A URL is never taken for a folder called ``s3:``. Its scheme may be written in capitals; ``file:///path`` is the path;
which schemes can be read, the installed libraries decide (``checkpoint/storage``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from dsconv.errors import OutputError, UnsupportedError

URL = re.compile(r"(?P<scheme>[^/]+?):(?P<slashes>/{1,2})(?P<rest>.*)", re.DOTALL)
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*", re.ASCII)
LOCAL = ("file", "local")
LOCAL_HOSTS = ("", "localhost")
READ_ONLY = ("http", "https", "hf")


def where(path: str | os.PathLike[str]) -> Path | str:
    """Return what a user names: a ``Path`` of this disk or, as text, a URL with its scheme in lower case.

    Raises:
        UnsupportedError: It is written like a URL, and is none that can be read.
    """
    text = os.fspath(path)
    found = URL.fullmatch(text)
    if found is None:
        return Path(path)
    written, rest, is_url = found["scheme"], found["rest"], found["slashes"] == "//"
    scheme = written.lower()
    if not SCHEME.fullmatch(written):
        if not is_url:
            return Path(path)
        how = "give the URL of the store itself" if "::" in written else "a scheme has letters, digits, +, - and ."
        raise UnsupportedError(f"{text}: {written}:// is not read: {how}")
    if scheme in LOCAL:
        host, slash, below = rest.partition("/") if is_url else ("", "/", rest)
        if host.lower() not in LOCAL_HOSTS or not slash:
            raise UnsupportedError(
                f"{text}: names the machine {host!r}, and only files of this one are read: write {scheme}:///PATH, or"
                " the path alone"
            )
        return Path(unquote(f"/{below}"))
    if is_url:
        return f"{scheme}://{rest}"
    if os.path.lexists(f"{written}:"):
        return Path(path)
    raise UnsupportedError(f"{text}: neither a URL nor a path: write {scheme}://{rest}, or ./{text} for a folder here")


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """Return the path of something that lies on this disk.

    Args:
        path: What the user names.
        what: What it is, for the message: "the folder to push".

    Raises:
        UnsupportedError: It is a URL of a store or of the Hub.
    """
    found = where(path)
    if isinstance(found, str):
        raise UnsupportedError(f"{found}: {what} must lie on this disk: give a path")
    return found


def writable(path: str | os.PathLike[str]) -> Path | str:
    """Return, as ``where`` does, where an output goes.

    Raises:
        UnsupportedError: It is written like a URL, and is none.
        OutputError: It is a URL that is only read.
    """
    found = where(path)
    if isinstance(found, str) and (scheme := found.partition("://")[0]) in READ_ONLY:
        hint = "push a folder with dsconv push" if scheme == "hf" else "write to a folder or an object store"
        raise OutputError(f"{found}: {scheme}:// is read only here; {hint}")
    return found
