"""Under which of its names a tied weight is stored.

transformers drops the names in a model's ``_tied_weights_keys`` when it saves, and looks for the other one when it loads
(transformers 5.24 ``modeling_utils.py``, ``remove_tied_weights_from_state_dict``). The table is read from the model's
source file, not by importing transformers, which takes seconds; without it the name that DeepSpeed calls the owner is kept.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_SOURCE_BYTES = 4 << 20


def tied_keys(config: Path | None) -> tuple[str, ...]:
    """The patterns of the names that transformers drops for the architecture of ``config``; () when not known."""
    return tuple(str(key) for key in _table(config))


def tied_pairs(config: Path | None) -> dict[str, str]:
    """{name that transformers drops: name that it keeps} where the architecture of ``config`` says both; some may be patterns."""
    table = _table(config)
    return {str(key): str(value) for key, value in table.items()} if isinstance(table, dict) else {}


def _table(config: Path | None) -> Any:
    """``_tied_weights_keys`` of the architecture of ``config``: a list or, from transformers 5 on, a dict; () when not known."""
    if config is None:
        return ()
    try:
        data = json.loads(config.read_bytes())
        architecture, model_type = str(data["architectures"][0]), str(data["model_type"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ()
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not re.fullmatch(r"[\w-]+", model_type):
        return ()
    name = model_type.replace("-", "_")
    source = Path(spec.submodule_search_locations[0]) / "models" / name / f"modeling_{name}.py"
    try:
        if source.stat().st_size > MAX_SOURCE_BYTES:
            return ()
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == architecture:
            return _literal_keys(node)
    return ()


def _literal_keys(node: ast.ClassDef) -> Any:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_tied_weights_keys" for t in statement.targets):
            try:
                value = ast.literal_eval(statement.value)
            except ValueError:
                return ()
            return value if isinstance(value, (dict, list, tuple)) else ()
    return ()


def stored_name(owner: str, aliases: Iterable[str], dropped: tuple[str, ...]) -> str:
    """The owner, or the first alias that transformers does not drop where it drops the owner."""
    names = (owner, *aliases)
    return next((name for name in names if not any(_matches(pattern, name) for pattern in dropped)), owner)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None or name.endswith("." + pattern)
    except re.error:
        return pattern == name
