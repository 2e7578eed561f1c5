"""Choose the name under which a tied weight is stored.

transformers drops the names in a model's ``_tied_weights_keys`` when it saves, and looks for the other one when it
loads (transformers ``modeling_utils.py``, ``remove_tied_weights_from_state_dict``). The table is read from the
model's source file, not by importing transformers, which takes seconds; without it the name that DeepSpeed calls the
owner is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dsconv.checkpoint.formats.huggingface.transformers_source import tied_weights_keys


def tied_keys(config: Path | None) -> tuple[str, ...]:
    """Return the patterns of the names that transformers drops for the architecture of ``config``; () if not known."""
    return tuple(str(key) for key in tied_weights_keys(config))


def tied_pairs(config: Path | None) -> dict[str, str]:
    """Return {name that transformers drops: name that it keeps} if the architecture of ``config`` gives both.

    Some of them may be patterns.
    """
    table = tied_weights_keys(config)
    return {str(key): str(value) for key, value in table.items()} if isinstance(table, dict) else {}


def stored_name(owner: str, aliases: Iterable[str], dropped: tuple[str, ...]) -> str:
    """Return the owner, or the first alias that transformers does not drop where it drops the owner."""
    names = (owner, *aliases)
    return next((name for name in names if not any(_matches(pattern, name) for pattern in dropped)), owner)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None or name.endswith("." + pattern)
    except re.error:
        return pattern == name
