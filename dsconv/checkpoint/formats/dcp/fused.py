"""Cut the states of torchtitan's fused attention weights as its own model cuts the weights.

torchtitan 0.3's ``models/common/attention.py`` ``FusedQKVLinear`` has one parameter, ``wqkv``, which its state dict
shows as ``wq``, ``wk`` and ``wv`` (``_split_qkv_on_save``); the optimizer's states stay whole. The rows of ``wqkv``
are, for each key-value head, those of its query heads, its key head and its value head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dsconv.checkpoint.config_files import read_config
from dsconv.checkpoint.map.patched import entry_of
from dsconv.checkpoint.map.patches import View
from dsconv.checkpoint.map.regions import Sizes
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.text import quote

FUSED = re.compile(r"(?P<before>(?:.*\.)?)wqkv\.(?P<kind>weight|bias)")
NORM = "q_norm.weight"  # of one head


class Fused:
    """The fused parameters of a model.

    Args:
        entries: The model's tensors.
        find: Returns the name in ``entries`` for one of the optimizer's, or None.
        config: The model's config.json, if there is one.
    """

    def __init__(
        self, entries: Mapping[str, TensorEntry], find: Callable[[str], str | None], config: Path | None
    ) -> None:
        self._entries = entries
        self._find = find
        self._config = config

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the query, key and value weights that a parameter of the optimizer is; () if it is no such one."""
        match = FUSED.fullmatch(name)
        if match is None:
            return ()
        found = [self._find(f"{match['before']}w{part}.{match['kind']}") for part in "qkv"]
        return tuple(own for own in found if own is not None) if None not in found else ()

    def shape(self, name: str) -> Sizes:
        """Return the shape of a fused parameter."""
        shapes = [self._entries[part].shape for part in self.parts(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def rows(self, part: str) -> int:
        """Return the number of rows of one of the three."""
        return self._entries[part].shape[0]

    def head_dim(self, name: str) -> int:
        """Return the rows of one head of a fused parameter.

        Raises:
            UnsupportedError: Neither the model's tensors nor a config.json tell.
            InconsistentCheckpointError: The rows are not those of heads of that size.
        """
        query, key, value = (self._entries[part].shape[0] for part in self.parts(name))
        before = self.parts(name)[0].rpartition("wq.")[0].removesuffix("qkv_linear.")
        norm = self._entries.get(f"{before}{NORM}")
        has_norm = norm is not None and len(norm.shape) == 1
        size = norm.shape[0] if norm is not None and has_norm else self._configured(name, query, key)
        if size < 1 or key != value or key % size or query % key:
            raise InconsistentCheckpointError(
                f"{quote(name)} of the optimizer is {query} rows of queries, {key} of keys and {value} of values, which"
                f" are no heads of {size} rows"
            )
        return size

    def _configured(self, name: str, query: int, key: int) -> int:
        data = read_config(self._config) if self._config is not None else None
        heads = (
            next((data[k] for k in ("num_attention_heads", "n_heads") if type(data.get(k)) is int), 0) if data else 0
        )
        if heads < 1 or query % heads:
            where = (
                f"{self._config} does not tell" if data is not None else "no config.json beside the checkpoint tells"
            )
            raise UnsupportedError(
                f"the optimizer's states of {quote(name)} are those of the query, key and value weights, with their"
                f" rows interleaved by attention head, and {where} num_attention_heads: put the model's config.json"
                f" there. (There are {query} rows of queries, {key} of keys.)"
            )
        return query // heads


def cut_fused(entry: TensorEntry, fused: Fused, name: str) -> dict[str, TensorEntry]:
    """Return the states of the query, key and value weights that a state of a fused parameter holds.

    Args:
        entry: The state.
        fused: The fused parameters of the model.
        name: The parameter.

    Raises:
        UnsupportedError, InconsistentCheckpointError: As ``Fused.head_dim`` does.
    """
    head, parts = fused.head_dim(name), fused.parts(name)
    query, key = (fused.rows(part) for part in parts[:2])
    of_group = (query // key + 2) * head
    whole = View.of(entry)
    cut: dict[str, list[View]] = {part: [] for part in parts}
    for group in range(key // head):
        at = group * of_group
        for part, length in zip(parts, (of_group - 2 * head, head, head), strict=True):
            cut[part].append(whole.narrow(0, at, length))
            at += length
    return {part: entry_of(View.cat(views), part) for part, views in cut.items()}
