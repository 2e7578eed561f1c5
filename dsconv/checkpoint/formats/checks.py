"""Check the entries of every format: unwrap their names, and refuse a model without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from dsconv.checkpoint.map.renaming import unwrap
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import MalformedError
from dsconv.text import count
from dsconv.zero_utils.tag_folder import holds_states

RANK_FILE = re.compile(r"((?:.*[_.-])?)rank[_-]?(\d+)\.(pt|pth|bin)")  # one rank's file of a plain script
# ZeRO-3 keeps small parameters whole (stage3_param_persistence_threshold), so a hollow file still has some weights.
HOLLOW_SHARE = 5


def unwrapped(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return the entries under the model's own names, and the parts that wrappers had put into the names.

    torch.compile, activation checkpointing, FSDP, DDP and Lightning wrap modules; see ``checkpoint/map/renaming.py``.
    """
    names = unwrap(name for entry in entries.values() for name in (entry.name, *entry.aliases))
    if not names.removed:
        return dict(entries), []
    found = {
        names(name): replace(entry, name=names(name), aliases=tuple(map(names, entry.aliases)))
        for name, entry in entries.items()
    }
    return found, list(names.removed)


def check_not_hollow(entries: Mapping[str, TensorEntry], where: Path, near: Iterable[Path]) -> list[str]:
    """Refuse a file whose weights are empty, as a save under ZeRO-3 without gathering leaves them.

    Under ZeRO-3 a parameter's own tensor has the shape [0] while its values lie in the partitions of the ranks
    (deepspeed ``runtime/zero/partition_parameters.py`` ``free_param``). ``state_dict()`` of such a model, or a
    save without ``stage3_gather_16bit_weights_on_model_save``, keeps the empty tensors.

    Args:
        entries: The tensors.
        where: The file or folder, for messages.
        near: Folders in which the DeepSpeed checkpoint may lie.

    Returns:
        A warning where only a few weights are empty.

    Raises:
        MalformedError: Many weights, or all, are empty.
    """
    empty = [entry.name for entry in entries.values() if entry.shape == (0,) and entry.dtype.floating]
    if not empty:
        return []
    what = f"{len(empty)} of {count(len(entries), 'tensor', 'is')} empty (shape [0]), the first {safe_repr(empty[0])}"
    if len(empty) < len(entries) and len(empty) * HOLLOW_SHARE < len(entries):
        return [f"{what}: a save under ZeRO-3 without gathering leaves such weights"]
    real = _deepspeed_near(near)
    advice = (
        f"The weights are in the DeepSpeed checkpoint beside it: give {real}"
        if real is not None
        else "The weights are in the folder that DeepSpeed's save_checkpoint wrote (with a file 'latest' and a folder"
        " global_stepN), if there is one: give that. Else save again with stage3_gather_16bit_weights_on_model_save"
    )
    raise MalformedError(f"{where}: {what}: ZeRO-3 saved the model without gathering its weights. {advice}")


def _deepspeed_near(folders: Iterable[Path]) -> Path | None:
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            continue
        if (folder / "latest").is_file() or holds_states(folder):
            return folder
        inside = sorted(p for p in folder.iterdir() if p.name.startswith(("global_step", "checkpoint-")) and p.is_dir())
        found = [p for p in inside if (p / "latest").is_file() or holds_states(p)]
        if found:
            return found[-1]
    return None
