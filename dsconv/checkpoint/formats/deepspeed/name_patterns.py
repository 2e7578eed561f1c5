"""Regular expressions out of a file, matched in linear time.

A universal checkpoint's patterns are matched with ``re.match`` upstream (DeepSpeed
``checkpoint/ds_to_universal.py``), so they need not reach the name's end. A file may hold any pattern and Python's
matcher takes exponential time for some; this one walks the name once with the set of places in the pattern that could
come next. It knows characters, escapes, ``.``, ``\\d``, ``\\w``, classes, ``* + ?`` and anchors, which is what
DeepSpeed and Megatron-DeepSpeed write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import quote

MAX_PATTERN_CHARS = 1024
Test = Callable[[str], bool]
# As ``re`` has them: a superscript is no decimal digit.
_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "D": lambda c: not c.isdecimal(),
}


class Patterns:
    """A list of patterns and what each stands for.

    Args:
        pairs: Each pattern and its value.
        where: The file and the field that they are from, for messages.
    """

    def __init__(self, pairs: Iterable[tuple[str, object]], where: str) -> None:
        self._exact: dict[str, object] = {}
        self._others: list[tuple[tuple[tuple[Test | None, str], ...], object]] = []
        for pattern, value in pairs:
            literal = _literal(pattern)
            if literal is not None:
                self._exact.setdefault(literal, value)
            else:
                self._others.append((_tokens(pattern, where), value))

    def find(self, name: str) -> object | None:
        """Return the value of the first pattern that matches ``name``, or None if none does."""
        if name in self._exact:
            return self._exact[name]
        return next((value for tokens, value in self._others if _matches(tokens, name)), None)


def _literal(pattern: str) -> str | None:
    """Return the one name that ``^name$`` with escapes matches, as AutoTP writes it; None for any other pattern."""
    if not (pattern.startswith("^") and pattern.endswith("$") and len(pattern) <= MAX_PATTERN_CHARS):
        return None
    body = re.sub(r"\\([^0-9A-Za-z])", lambda match: match[1], pattern[1:-1])
    return body if "^" + re.escape(body) + "$" == pattern else None


@lru_cache(maxsize=4096)
def _tokens(pattern: str, where: str) -> tuple[tuple[Test | None, str], ...]:
    """Return the test of a character and the quantifier of each part; the test of ``$`` is None.

    ``^`` at the start says nothing.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise UnsupportedError(
            f"{where}: a name pattern of {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}"
        )
    tokens: list[tuple[Test | None, str]] = []
    at = 1 if pattern.startswith("^") else 0
    while at < len(pattern):
        part = re.compile(r"\\[dwD]|\\[^0-9A-Za-z]|\[\^?[^\]\[\\]+\]|[^\\\[\](){}*+?|^]").match(pattern, at)
        if part is None:
            raise UnsupportedError(
                f"{where}: the name pattern {quote(pattern)} uses more of regular expressions than dsconv reads"
            )
        try:
            test = _test(part[0])
        except re.error as error:
            raise MalformedError(f"{where}: the name pattern {quote(pattern)} is not valid: {error}") from None
        at = part.end()
        quantifier = pattern[at] if at < len(pattern) and pattern[at] in "*+?" else ""
        at += len(quantifier)
        tokens.append((test, quantifier))
    return tuple(tokens)


def _test(part: str) -> Test | None:
    if part == "$":
        return None
    if part == ".":
        return lambda character: character != "\n"
    if part[0] == "\\":
        return _CLASSES[part[1]] if part[1] in _CLASSES else part[1].__eq__
    if part[0] == "[":
        one = re.compile(part)
        return lambda character: one.match(character) is not None
    return part.__eq__


def _matches(tokens: tuple[tuple[Test | None, str], ...], name: str) -> bool:
    def closure(places: set[int]) -> set[int]:
        """The places, and those behind parts that may match nothing."""
        for place in sorted(places):
            while place < len(tokens) and tokens[place][1] in ("*", "?"):
                place += 1
                places.add(place)
        return places

    now = closure({0})
    for character in name:
        if len(tokens) in now:
            return True
        after = set()
        for place in now:
            test, quantifier = tokens[place]
            if test is not None and test(character):
                after.add(place + 1)
                if quantifier in ("*", "+"):
                    after.add(place)
        now = closure(after)
        if not now:
            return False
    return any(all(tokens[rest][0] is None for rest in range(place, len(tokens))) for place in now)
