"""Which names the model of a config.json has a place for, read from the source of transformers without importing it.

Importing transformers takes seconds and torch with it. The class that ``architectures`` names assigns its children in
``__init__`` (``self.model = LlamaModel(config)``), and so do they: that is enough to tell ``model.lm_head.weight``, for
which LlamaForCausalLM has no place, from ``lm_head.weight``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

MAX_SOURCE_BYTES = 4 << 20
MAX_CONFIG_BYTES = 8 << 20


def children_of(config: Path) -> Callable[[str], bool] | None:
    """A test of names, or None where the architecture is not known: whether a name's first two parts are modules of it."""
    classes = _classes(config)
    if classes is None:
        return None
    top, rest = classes

    def fits(name: str) -> bool:
        first, _, more = name.partition(".")
        if first not in top:
            return False
        inner = rest.get(top[first])
        return inner is None or not more or more.partition(".")[0] in inner

    return fits


def _classes(config: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]] | None:
    """(children of the architecture's class, children of each class of its file); a child maps to its class's name."""
    try:
        if config.stat().st_size > MAX_CONFIG_BYTES:
            return None
        data = json.loads(config.read_bytes())
        architecture, model_type = str(data["architectures"][0]), str(data["model_type"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not re.fullmatch(r"[\w-]+", model_type):
        return None
    name = model_type.replace("-", "_")
    source = Path(spec.submodule_search_locations[0]) / "models" / name / f"modeling_{name}.py"
    try:
        if source.stat().st_size > MAX_SOURCE_BYTES:
            return None
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    classes = {node.name: children for node in tree.body if isinstance(node, ast.ClassDef) and (children := _children(node))}
    return (classes[architecture], classes) if architecture in classes else None


def _children(node: ast.ClassDef) -> dict[str, str]:
    found: dict[str, str] = {}
    for function in node.body:
        if not isinstance(function, ast.FunctionDef) or function.name != "__init__":
            continue
        for statement in ast.walk(function):
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                        call = statement.value.func if isinstance(statement.value, ast.Call) else None
                        found[target.attr] = call.id if isinstance(call, ast.Name) else ""
            elif isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute):
                arguments = statement.args
                if (
                    statement.func.attr in ("register_buffer", "register_parameter")
                    and arguments
                    and isinstance(arguments[0], ast.Constant)
                ):
                    found[str(arguments[0].value)] = ""
    return found
