"""Tell whether the ranks of a load read copies of one checkpoint.

A node may hold an old copy. Its files have the same names, tensors and often sizes, so what is compared includes bytes:
the start of each file, where headers are, its end, where the directory of a zip has the CRC-32 of every record, and
blocks in between, which a training step changes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.local import is_remote

EDGE_BYTES = 64 << 10
BLOCK_BYTES = 4 << 10
MAX_BLOCKS = 4096  # of all files together, shared out among them; 16 MiB
MAX_BLOCKS_OF_A_FILE = 32

Fingerprint = dict[str, str]


def fingerprint(checkpoint: Checkpoint, model_class: str = "") -> Fingerprint:
    """Return digests of what a rank is about to load, by what they are of.

    Args:
        checkpoint: The open checkpoint.
        model_class: The name of the class that is filled.

    Returns:
        A digest of the tensors' names, dtypes and shapes, the model's class, and a digest for each file. Paths are not
        included, since each node may have the checkpoint elsewhere; nor are the contents of remote files.
    """
    tensors = hashlib.sha256()
    for entry in checkpoint.values():
        tensors.update(repr((entry.name, str(entry.dtype), tuple(entry.shape), entry.aliases)).encode())
    found = {"the model's class": model_class, "the names and shapes of tensors": tensors.hexdigest()[:32]}
    files = checkpoint.sources
    blocks = max(1, min(MAX_BLOCKS_OF_A_FILE, MAX_BLOCKS // max(1, len(files))))
    found |= {path.name: _digest(path, blocks) for path in files}
    return found


def differences(fingerprints: list[Fingerprint]) -> str:
    """Return which ranks differ from rank 0, and in what; empty if none does."""
    first = fingerprints[0]
    for rank, other in enumerate(fingerprints):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"rank {rank} differs from rank 0 in {names[0]}{more}"
    return ""


def _digest(path: Path, blocks: int) -> str:
    """Return the size of a file and a digest of its start, its end and evenly spread blocks."""
    size = path.stat().st_size
    if is_remote(path):
        return str(size)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(EDGE_BYTES))
        for number in range(1, blocks + 1):
            file.seek(size * number // (blocks + 1))
            digest.update(file.read(BLOCK_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return f"{size}-{digest.hexdigest()[:32]}"
