"""DeepSpeed universal checkpoints: ``zero/<parameter>/fp32.pt``, one file per parameter, and model states beside them.

Read from DeepSpeed ``checkpoint/ds_to_universal.py``. From stages 1 and 2 a file holds a dict with ``param``, in
the parameter's full shape (rows that only pad a vocabulary are cut off: ``vocab_tensor``), from stage 3 a bare flat
tensor. The names and shapes are those of the model states, which are copied from the source; so are buffers and frozen
weights, of which ``zero/`` holds fp32 copies at most. dsconv makes such checkpoints of runs without ZeRO too
(``zero_stage`` 0).
"""

from __future__ import annotations

from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import CheckpointNotFoundError
from dsconv.zero_utils.tag_folder import (
    UNIVERSAL,
    UNIVERSAL_SETTINGS,
    TagFolder,
    holds_states,
    read_latest,
    scan,
)

LATEST = "latest_universal"


def detect(root: Root, tag: str | None) -> bool:
    """Return whether ``root`` holds a universal checkpoint.

    Raises:
        CheckpointNotFoundError: ``latest_universal`` names a folder that holds none.
    """
    return root.path.is_dir() and _find(root.path, tag) is not None


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the tensor map of the universal checkpoint at ``root``.

    Raises:
        MissingShardError: A file is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one conversion.
        UnsupportedError: The checkpoint does not say how frozen shards fit together.
    """
    folder = _find(root.path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{root.path}: no universal checkpoint")
    root.fetch([*folder.files, *(folder.path / UNIVERSAL).glob("*/fp32.pt")])
    from dsconv.checkpoint.formats.deepspeed.universal_states import read_states

    return read_states(folder)


def read_own_weights(root: Root, tag: str | None) -> Checkpoint:
    """Read the model's own 16-bit weights out of the model states; raise what ``reader.read_own_weights`` raises."""
    folder = _find(root.path, tag)
    if folder is None:
        raise CheckpointNotFoundError(f"{root.path}: no universal checkpoint")
    folder = folder.with_own_weights()
    root.fetch(folder.files)
    from dsconv.checkpoint.formats.deepspeed.reader import read_folder

    return read_folder(folder)


def _find(path: Path, tag: str | None) -> TagFolder | None:
    """Return a universal tag folder: ``path`` itself, or what its ``latest_universal`` names.

    A plain ``latest`` beside that comes first.
    """
    if tag is not None:
        inside = bool(tag) and "\0" not in tag and not tag.startswith("/") and ".." not in Path(tag).parts
        return scan(path / tag, tag, path) if inside and _is_universal(path / tag) else None
    if _is_universal(path):
        return scan(path, path.resolve().name, path.parent)
    if (path / LATEST).is_file() and not (path / "latest").is_file() and not holds_states(path):
        tag = read_latest(path / LATEST)
        if not tag or "/" in tag or "\0" in tag or tag == ".." or not _is_universal(path / tag):
            raise CheckpointNotFoundError(
                f"{path / LATEST} names {safe_repr(tag)}, and no universal checkpoint is there"
            )
        return scan(path / tag, tag, path)
    return None


def _is_universal(folder: Path) -> bool:
    zero = folder / UNIVERSAL
    return zero.is_dir() and ((zero / UNIVERSAL_SETTINGS).is_file() or holds_states(folder))
