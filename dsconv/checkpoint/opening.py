"""``open_checkpoint``: what is at this path?"""

from __future__ import annotations

import os
from pathlib import Path

from dsconv.checkpoint.formats import safetensors_folder
from dsconv.checkpoint.formats.stage0 import read_stage0
from dsconv.checkpoint.formats.zero import read_zero
from dsconv.checkpoint.tensormap import Checkpoint, prove_tiling
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError
from dsconv.zero_utils.files import find_tag_folder


def open_checkpoint(path: str | os.PathLike[str], tag: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading, its metadata only, and prove that its pieces tile every tensor exactly once.

    ``path`` is a DeepSpeed save dir, tag dir or Trainer ``checkpoint-N``, or a safetensors file or folder.

    Raises CheckpointNotFoundError, MissingShardError, MalformedError, InconsistentCheckpointError, UnsupportedError or
    UnsafeError, all of them DsconvError.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointNotFoundError(f"{root}: no such file or folder")
    try:
        checkpoint = _open(root, tag)
    except DsconvError:
        raise
    except OSError as error:
        raise MalformedError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    for entry in checkpoint.values():
        prove_tiling(entry)
    return checkpoint


def _open(root: Path, tag: str | None) -> Checkpoint:
    folder = find_tag_folder(root, tag) if root.is_dir() else None
    if folder is not None:
        return read_zero(folder) if folder.optimizer else read_stage0(folder)
    if tag is None and safetensors_folder.detect(root):
        return safetensors_folder.read(root)
    what = "a file that is not safetensors" if root.is_file() else "a folder that holds none"
    raise CheckpointNotFoundError(
        f"{root}: {what}: expected a DeepSpeed checkpoint (a folder with 'latest', global_stepN/ or *_states.pt) or safetensors"
    )
