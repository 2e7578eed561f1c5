"""Read the source files of transformers without importing it, since importing it and torch takes seconds.

Three questions are answered here, each for the architecture that a ``config.json`` names:

- Which names does the model have a place for? A class assigns its children in ``__init__``
  (``self.model = LlamaModel(config)``), and so do they. That tells ``model.lm_head.weight``, for which
  LlamaForCausalLM has no place, from ``lm_head.weight``.
- Under which name is a tied weight stored? ``_tied_weights_keys`` says so.
- How do tensor-parallel ranks shard the model? ``base_model_tp_plan`` and ``_tp_plan`` say so.

Read from transformers: ``models/*/modeling_*.py`` and ``models/*/configuration_*.py``.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import read_config

MAX_SOURCE_BYTES = 4 << 20


def read_architecture(config: Path) -> tuple[str, str] | None:
    """Return the first of ``architectures`` and the ``model_type`` of a config.json; None if it lacks one."""
    data = read_config(config) or {}
    named = data.get("architectures")
    if not isinstance(named, list) or not named or "model_type" not in data:
        return None
    return str(named[0]), str(data["model_type"])


@functools.lru_cache(maxsize=4)  # several questions are asked of one model, and parsing takes most of their time
def class_nodes(model_type: str, kind: str = "modeling") -> tuple[ast.ClassDef, ...]:
    """Return the classes of ``models/<model_type>/<kind>_<model_type>.py``; none where transformers lacks that file.

    Args:
        model_type: As config.json has it; it comes from a file, so anything but letters, digits, _ and - finds nothing.
        kind: ``modeling`` or ``configuration``.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not re.fullmatch(r"[\w-]+", model_type):
        return ()
    name = model_type.replace("-", "_")
    source = Path(spec.submodule_search_locations[0]) / "models" / name / f"{kind}_{name}.py"
    try:
        if source.stat().st_size > MAX_SOURCE_BYTES:
            return ()
        nodes = ast.parse(source.read_text(encoding="utf-8")).body
        return tuple(node for node in nodes if isinstance(node, ast.ClassDef))
    except (OSError, SyntaxError, ValueError):
        return ()


def class_literal(node: ast.ClassDef, name: str) -> Any:
    """Return the value that a class assigns to its attribute ``name``; None if it has none or it is no literal."""
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if statement.value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            try:
                return ast.literal_eval(statement.value)
            except ValueError:
                return None
    return None


def tied_weights_keys(config: Path | None) -> Any:
    """Return ``_tied_weights_keys`` of the architecture: a list, or a dict from transformers 5 on; () where unknown."""
    named = read_architecture(config) if config is not None else None
    if named is None:
        return ()
    architecture, model_type = named
    node = next((node for node in class_nodes(model_type) if node.name == architecture), None)
    value = class_literal(node, "_tied_weights_keys") if node is not None else None
    return value if isinstance(value, (dict, list, tuple)) else ()


def children_of(config: Path) -> Callable[[str], bool] | None:
    """Return a test of names: whether a name's first two parts are modules of the model. None if that is unknown."""
    named = read_architecture(config)
    if named is None:
        return None
    architecture, model_type = named
    classes = {node.name: children for node in class_nodes(model_type) if (children := _children(node))}
    if architecture not in classes:
        return None
    top = classes[architecture]

    def fits(name: str) -> bool:
        first, _, more = name.partition(".")
        if first not in top:
            return False
        inner = classes.get(top[first])
        return inner is None or not more or more.partition(".")[0] in inner

    return fits


def _children(node: ast.ClassDef) -> dict[str, str]:
    """Return what ``__init__`` assigns or registers: {attribute: its class, or "" where that is not plain}."""
    found: dict[str, str] = {}
    for function in node.body:
        if not isinstance(function, ast.FunctionDef) or function.name != "__init__":
            continue
        for statement in ast.walk(function):
            if isinstance(statement, ast.Assign):
                call = statement.value.func if isinstance(statement.value, ast.Call) else None
                for target in statement.targets:
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        found[target.attr] = call.id if isinstance(call, ast.Name) else ""
            elif isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute) and statement.args:
                name = statement.args[0]
                if statement.func.attr in ("register_buffer", "register_parameter") and isinstance(name, ast.Constant):
                    found[str(name.value)] = ""
    return found
