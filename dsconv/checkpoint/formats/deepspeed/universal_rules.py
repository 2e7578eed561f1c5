"""How tensor-parallel shards are joined, by the ``universal_checkpoint_info`` that the trainer saved with them.

Read from DeepSpeed: ``checkpoint/ds_to_universal.py`` ``merge_tp_slices`` (which rule wins, ``re.match``, the
default of dimension 0), ``module_inject/layers.py`` ``collect_autotp_universal_checkpoint_info`` (what AutoTP writes)
and ``checkpoint/affine.py`` (maps that say for each rank which views of the full tensor it holds). Megatron-DeepSpeed
writes the same keys, without maps, under names such as ``\\d+.mlp.dense_h_to_4h.weight``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.name_patterns import Patterns
from dsconv.checkpoint.formats.deepspeed.shards import Join, along, concatenated, in_parts, replicated
from dsconv.checkpoint.map.pieces import row_major
from dsconv.checkpoint.map.regions import Interval, Shape
from dsconv.checkpoint.map.training import ShardRule, SubParams
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import count, quote

MAP_VERSION = 1  # AFFINE_MAP_FORMAT_VERSION, checkpoint/affine.py


class UniversalInfo:
    """The rules of one checkpoint.

    The trainer's patterns match the names that its module had, wrappers included, so names are turned back into those.

    Args:
        info: ``universal_checkpoint_info`` of the model states.
        path: The file that it is in, for messages.
        stored: The name in the file of each name that a wrapper was taken out of.
    """

    def __init__(self, info: Mapping[str, Any], path: Path, stored: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._stored = stored or {}
        self._info = info
        self.version = info.get("universal_checkpoint_version", 0.0)
        self.replicated = self._list("tp_replicated_parameter_patterns")
        self.pipeline_replicated = self._list("pipeline_replicated_parameter_patterns")
        self.averaged = self._list("parameter_to_average_patterns")
        self.rows = self._list("parameter_with_row_parallelism_patterns")
        self.vocabulary = self._list("vocabulary_parameter_patterns")
        self.halves = self._list("parameter_with_2_sub_params_cat_dim_0")
        self.unsupported = self._mapping("autotp_unsupported_parameter_patterns")
        self.widths = info.get("sub_param_shard_widths") or {}
        self.parts = self._sub_params()
        maps = info.get("affine_map") or {}
        if not isinstance(maps, dict) or not isinstance(self.widths, dict):
            raise MalformedError(
                f"{path}: affine_map and sub_param_shard_widths of universal_checkpoint_info should be mappings"
            )
        version = maps.get("version", MAP_VERSION)
        if not isinstance(version, int) or version > MAP_VERSION:
            raise UnsupportedError(
                f"{path}: affine maps of version {safe_repr(version)}; dsconv reads version {MAP_VERSION}"
            )
        self.maps = self._mapping("params", maps)
        # AutoTP never pads: its original_vocab_size is that of whichever parameter came first.
        self.vocabulary_size = (
            None if "autotp_unsupported_parameter_patterns" in info else info.get("original_vocab_size")
        )

    def is_pipeline_replicated(self, name: str) -> bool:
        """Return whether the trainer says that the first pipeline stage's copy of a parameter is the right one."""
        return self.pipeline_replicated.find(self._stored.get(name, name)) is not None

    @property
    def tied_names(self) -> set[str]:
        """The names of tied pipeline modules' parameters among the patterns; nothing else may tell their keys."""
        lists = (value for value in self._info.values() if isinstance(value, (list, tuple)))
        texts = (text for value in lists for text in value if isinstance(text, str) and len(text) < 1024)
        plain = (re.sub(r"\\([^0-9A-Za-z])", r"\1", text.removeprefix("^").removesuffix("$")) for text in texts)
        return {name for name in plain if re.fullmatch(r"tied_modules\.[\w.]+", name)}

    def _list(self, key: str) -> Patterns:
        value = self._info.get(key) or []
        if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
            raise MalformedError(f"{self.path}: {key} of universal_checkpoint_info is not a list of name patterns")
        return Patterns(((pattern, pattern) for pattern in value), f"{self.path}: {key}")

    def _mapping(self, key: str, source: Any = None) -> Patterns:
        value = (self._info if source is None else source).get(key) or {}
        if not isinstance(value, dict) or not all(isinstance(pattern, str) for pattern in value):
            raise MalformedError(f"{self.path}: {key} of universal_checkpoint_info is not a mapping of name patterns")
        return Patterns(value.items(), f"{self.path}: {key}")

    def _sub_params(self) -> Patterns:
        rows = self._info.get("parameter_with_sub_params") or []
        try:
            pairs = [
                (pattern, SubParams(pattern, tuple(row["shape"]), row["partition_dim"], tuple(row["patterns"])))
                for row in rows
                for pattern in row["patterns"]
            ]
        except (TypeError, KeyError):
            raise MalformedError(
                f"{self.path}: parameter_with_sub_params is not a list of patterns, shape and partition_dim"
            ) from None
        if not all(isinstance(pattern, str) and type(spec.dim) is int for pattern, spec in pairs):
            raise MalformedError(
                f"{self.path}: parameter_with_sub_params is not a list of patterns, shape and partition_dim"
            )
        return Patterns(pairs, f"{self.path}: parameter_with_sub_params")

    def join(self, name: str, shapes: Sequence[Shape]) -> Join:
        """Return how shards of ``shapes``, one per rank, make the parameter ``name``.

        Raises:
            InconsistentCheckpointError: The shapes are not those that the rule says.
            UnsupportedError: The trainer said that there is no rule.
            MalformedError: The metadata cannot be read.
        """
        where = f"{self.path}: parameter {quote(name)}"
        name = self._stored.get(name, name)
        if self.replicated.find(name) is not None and len(set(shapes)) == 1:
            return self._without_padding(name, replicated(shapes[0], len(shapes)), where)
        found = self.maps.find(name)
        if found is not None:
            return from_affine_map(found, shapes, where)
        reason = self.unsupported.find(name)
        if reason is not None:
            raise UnsupportedError(
                f"{where} cannot be joined from its shards, says the trainer: {safe_repr(reason, 200)}"
            )
        if self.replicated.find(name) is not None or self.averaged.find(name) is not None:
            if len(set(shapes)) > 1:
                raise InconsistentCheckpointError(
                    f"{where} should be whole on every rank and has shapes {[list(s) for s in shapes[:8]]}"
                )
            return replicated(shapes[0], len(shapes), averaged=self.replicated.find(name) is None)
        if self.halves.find(name) is not None:
            rows = [shape[0] if shape else 0 for shape in shapes]
            return in_parts(shapes, 0, [[row - row // 2 for row in rows], [row // 2 for row in rows]], where)
        parts = self.parts.find(name)
        if isinstance(parts, SubParams):
            return self._in_sub_params(shapes, parts, where)
        dim = 1 if self.rows.find(name) is not None else 0
        return self._without_padding(name, concatenated(shapes, dim, where), where)

    def cut(self, name: str) -> ShardRule:
        """Return what a loader of another degree must know of a parameter; rules win as in ``merge_tp_slices``."""
        name = self._stored.get(name, name)
        vocabulary = self.vocabulary.find(name) is not None
        padded: dict[str, Any] = {"vocabulary": vocabulary, "rows": self.vocabulary_size if vocabulary else None}
        view, parts = self.maps.find(name), self.parts.find(name)
        if view is not None:
            shape = view.get("logical_shape") if isinstance(view, dict) else None
            if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n >= 0 for n in shape):
                raise MalformedError(
                    f"{self.path}: the affine map of {quote(name)} is for a tensor of shape {safe_repr(shape)}"
                )
            return ShardRule(None, view=tuple(shape), **padded)
        if self.replicated.find(name) is not None or self.averaged.find(name) is not None:
            return ShardRule(None, **padded)
        if self.halves.find(name) is not None:
            return ShardRule(0, halves=True, **padded)
        if isinstance(parts, SubParams):
            return ShardRule(None, parts=parts, **padded)
        return ShardRule(1 if self.rows.find(name) is not None else 0, **padded)

    def _without_padding(self, name: str, join: Join, where: str) -> Join:
        size = self.vocabulary_size
        if size is None or self.vocabulary.find(name) is None or not join.shape:
            return join
        if type(size) is not int or size <= 0:
            raise MalformedError(f"{where}: original_vocab_size is {safe_repr(size)}")
        if join.shape[0] <= size:
            return join
        runs: list[tuple[Interval, ...]]
        if join.copies:
            runs = [((0, join.shape[0]),)] * (1 + len(join.copies))
        else:
            by_rank = {block.rank: block.region[0] for block in join.blocks}
            runs = [by_rank.get(rank, ()) for rank in range(max(by_rank) + 1)]
        return along(join.shape, 0, runs, where, total=size)

    def _in_sub_params(self, shapes: Sequence[Shape], spec: SubParams, where: str) -> Join:
        """Return the join of a parameter of several others, cut as the view ``spec.shape``.

        Its entry at ``partition_dim`` lists the parts' sizes, or (before 0.4) counts them.
        """
        pattern, shape, dim = spec.pattern, spec.shape, spec.dim
        if not 0 <= dim < len(shape):
            raise MalformedError(f"{where}: partition_dim {dim} of the shape {safe_repr(shape)}")
        ranks = len(shapes)
        sizes = shape[dim]
        total = sum(math.prod(s) for s in shapes)
        if type(sizes) is int and sizes > 0:
            if dim >= len(shapes[0]):
                raise UnsupportedError(
                    f"{where}: {sizes} sub-parameters of the view {safe_repr(shape)}, which records no widths"
                )
            full = sum(s[dim] for s in shapes)
            sizes = (full // sizes,) * sizes if full % sizes == 0 else ()
        if (
            not isinstance(sizes, (tuple, list))
            or not sizes
            or not all(type(size) is int and size > 0 for size in sizes)
        ):
            raise MalformedError(f"{where}: the sub-parameters {safe_repr(shape[dim])} of {safe_repr(shape)}")
        widths = self.widths.get(pattern)
        if widths is None:
            if self.version is not None and isinstance(self.version, (int, float)) and self.version >= 0.4:
                raise MalformedError(f"{where} has sub-parameters and no sub_param_shard_widths")
            if any(size % ranks for size in sizes):
                raise UnsupportedError(
                    f"{where}: sub-parameters of {list(sizes)} do not divide by {count(ranks, 'rank')}, and no widths"
                    " are recorded"
                )
            widths = [[size // ranks] * ranks for size in sizes]
        try:
            fits = [sum(row) for row in widths] == list(sizes) and all(
                len(row) == ranks and min(row) >= 0 for row in widths
            )
        except TypeError:
            fits = False
        if not fits:
            raise MalformedError(
                f"{where}: sub_param_shard_widths {safe_repr(widths)} are not of {list(sizes)} over"
                f" {count(ranks, 'rank')}"
            )
        logical = [sum(sizes) if d == dim else size for d, size in enumerate(shape)]
        known = math.prod(size for size in logical if type(size) is int and size > 0)
        logical = [size if type(size) is int and size > 0 else total // known for size in logical]
        runs: list[list[Interval]] = [[] for _ in shapes]
        start = 0
        for row in widths:
            for rank, size in enumerate(row):
                runs[rank].append((start, start + size))
                start += size
        return of_view(tuple(logical), dim, runs, shapes, where)


def of_view(logical: Shape, dim: int, runs: Sequence[Sequence[Interval]], shapes: Sequence[Shape], where: str) -> Join:
    """Return the join as ``along`` does, for a view ``logical`` whose first dimensions are one of the parameter's."""
    folded = len(logical) - len(shapes[0]) + 1
    if folded < 1:
        raise InconsistentCheckpointError(
            f"{where}: shards of {count(len(shapes[0]), 'dimension')} of a tensor of {len(logical)}"
        )
    for rank, shape in enumerate(shapes):
        held = [sum(b - a for a, b in runs[rank]) if d == dim else size for d, size in enumerate(logical)]
        expected = (math.prod(held[:folded]), *held[folded:])
        if shape != expected:
            raise InconsistentCheckpointError(
                f"{where}: rank {rank}'s shard has shape {list(shape)}; the checkpoint's metadata says"
                f" {list(expected)}. A shard is from another save, or ranks were swapped"
            )
    full = (math.prod(logical[:folded]), *logical[folded:])
    if dim >= folded:
        return along(full, dim - folded + 1, runs, where)
    size, inner = logical[dim], math.prod(logical[dim + 1 : folded])
    outer = math.prod(logical[:dim])
    flat = [[((o * size + a) * inner, (o * size + b) * inner) for o in range(outer) for a, b in mine] for mine in runs]
    return along(full, 0, flat, where)


def from_affine_map(entry: Any, shapes: Sequence[Shape], where: str) -> Join:
    """Return the join that an affine map describes.

    Each piece of the map must be a range of one dimension and whole in the others.
    """
    try:
        logical = tuple(entry["logical_shape"])
        ranks = [entry["ranks"][rank] for rank in range(len(shapes))]
        held = [tuple(rank["shard_shape"]) for rank in ranks]
        pieces = [[_piece(piece) for piece in rank["pieces"]] for rank in ranks]
        numbers = [*logical, *(n for shape in held for n in shape)]
        numbers += [n for mine in pieces for shape, first, _, start, _, _ in mine for n in (*shape, first, start)]
        if not all(type(n) is int and n >= 0 for n in numbers) or len(entry["ranks"]) != len(shapes):
            raise TypeError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise MalformedError(
            f"{where}: its affine map is not one of {count(len(shapes), 'rank')}: {safe_repr(entry, 200)}"
        ) from None
    if any(scale != 1.0 for mine in pieces for *_, scale in mine):
        raise UnsupportedError(f"{where}: its shards are scaled; undoing that would not be exact")
    cut = {
        d
        for mine in pieces
        for shape, *_ in mine
        for d, (a, b) in enumerate(zip(shape, logical, strict=False))
        if a != b
    }
    if len(cut) > 1 or any(len(shape) != len(logical) for mine in pieces for shape, *_ in mine):
        raise UnsupportedError(f"{where}: its shards are cut in more than one dimension: {safe_repr(entry, 200)}")
    if not logical:
        return replicated((), len(shapes))
    dim = cut.pop() if cut else 0
    runs: list[list[Interval]] = []
    for rank, mine in enumerate(pieces):
        found = []
        for shape, source, source_strides, dest, dest_strides, _ in mine:
            inner = math.prod(logical[dim + 1 :])
            if not math.prod(shape):
                continue
            if (
                (source_strides, dest_strides) != (row_major(logical), row_major(held[rank]))
                or source % inner
                or dest % inner
            ):
                raise UnsupportedError(f"{where}: a piece of its affine map is not a box: {safe_repr(entry, 200)}")
            found.append((dest // inner, source // inner, shape[dim]))
        found.sort()
        starts = [sum(width for _, _, width in found[:i]) for i in range(len(found))]
        if any(
            dest != start or source + width > logical[dim]
            for (dest, source, width), start in zip(found, starts, strict=True)
        ):
            raise MalformedError(
                f"{where}: rank {rank}'s pieces of its affine map do not fill its shard: {safe_repr(entry, 200)}"
            )
        runs.append([(source, source + width) for _, source, width in found])
    return of_view(logical, dim, runs, shapes, where)


def _piece(piece: Any) -> tuple[Shape, int, Shape, int, Shape, Any]:
    """Return the shape, the offset and strides in the full tensor, those in the shard, and the scale."""
    (source, source_strides), (dest, dest_strides) = piece["source"], piece["dest"]
    return tuple(piece["shape"]), source, tuple(source_strides), dest, tuple(dest_strides), piece.get("scale", 1.0)
