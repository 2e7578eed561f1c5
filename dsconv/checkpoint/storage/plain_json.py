"""JSON out of files that anybody may have written: no deeper than what reads it can go."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # of lists and objects in each other; a config.json of transformers has some 6


def load_json(data: bytes | str) -> Any:
    """Return what JSON text holds.

    Whoever shows, copies or writes the value walks it with Python's own recursion, whose limit depends on where that
    happens. So the depth is bounded here.

    Raises:
        ValueError: It is not JSON, or deeper than ``MAX_DEPTH``.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return value
