"""``universal_checkpoint_info``: what a training code told DeepSpeed about parameters that tensor parallelism cuts.

Patterns of names say how shards of a parameter are joined, and so how a loader of another tensor-parallel size must cut
it. From one model-parallel rank there is nothing to join, yet the loader's keys must be there. Read from DeepSpeed 0.19.8
``checkpoint/ds_to_universal.py`` (``merge_tp_slices``) and ``checkpoint/constants.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsconv.checkpoint.standins import Instance, shown
from dsconv.checkpoint.tensormap import Extent, Piece, TensorEntry
from dsconv.errors import MalformedError, UnsupportedError

SUBPARAM = "deepspeed.checkpoint.universal_checkpoint.SubparamShape"
MAX_PATTERN_CHARS = 1000
MAX_REPEATS = 3  # of a pattern: matching one takes time to that power of a name's length


def written_form(info: Mapping[str, Any], name: str, entry: TensorEntry, path: Path) -> tuple[tuple[int, ...], dict[str, Any], TensorEntry]:
    """(shape, keys beside ``param``, entry) of what is written for a parameter or a state of it.

    A 0-d parameter is written with shape [1], since the loader cuts the first dimension; rows that only pad a vocabulary
    are left out. Raises UnsupportedError or MalformedError, naming the pattern.
    """
    keys: dict[str, Any] = {}
    shape = entry.shape or (1,)
    if info.get("affine_map"):
        raise UnsupportedError(f"{path}: universal_checkpoint_info has an affine_map, of AutoTP; this version does not convert those")
    if _matches(info, "tp_replicated_parameter_patterns", name, path) or _matches(info, "parameter_to_average_patterns", name, path):
        pass
    elif _matches(info, "parameter_with_2_sub_params_cat_dim_0", name, path):
        keys |= {"cat_dim": 0, "param_n_sub_params": 2}
    elif (sub := _sub_params(info, name, path)) is not None:
        shape, keys["sub_param_shape"] = _sub_form(sub, entry, path)
    else:
        keys["cat_dim"] = 1 if _matches(info, "parameter_with_row_parallelism_patterns", name, path) else 0
    if _matches(info, "vocabulary_parameter_patterns", name, path):
        rows = info.get("original_vocab_size")
        if type(rows) is not int or rows < 1 or len(shape) != 2:
            raise MalformedError(f"{path}: universal_checkpoint_info says that {name!r} of shape {list(shape)} pads {shown(rows)} rows")
        keys["vocab_tensor"] = True
        rows = min(rows, shape[0])
        shape, entry = (rows, shape[1]), first_elements(entry, rows * shape[1], (rows, shape[1]))
    return shape, keys, entry


def first_elements(entry: TensorEntry, numel: int, shape: tuple[int, ...]) -> TensorEntry:
    """The first ``numel`` elements of ``entry``, which is of pieces of the whole tensor, as a tensor of ``shape``."""
    if numel == entry.numel:
        return entry

    def layout() -> tuple[Piece, ...]:
        kept = []
        for piece in entry.pieces:
            count = min(piece.numel, numel - piece.start)
            if count > 0:
                extent = Extent(piece.extent.record, piece.extent.offset_bytes, count * entry.dtype.itemsize)
                kept.append(Piece(extent, piece.start, count))
        return tuple(kept)

    if any(piece.region is not None or piece.strides is not None for piece in entry.pieces):
        raise UnsupportedError(f"{entry.name}: rows that pad a vocabulary can be left out of a tensor that no model parallelism cut, only")
    return TensorEntry(entry.name, entry.dtype, shape, layout, entry.aliases, entry.role)


def _matches(info: Mapping[str, Any], key: str, name: str, path: Path) -> bool:
    return any(_match(pattern, name, path) for pattern in info.get(key) or ())


def _match(pattern: Any, name: str, path: Path) -> bool:
    """As ``re.match``; a pattern of a file must be one that cannot take forever."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARS:
        raise MalformedError(f"{path}: universal_checkpoint_info holds the pattern {shown(pattern)}; expected a short text")
    bare = re.sub(r"\\.", "", pattern)
    if re.search(r"\)[*+?{]|\(\?", bare) or len(re.findall(r"[*+?{]", bare)) > MAX_REPEATS:
        raise UnsupportedError(f"{path}: universal_checkpoint_info holds the pattern {shown(pattern)}, of more repeats than dsconv matches")
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise MalformedError(f"{path}: universal_checkpoint_info holds {shown(pattern)}, which is no pattern: {error}") from None


def _sub_params(info: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any] | None:
    for sub in info.get("parameter_with_sub_params") or ():
        if not isinstance(sub, dict) or not isinstance(sub.get("shape"), (tuple, list)) or type(sub.get("partition_dim")) is not int:
            raise MalformedError(f"{path}: universal_checkpoint_info describes sub-parameters by {shown(sub)}")
        if any(_match(pattern, name, path) for pattern in sub.get("patterns") or ()):
            return sub
    return None


def _sub_form(sub: Mapping[str, Any], entry: TensorEntry, path: Path) -> tuple[tuple[int, ...], Instance]:
    """The shape in which a parameter made of others is written, and the object that tells a loader how to cut it."""
    dim, spec = sub["partition_dim"], list(sub["shape"])
    wrong = MalformedError(f"{path}: {entry.name!r} of shape {list(entry.shape)} is not of the sub-parameters {shown(sub)}")
    if not 0 <= dim < len(spec):
        raise wrong
    if type(spec[dim]) is int and spec[dim] > 0:  # before version 0.4: how many of equal width, not how wide
        if not len(entry.shape) > dim or entry.shape[dim] % spec[dim]:
            raise wrong
        spec[dim] = (entry.shape[dim] // spec[dim],) * spec[dim]
    sizes = [sum(s) if isinstance(s, (tuple, list)) else s for s in spec]
    if not all(type(size) is int and size != 0 for size in sizes) or sum(size < 0 for size in sizes) > 1:
        raise wrong
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    if entry.numel % known:
        raise wrong
    shape = tuple(size if size > 0 else entry.numel // known for size in sizes)
    state = {"patterns": list(sub["patterns"]), "shape": tuple(tuple(s) if isinstance(s, list) else s for s in spec), "partition_dim": dim}
    return shape, Instance(SUBPARAM, (), state)
