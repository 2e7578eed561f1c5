"""``open_checkpoint``: what is at this path?"""

from __future__ import annotations

import math
import os
from importlib import import_module
from pathlib import Path

from dsconv.checkpoint.map.tensors import Checkpoint, prove_tiling
from dsconv.checkpoint.pickles.values import MAX_NUMEL, safe_repr
from dsconv.checkpoint.storage import hub
from dsconv.checkpoint.storage.local import as_path, stamp
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError

# Modules of ``formats``, in the order in which they are asked. Each has ``detect(path, tag)``, which looks at names
# only, and ``read(path, tag)``, which yields the map; one is imported when it is asked.
FORMATS = (
    "deepspeed.universal",
    "dcp.reader",
    "dcp.safetensors_shards",
    "deepspeed.reader",
    "huggingface.safetensors",
    "rank_files.reader",
    "huggingface.torch_bin",
)


def open_checkpoint(path: str | os.PathLike[str], tag: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading, its metadata only, and prove that its pieces tile every tensor exactly once.

    ``path`` is a DeepSpeed save dir, tag dir or Trainer ``checkpoint-N``, a torch.distributed.checkpoint directory or
    one that holds it, a folder of one torch.save a rank (verl, accelerate, FSDP), a safetensors or ``.bin`` file or
    folder, a URL of any of these (``s3://``, ``https://``, ``hf://`` …), or the id of a model on the Hub, whose weights
    are downloaded into the Hub's cache; ``revision`` is of the Hub.

    Raises CheckpointNotFoundError, MissingShardError, MalformedError, InconsistentCheckpointError, UnsupportedError,
    UnsafeError or RemoteError, all of them DsconvError.
    """
    if hub.is_repo(path):
        folder, warnings = hub.fetch(str(path), revision)
        checkpoint = open_checkpoint(folder, tag)
        checkpoint.info.update(repo=str(path), revision=folder.name)
        checkpoint.warnings = (*warnings, *checkpoint.warnings)
        return checkpoint
    root = as_path(path if revision is None else hub.with_revision(str(path), revision))
    if not root.exists():
        raise CheckpointNotFoundError(f"{root}: no such file or folder")
    try:
        checkpoint = _open(root, tag)
    except DsconvError:
        raise
    except OSError as error:
        raise MalformedError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    for entry in checkpoint.values():
        if (
            math.prod(max(1, size) for size in entry.shape) * entry.dtype.itemsize >= MAX_NUMEL
        ):  # of no elements: the others are held
            raise MalformedError(
                f"{root}: {safe_repr(entry.name)} has the shape {safe_repr(entry.shape)}, which torch cannot make"
            )
        prove_tiling(entry)
    checkpoint.stamps = {source: stamp(source) for source in checkpoint.sources}
    return checkpoint


def _open(root: Path, tag: str | None) -> Checkpoint:
    for name in FORMATS:
        module = import_module(f"dsconv.checkpoint.formats.{name}")
        if module.detect(root, tag):
            checkpoint: Checkpoint = module.read(root, tag)
            return checkpoint
    what = "a file of no kind that is read" if root.is_file() else "a folder that holds none"
    raise CheckpointNotFoundError(
        f"{root}: {what}: expected a DeepSpeed checkpoint (a folder with 'latest', global_stepN/ or *_states.pt), "
        "a torch.distributed.checkpoint directory (.metadata and *.distcp), one file a rank (such as "
        "model_world_size_N_rank_R.pt), safetensors, or a state dict of torch.save (.bin, .pt, .pth, .ckpt)"
    )
