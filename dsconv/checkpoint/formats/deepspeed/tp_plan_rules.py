"""How tensor-parallel shards are joined if the trainer saved no rules: by the model's config and its parallel plan.

AutoTP training of DeepSpeed before 0.18.9 saves no ``universal_checkpoint_info``. A shard's shape then says how it was
cut if ``config.json`` leaves one way only in which the full tensor has a model's sizes; the plan that transformers has
for the architecture (5.24 ``distributed/tensor_parallel.py``: ``base_model_tp_plan`` of the config class, ``_tp_plan``
of the model class) decides between several. Fused projections, whose order the shape does not tell, are refused unless
the plan packs them. The sources of transformers are read, not imported, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import find_config, read_config
from dsconv.checkpoint.formats.deepspeed.shards import Join, concatenated, in_parts, replicated
from dsconv.checkpoint.formats.huggingface.config_sizes import LAYERS, sizes_of
from dsconv.checkpoint.formats.huggingface.transformers_source import class_literal, class_nodes
from dsconv.checkpoint.map.regions import Shape
from dsconv.errors import UnsupportedError
from dsconv.text import count, quote

COLUMNS = {"colwise", "colwise_rep", "colwise_gather_output", "embedding_rowwise"}
ROWS = {"rowwise", "rowwise_rep", "rowwise_split_input", "embedding_colwise"}
WHOLE = {"replicated_with_grad_allreduce", "replicate"}
FUSED = re.compile(r"qkv|query_key_value|c_attn|W_pack|Wqkv|gate_up|in_proj", re.IGNORECASE)


class PlanRules:
    """The rules that a model's configuration gives.

    Args:
        path: The file that has no rules, for messages.
        config: The config.json, or None if there is none, which makes ``join`` refuse.
        sizes: The model's sizes.
        plan: The style of each pattern of modules.
    """

    def __init__(self, path: Path, config: Path | None, sizes: dict[str, int], plan: dict[str, str]) -> None:
        self.path = path
        self.config = config
        self.known = {1, *sizes.values()} - {0}
        self.layers = {
            leaf: tuple(sizes[size] for size in full)
            for leaf, full in LAYERS.items()
            if all(sizes[size] for size in full)
        }
        self.plan = [
            (re.compile(r"(?:.*\.)?" + re.escape(key).replace(r"\*", r"\d+")), style) for key, style in plan.items()
        ]

    @classmethod
    def find(cls, folders: Sequence[Path], path: Path) -> PlanRules:
        """Return the rules by the ``config.json`` that belongs to a checkpoint in ``folders``.

        Args:
            folders: Where to look.
            path: The file that has no rules, for messages.
        """
        config = find_config(folders)
        data = read_config(config) if config is not None else None
        return cls(path, config, sizes_of(data), _plan(data)) if data is not None else cls(path, None, sizes_of({}), {})

    def join(self, name: str, shapes: Sequence[Shape]) -> Join:
        """Return how shards of ``shapes`` make ``name``; raise UnsupportedError where that is not certain."""
        where = f"{self.path}: parameter {quote(name)}"
        if self.config is None:
            raise UnsupportedError(
                f"{where}: the trainer saved no universal_checkpoint_info, so how its {count(len(shapes), 'shard')}"
                " make the full tensor is not known. Put the model's config.json beside the checkpoint, or save again"
                " with DeepSpeed 0.18.9 or later"
            )
        style = self._style(name)
        options = self._options(name, shapes)
        chosen = _of_style(style, name, shapes)
        # A plan may not have been followed: where a shard could as well be the whole tensor it decides nothing.
        way = options[0] if len(options) == 1 else chosen if chosen in options and "whole" not in options else None
        fused = style != "packed_colwise" and FUSED.search(name)
        if way is None or fused:
            reason = (
                "its parts may be in any order"
                if fused
                else f"{len(options)} ways would fit"
                if options
                else "no way fits"
            )
            raise UnsupportedError(
                f"{where}: there is no universal_checkpoint_info, and {self.config} does not settle how shards of"
                f" the shapes {', '.join(str(list(shape)) for shape in shapes[:8])} make the full tensor"
                f" ({reason}). Save again with DeepSpeed 0.18.9 or later"
            )
        if way == "whole":
            return replicated(shapes[0], len(shapes))
        if style == "packed_colwise" and way == "0":
            rows = [shape[0] for shape in shapes]
            return in_parts(shapes, 0, [[row - row // 2 for row in rows], [row // 2 for row in rows]], where)
        return concatenated(shapes, int(way), where)

    def _style(self, name: str) -> str | None:
        module = name.rpartition(".")[0]
        return next((style for pattern, style in self.plan if pattern.fullmatch(module)), None)

    def _options(self, name: str, shapes: Sequence[Shape]) -> list[str]:
        """Return the ways to join that give a tensor of the right shape, or of sizes that the model has.

        They are ``whole``, and the number of a dimension along which shards are joined.
        """
        leaf, _, kind = name.rpartition(".")
        full = self.layers.get(leaf.rpartition(".")[2])
        full = full if kind == "weight" or full is None else full[:1]

        def fits(shape: Shape) -> bool:
            return shape == full if full is not None else all(size in self.known for size in shape)

        found = []
        if len(set(shapes)) == 1 and fits(shapes[0]):
            found.append("whole")
        for dim in range(min(len(shapes[0]), 2)):
            rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
            joined = (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
            if len(rests) == 1 and fits(joined):
                found.append(str(dim))
        return found


def _of_style(style: str | None, name: str, shapes: Sequence[Shape]) -> str | None:
    """Return the way that a style cuts a weight, or its bias, which a row-parallel layer keeps whole."""
    if style in COLUMNS or style == "packed_colwise":
        return "0"
    if style in ROWS:
        return "1" if len(shapes[0]) > 1 else "whole"
    return "whole" if style in WHOLE else None


def _plan(config: dict[str, Any]) -> dict[str, str]:
    """Return the style of each pattern of modules for the architecture that ``config`` names."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        return {}
    plan: dict[str, str] = {}
    for node in class_nodes(model_type, "configuration"):
        if class_literal(node, "model_type") == model_type:
            plan |= _styles(class_literal(node, "base_model_tp_plan"))
    for node in class_nodes(model_type, "modeling"):
        if isinstance(architectures, list) and node.name in architectures:
            plan |= _styles(class_literal(node, "_tp_plan"))
    return plan


def _styles(value: Any) -> dict[str, str]:
    return {key: style for key, style in value.items() if isinstance(style, str)} if isinstance(value, dict) else {}
