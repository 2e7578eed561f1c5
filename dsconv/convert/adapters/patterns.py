"""Regular expressions of an adapter_config.json, which may come from anybody, matched in bounded time.

PEFT gives ``rank_pattern``, ``alpha_pattern`` and ``target_modules`` to Python's ``re``, whose time may grow
exponentially with a name's length. What people write there has a few repeats side by side, such as
``.*layers\\.\\d+\\..*(q|v)_proj``. A repeat within a repeat, or a back-reference, is refused.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import quote

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]  # the module that was sre_parse
else:
    import sre_parse as parser

MAX_PATTERN_CHARS = 1024
MAX_PATTERNS = 4096  # in one dictionary: a rank for each adapted layer
MAX_TRIES = 4 * 10**6  # patterns × layers: some seconds
MAX_STEPS = 10**8  # of the matcher for one name: about a second


def by_pattern(patterns: Any, key: str, default: Any) -> Any:
    """Return a layer's own value (peft ``utils/other.py``, ``get_pattern_key``).

    Args:
        patterns: {pattern of the layer's name: value}, or None.
        key: The layer's name.
        default: The value of a layer that no pattern fits.

    Raises:
        MalformedError: A pattern is none.
        UnsupportedError: A pattern could take too long.
    """
    for pattern, value in (patterns or {}).items():
        if fits(rf"(.*\.)?({pattern})$", key, pattern):
            return value
    return default


def require_few(config: Mapping[str, Any], layers: int) -> None:
    """Raise UnsupportedError where a configuration has so many patterns that trying them on each layer takes long.

    Args:
        config: The adapter_config.json.
        layers: The number of layers.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        count = len(config.get(key) or ())
        if count > MAX_PATTERNS or count * layers > MAX_TRIES:
            raise UnsupportedError(
                f"adapter_config.json: {key} has {count:,} patterns, to be tried on {layers:,} layers; dsconv tries"
                f" {MAX_PATTERNS:,} at most, and {MAX_TRIES:,} on all layers together"
            )


def ends(name: str) -> Iterator[str]:
    """Yield a dotted name, and what follows each of its dots: what PEFT compares with the names of targets."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def fits(pattern: str, name: str, shown: str | None = None) -> bool:
    """Return whether a pattern fits ``name`` from its beginning. Raises as ``by_pattern``, and names ``shown``."""
    compiled, repeats, ways = _compiled(pattern, pattern if shown is None else shown)
    if math.comb(len(name) + repeats, repeats) * ways > MAX_STEPS:
        raise UnsupportedError(
            f"adapter_config.json: the pattern {quote(shown or pattern)} takes too long for names of {len(name)}"
            " characters"
        )
    return compiled.match(name) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str, shown: str) -> tuple[re.Pattern[str], int, int]:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise UnsupportedError(f"adapter_config.json: a pattern of {len(pattern)} characters: {quote(shown)}")
    try:
        compiled, cost = re.compile(pattern), _cost(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError):
        raise MalformedError(f"adapter_config.json: {quote(shown)} is not a pattern") from None
    if cost is None:
        raise UnsupportedError(f"adapter_config.json: the pattern {quote(shown)} could take too long to match")
    return compiled, *cost


def _cost(parsed: Any) -> tuple[int, int] | None:
    """Return how many repeats stand side by side, and how many ways through branches and options there are.

    None where a repeat holds anything that can match in several ways, or text is looked for twice.
    """
    repeats, ways = 0, 1
    for operation, argument in parsed:
        name = str(operation)
        if "GROUPREF" in name or name.startswith("ASSERT"):
            return None
        inner = [_cost(part) for part in _parts(argument)]
        if any(one is None for one in inner):
            return None
        found = [one for one in inner if one is not None]
        if name == "BRANCH":
            ways *= len(found)
        elif name.endswith("REPEAT"):
            if argument[1] > 1 and any(one != (0, 1) for one in found):
                return None
            repeats, ways = (repeats + 1, ways) if argument[1] > 1 else (repeats, 2 * ways)
        repeats += sum(one[0] for one in found)
        ways *= math.prod(one[1] for one in found)
    return repeats, ways


def _parts(argument: Any) -> list[Any]:
    """Return the parsed patterns within an operation's argument."""
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [part for one in argument for part in _parts(one)]
    return []
