"""Make text from files safe to show: names, messages and paths come from whoever wrote the checkpoint.

Everything that dsconv prints passes ``clean`` at the place where it is printed, and so does the text of every error and
the warnings of a checkpoint, which a program may log. A name inside a message passes ``quote``, so that a long one does
not push the rest of the sentence out. Each of them takes time in proportion to the text.
"""

from __future__ import annotations

import re

MAX_LINE = 4000  # characters of a line; a path may have 4,096 bytes
MAX_MESSAGE = 2000  # characters of an error or a warning
MAX_NAME = 240  # characters of one name in a table
MAX_QUOTED = 120  # characters of one name in a message
_DIGITS = re.compile(r"(\d+)")
_PLURALS = {"is": "are", "was": "were", "has": "have", "does": "do"}
_Y = re.compile("[^aeiou]y$")  # copy, entry
_WORD = re.compile(r"[^\s'\"]+")
_USER = re.compile(r"(?P<slashes>:/{1,2})[^/?#@:]*:[^/@]*@")
_TOKEN = re.compile(r"\b(?P<kind>hf_|Bearer |AKIA|ghp_)[A-Za-z0-9_.~+/=-]{8,}")


def clean(text: str, limit: int = MAX_LINE) -> str:
    """Return ``text`` as one line that a terminal can only show.

    Characters that are not printable (``str.isprintable``) become their escapes: C0 and C1 controls, line separators,
    bidirectional overrides, invisible characters and the surrogates of a path that is not UTF-8. Credentials in URLs
    are removed, as ``redact`` does. A longer text is cut in the middle.

    Args:
        text: Any text.
        limit: The largest number of characters to return.
    """
    if len(text) > 4 * limit:  # bound the work before looking at each character
        text = text[: 2 * limit] + text[-2 * limit :]
    text = redact(text)
    if not text.isprintable():
        text = "".join(char if char.isprintable() else _escape(char) for char in text)
    if len(text) > limit:
        text = f"{text[: limit - limit // 3]} … {text[len(text) - limit // 3 + 3 :]}"
    return text


def quote(name: object, limit: int = MAX_QUOTED) -> str:
    """Return the ``repr`` of a name out of a file, for a message; a long one is cut in the middle.

    Args:
        name: Any text, or a plain value.
        limit: The largest number of characters to return.
    """
    if isinstance(name, str) and len(name) > 2 * limit:  # bound the work before looking at each character
        name = name[:limit] + name[-limit:]
    text = repr(name)
    return text if len(text) <= limit else f"{text[: limit - limit // 3]}…{text[len(text) - limit // 3 + 1 :]}"


def count(number: int, noun: str, verb: str = "") -> str:
    """Return ``1 tensor``, ``1,234 tensors``, ``2 copies``; with a verb ``1 file is``, ``2 files are``.

    Args:
        number: How many there are.
        noun: What they are, in the singular.
        verb: What follows, as it is said of one: ``is``, ``has``, ``differs``.
    """
    if number != 1:
        stem, ending = (noun[:-1], "ies") if _Y.search(noun) else (noun, "es" if noun[-1] in "hsx" else "s")
        noun, verb = stem + ending, _PLURALS.get(verb, verb.removesuffix("s"))
    return f"{number:,} {noun} {verb}".rstrip()


def size(nbytes: float) -> str:
    """Return bytes as ``1.55 GB``, in decimal units, as disks and the Hub count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names as people do: ``layers.9`` before ``layers.10``."""
    # A number of thousands of digits, which Python does not convert, sorts by its length and its digits all the same.
    return [
        (1, len(digits), digits) if (digits := part.lstrip("0") or "0") and part.isdecimal() else (0, 0, part)
        for part in _DIGITS.split(name)
    ]


def redact(text: str) -> str:
    """Return ``text`` without what gives access: passwords and queries of URLs, and access tokens.

    The query of a URL goes as a whole, since a signed URL carries its signature there.
    """
    if ":/" in text:
        text = _WORD.sub(lambda word: _without_access(word[0]), text)
    return _TOKEN.sub(r"\g<kind>…", text)


def _without_access(word: str) -> str:
    """Return a word, which may be or hold a URL, without its password and its query."""
    begins = word.find(":/")
    if begins < 1:
        return word
    query = word.find("?", begins)
    if 0 < query < len(word) - 1:
        word = word[: query + 1] + "…"
    return _USER.sub(r"\g<slashes>…@", word)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
