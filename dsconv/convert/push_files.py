"""What of a folder goes to the Hub, and whether it is still what its manifest says.

Each file is read once: that pass gives its sha256 and the CRC-32 of each tensor in it, which the manifest of a merge
keeps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.huggingface import safetensors
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.checkpoint.storage.roots import PathRoot
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.progress import Progress, ProgressCounter
from dsconv.errors import CheckpointNotFoundError, MalformedError, MismatchError, UnsafeError
from dsconv.text import quote

# A run's own state, where a model was saved into the folder of a checkpoint: nothing that loading the model needs, and
# pickles.
TRAINING = (
    "optimizer.*",
    "optimizer_*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "training_args.bin",
    "trainer_state.json",
    "latest",
    "latest_universal",
    "zero_to_fp32.py",
    "zero_to_torch.py",
    "*_states.pt",
    "*.distcp",
    "pytorch_model_fsdp*",
)
SHOWN = 5


@dataclass(frozen=True)
class File:
    """A file to push: ``name`` is its path within the folder and the repository, with ``/``."""

    name: str
    path: Path
    nbytes: int


def open_model(folder: Path) -> Checkpoint:
    """Open the model in ``folder``, which may be the folder of a training checkpoint too.

    Raises:
        DsconvError: what ``open_checkpoint`` raises; CheckpointNotFoundError if there is no folder of safetensors.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder")
    if not safetensors.holds_weights(folder):
        raise CheckpointNotFoundError(
            f"{folder}: holds no safetensors (model.safetensors, its index, or adapter_model.safetensors), which is"
            f" what is pushed; of a checkpoint, dsconv merge {folder} OUT --push-to-hub REPO makes them"
        )
    return safetensors.read(PathRoot(folder), None)


def files_of(folder: Path) -> tuple[list[File], list[str]]:
    """Return the files to push, and the names of what is left out: hidden files, and the state of a training run.

    Raises:
        UnsafeError: a link leaves the folder, and does not lead to the blobs beside a snapshot of the Hub's cache. What
            it leads to would be published under a name that does not say so.
    """
    inside = folder.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else None
    found, left_out = [], []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        for name in sorted(folders):
            path = here / name
            if _left_out(path) or path.is_symlink():
                folders.remove(name)
                left_out.append(f"{path.relative_to(folder).as_posix()}/")
        folders.sort()
        for name in sorted(names):
            path = here / name
            shown = path.relative_to(folder).as_posix()
            if _left_out(path) or not path.is_file():
                left_out.append(shown)
                continue
            real = path.resolve()
            if not real.is_relative_to(inside) and not (blobs and real.is_relative_to(blobs)):
                raise UnsafeError(
                    f"{path} is a link out of its folder, to {real}; a push would publish that: put a copy in its place"
                )
            found.append(File(shown, path, real.stat().st_size))
    return found, left_out


def _left_out(path: Path) -> bool:
    if path.name.startswith("."):
        return True
    if path.is_dir():
        return any(fnmatchcase(inner.name, "*_states.pt") or inner.suffix == ".distcp" for inner in path.iterdir())
    return any(fnmatchcase(path.name, pattern) for pattern in TRAINING)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read ``dsconv.manifest.json``, or None if there is none.

    Raises:
        MalformedError: it is not what a merge writes.
    """
    path = folder / MANIFEST
    try:
        if not os.path.lexists(path):
            return None
        manifest = load_json(read_small(path))
    except (CheckpointNotFoundError, OSError, ValueError) as error:
        raise MalformedError(f"{path}: not the JSON that a merge writes ({error}); merge again, or remove it") from None
    tensors, files = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("tensors", "files"))
    sound = (
        isinstance(tensors, dict)
        and isinstance(files, dict)
        and all(isinstance(v, dict) for v in (*tensors.values(), *files.values()))
    )
    if not sound or not isinstance(manifest.get("source", {}), dict):
        raise MalformedError(f"{path}: no table of tensors and files, which a merge writes; merge again, or remove it")
    return dict(manifest)


def check_names(folder: Path, model: Checkpoint, files: list[File], manifest: dict[str, Any]) -> None:
    """Raise MismatchError unless the folder has what the manifest names: files, sizes and tensors, and no other
    weights.
    """
    tensors, listed = manifest["tensors"], manifest["files"]
    sizes = {file.name: file.nbytes for file in files}
    wrong = [f"{name} has {sizes.get(name, 'no')} bytes, not {item.get('bytes')}" for name, item in listed.items()
             if sizes.get(name) != item.get("bytes")]  # fmt: skip
    wrong += [f"{name} is weights that it does not know" for name in sizes
              if name.endswith(".safetensors") and "/" not in name and name not in listed]  # fmt: skip
    for name in sorted(set(tensors) | set(model)):
        if name not in model or name not in tensors:
            wrong.append(f"tensor {quote(name)} is only in the {'manifest' if name in tensors else 'files'}")
            continue
        entry, said = model[name], tensors[name]
        file = entry.pieces[0].extent.record.path.name if entry.pieces else said.get("file")
        if (str(entry.dtype), list(entry.shape), file) != (said.get("dtype"), said.get("shape"), said.get("file")):
            wrong.append(
                f"tensor {quote(name)} is {entry.dtype} {list(entry.shape)} in {file}, not {said.get('dtype')}"
                f" {said.get('shape')}"
            )
    _refuse(folder, wrong)


def check_and_hash(
    folder: Path,
    model: Checkpoint,
    files: list[File],
    manifest: dict[str, Any] | None,
    workers: int,
    progress: Progress | None,
) -> dict[str, str]:
    """Compute the sha256 of each file, and check the CRC-32 of each tensor against the manifest in the same pass.

    Args:
        folder: what messages name.
        model: the tensors of the folder.
        files: the files to read.
        manifest: that of the folder; None checks nothing.
        workers: the number of threads.
        progress: called with ("check", bytes done, bytes in all), from any thread.

    Returns:
        The sha256 by name.

    Raises:
        MismatchError: a checksum is another than the manifest's. The message names file and tensor.
    """
    spans: dict[Path, list[tuple[int, int, str]]] = {}
    for entry in model.values() if manifest is not None else ():
        for piece in entry.pieces:
            spans.setdefault(piece.extent.record.path, []).append(
                (piece.extent.offset_bytes, piece.extent.nbytes, entry.name)
            )
    counter = ProgressCounter("check", sum(file.nbytes for file in files), progress)

    def hash_one(file: File) -> tuple[str, dict[str, int]]:
        return _hash(file.path, sorted(spans.get(file.path, ())), counter.add)

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip((file.name for file in files), pool.map(hash_one, files), strict=True))
    digests = {name: digest for name, (digest, _) in results.items()}
    if manifest is not None:
        found = {name: f"{crc:08x}" for _, crcs in results.values() for name, crc in crcs.items()}
        tensors, listed = manifest["tensors"], manifest["files"]
        wrong = [f"tensor {quote(name)} in {item.get('file')} has the CRC-32 {found.get(name)}, not {item.get('crc32')}"
                 for name, item in tensors.items() if found.get(name) != item.get("crc32")]  # fmt: skip
        wrong += [f"{name} has the sha256 {digests[name]}, not {item['sha256']}" for name, item in listed.items()
                  if "sha256" in item and digests.get(name) != item["sha256"]]  # fmt: skip
        _refuse(folder, wrong)
    return digests


def _hash(path: Path, spans: list[tuple[int, int, str]], advance: Callable[[int], None]) -> tuple[str, dict[str, int]]:
    """Compute the sha256 of a file, and the CRC-32 of each of ``spans`` in it, in one pass.

    ``spans`` are (offset, bytes, name). They are sorted and do not overlap.
    """
    digest = hashlib.sha256()
    crcs = {name: 0 for _, _, name in spans}
    block = memoryview(bytearray(BLOCK_BYTES))
    offset, first = 0, 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            for start, nbytes, name in spans[first:]:
                if start >= offset + count:
                    break
                part = block[max(start - offset, 0) : min(start + nbytes - offset, count)]
                crcs[name] = crc32(part, crcs[name])
                first += start + nbytes <= offset + count
            offset += count
            advance(count)
    return digest.hexdigest(), crcs


def _refuse(folder: Path, wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise MismatchError(
            f"{folder}: not what its {MANIFEST} says: {'; '.join(wrong[:SHOWN])}{more}. Nothing was pushed: merge"
            " again, or --no-check"
        )
