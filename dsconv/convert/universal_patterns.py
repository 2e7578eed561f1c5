"""The shape in which a parameter is written into a universal checkpoint, and the keys beside it.

The keys tell a loader with another tensor-parallel degree how to cut the parameter. It needs them even if the source
had one model-parallel rank and nothing was joined. Read from DeepSpeed ``checkpoint/ds_to_universal.py``
(``merge_tp_slices``), ``checkpoint/constants.py`` and ``checkpoint/universal_checkpoint.py``
(``load_hp_checkpoint_state``). A parameter that an affine map describes (AutoTP's all are) gets no key: AutoTP's loader
cuts it by the map of its own layer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.checkpoint.map.training import ShardRule, SubParams
from dsconv.checkpoint.pickles.values import Instance, safe_repr
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import quote

SUBPARAM = "deepspeed.checkpoint.universal_checkpoint.SubparamShape"


def written_form(
    cut: ShardRule, name: str, entry: TensorEntry, path: Path
) -> tuple[tuple[int, ...], dict[str, Any], TensorEntry]:
    """Return the shape, the keys beside ``param``, and the entry that is written for a parameter or one of its states.

    A 0-d parameter is written with shape [1], since the loader cuts the first dimension. Rows that only pad a
    vocabulary are left out.

    Raises:
        UnsupportedError, MalformedError: the message names the parameter.
    """
    keys: dict[str, Any] = {}
    shape = entry.shape or (1,)
    if cut.view is not None:
        shape = cut.view or (1,)
        if math.prod(shape) != entry.numel:
            raise MalformedError(
                f"{path}: the affine map of {quote(name)}, of shape {list(entry.shape)}, is of a tensor of shape"
                f" {list(shape)}"
            )
    elif cut.parts is not None:
        shape, keys["sub_param_shape"] = _sub_form(cut.parts, entry, path)
    elif cut.dim is not None:
        keys |= {"cat_dim": cut.dim} | ({"param_n_sub_params": 2} if cut.halves else {})
    if cut.vocabulary:
        keys["vocab_tensor"] = True
        rows = cut.rows
        if rows is not None:
            if type(rows) is not int or rows < 1 or len(shape) != 2:
                raise MalformedError(
                    f"{path}: universal_checkpoint_info says that {quote(name)} of shape {list(shape)} pads"
                    f" {safe_repr(rows)} rows"
                )
            rows = min(rows, shape[0])
            shape, entry = (rows, shape[1]), first_elements(entry, rows * shape[1], (rows, shape[1]))
    return shape, keys, entry


def first_elements(entry: TensorEntry, numel: int, shape: tuple[int, ...]) -> TensorEntry:
    """Return the first ``numel`` elements of ``entry``, whose pieces are runs of it, as a tensor of ``shape``."""
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
        raise UnsupportedError(
            f"{entry.name}: rows that pad a vocabulary can be left out of a tensor that no model parallelism cut, only"
        )
    return TensorEntry(entry.name, entry.dtype, shape, layout, entry.aliases, entry.role)


def _sub_form(sub: SubParams, entry: TensorEntry, path: Path) -> tuple[tuple[int, ...], Instance]:
    """Return the shape in which a parameter made of others is written, and the object that tells a loader how to cut
    it.
    """
    dim, spec = sub.dim, list(sub.shape)
    wrong = MalformedError(
        f"{path}: {quote(entry.name)} of shape {list(entry.shape)} is not of the sub-parameters {safe_repr(sub.shape)}"
    )
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
    state = {
        "patterns": list(sub.patterns),
        "shape": tuple(tuple(s) if isinstance(s, list) else s for s in spec),
        "partition_dim": dim,
    }
    return shape, Instance(SUBPARAM, (), state)
