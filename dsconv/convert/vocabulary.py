"""A vocabulary that has grown since the base was saved: an adapter then carries the resized embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.errors import InconsistentCheckpointError

Shape = tuple[int, ...]


def grown_vocabulary(
    resized: Mapping[str, tuple[Shape, Shape]], result: Iterable[TensorEntry], where: Path
) -> tuple[int, int] | None:
    """Return the base's number of tokens and the adapter's, where a fold replaces the embeddings by resized ones.

    transformers ``modeling_utils.py`` ``resize_token_embeddings`` resizes the input embedding, the output embedding and
    its bias. An adapter that lacks one of them does not hold the whole model.

    Args:
        resized: {name: (shape in the base, shape in the adapter)} of the tensors whose first sizes differ.
        result: The folded model.
        where: The adapter, for messages.

    Returns:
        None where nothing was resized.

    Raises:
        InconsistentCheckpointError: The result has embeddings of two sizes.
    """
    if not resized:
        return None
    name, (before, after) = next(iter(resized.items()))
    for other, (old, new) in resized.items():
        if (old[0], new[0]) != (before[0], after[0]):
            raise InconsistentCheckpointError(
                f"{where}: {name!r} of {list(after)} replaces the base's of {list(before)}, and {other!r} of"
                f" {list(new)} one of {list(old)}: the adapter belongs to another base"
            )
    kinds = {old for old, _ in resized.values()} | {before[:1]}
    stale = next((entry for entry in result if entry.shape in kinds), None)
    if stale is not None:
        raise InconsistentCheckpointError(
            f"{where}: {name!r} has {after[0]} rows and the base's has {before[0]}, and {stale.name!r} of"
            f" {list(stale.shape)} is not in the adapter, so its new rows are lost here. Give --base the resized model"
            " that the adapter was trained on"
        )
    return before[0], after[0]
