"""The weights that an architecture of transformers has, read from its source without importing it.

Importing torch and transformers takes seconds; reading two source files takes milliseconds. The ``__init__`` methods of
a model's classes are followed from ``architectures`` of a config.json down, with the values of the configuration and
the defaults of its class: ``self.q_proj = nn.Linear(config.hidden_size, …)`` is a weight of a name and a shape. Nothing
of transformers is run. Nothing is guessed that these few kinds of statements and expressions do not decide: then the
answer is None, and the caller asks transformers itself.

Read from transformers: ``models/*/modeling_*.py``, ``models/*/configuration_*.py``, ``pytorch_utils.py`` (Conv1D).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.huggingface.interpreter import Interpreter
from dsconv.checkpoint.formats.huggingface.modules import CannotTell, Configuration, Module
from dsconv.checkpoint.formats.huggingface.transformers_source import class_literal, class_nodes

Shape = tuple[int, ...]
# Buffers that older files hold (modeling_utils.py, _adjust_missing_and_unexpected_keys).
NO_LONGER_SAVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
# Settings that configurations have from their base class, unless a file sets them (configuration_utils.py).
INHERITED: dict[str, Any] = {
    "is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
    "pruned_heads": {}, "torchscript": False, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip


@dataclass(frozen=True)
class Skeleton:
    """The weights of an architecture.

    Attributes:
        architecture: The class.
        shapes: {name: shape} of its parameters and of the buffers that are saved; None for a shape that is not known.
        tied: {name: the name that it is tied to}; one of the two is enough.
        prefix: The prefix of the names in the part without a head, with its dot.
        unneeded: A pattern of names that may be missing.
        ignored: A pattern of extra names that are allowed.
    """

    architecture: str
    shapes: dict[str, Shape | None]
    tied: dict[str, str]
    prefix: str
    unneeded: re.Pattern[str] | None
    ignored: re.Pattern[str] | None


def read_skeleton(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the weights of the architecture that a config.json names; None if its source does not tell.

    Args:
        config: The parsed file.
    """
    try:
        architecture, kind = str(config["architectures"][0]), str(config["model_type"])
    except (KeyError, TypeError, IndexError):
        return None
    if "auto_map" in config or "quantization_config" in config:
        return None
    classes = {node.name: node for node in class_nodes(kind)}
    if architecture not in classes or _are_converted({kind, *classes}):
        return None
    try:
        values = _configuration(config, kind)
        model = Interpreter(classes).instantiate(architecture, [values], {})
        return _skeleton(architecture, model, classes, values)
    except (
        CannotTell,
        RecursionError,
        ArithmeticError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        MemoryError,
    ):
        return None


def _are_converted(names: set[str]) -> bool:
    """Return whether transformers renames or fuses weights when it loads them into a model of one of these names."""
    converted = _converted()
    return converted is None or not names.isdisjoint(converted)


@cache
def _converted() -> frozenset[str] | None:
    """Return every word that the table of conversions of transformers quotes; None where it cannot be found."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / "conversion_mapping.py"
    try:
        return frozenset(re.findall(r'"(\w+)"', source.read_text(encoding="utf-8")))
    except OSError:
        return frozenset()  # transformers before 5 has none


def _configuration(config: Mapping[str, Any], kind: str) -> Configuration:
    nodes = class_nodes(kind, "configuration")
    by_name = {node.name: node for node in nodes}
    node = next((node for node in nodes if class_literal(node, "model_type") == kind), None)
    if node is None:
        raise CannotTell
    defaults = dict(INHERITED)
    names: dict[str, str] = {}
    for one in reversed(list(_lineage(node, by_name))):
        for statement in one.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                try:
                    defaults[statement.target.id] = ast.literal_eval(statement.value) if statement.value else None
                except ValueError:
                    defaults.pop(statement.target.id, None)
        names |= class_literal(one, "attribute_map") or {}
    given = json.loads(json.dumps(config))
    labels = given.get("id2label")  # num_labels is a property of its length
    defaults["num_labels"] = len(labels) if isinstance(labels, dict) else 2
    values = Configuration(defaults | {names.get(key, key): value for key, value in given.items()}, names)
    Interpreter(by_name).call_if_defined(node, "__post_init__", values)
    return values


def _lineage(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _lineage(classes[base.id], classes)


def _skeleton(architecture: str, model: Module, classes: Mapping[str, ast.ClassDef], values: Configuration) -> Skeleton:
    lineage = list(_lineage(classes[architecture], classes))

    def attribute(name: str) -> Any:
        return next((found for node in lineage if (found := class_literal(node, name)) is not None), None)

    tied: dict[str, str] = {}
    if values.values.get("tie_word_embeddings", True):
        keys = attribute("_tied_weights_keys")
        if isinstance(keys, dict):
            tied = {str(key): str(value) for key, value in keys.items()}
        elif keys:
            raise CannotTell  # a list of the dropped names does not say what they are tied to
    prefix = attribute("base_model_prefix")
    return Skeleton(
        architecture,
        dict(model.flat()),
        tied,
        f"{prefix}." if isinstance(prefix, str) and prefix else "",
        _pattern(attribute("_keys_to_ignore_on_load_missing")),
        _pattern(
            [*(attribute("_keys_to_ignore_on_load_unexpected") or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
        ),
    )


def _pattern(texts: Any) -> re.Pattern[str] | None:
    if not isinstance(texts, (list, tuple, set)) or not texts:
        return None
    try:
        return re.compile("|".join(f"({text})" for text in texts))
    except re.error:
        raise CannotTell from None
