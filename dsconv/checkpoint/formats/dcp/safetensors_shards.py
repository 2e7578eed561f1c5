"""Read shards that DCP's HuggingFaceStorageWriter writes: ``shard-RRRRR-model-PPPPP-of-NNNNN.safetensors``.

The writers are ``torch/distributed/checkpoint/hf_storage.py`` and ``filesystem.py``
``_write_files_from_queue``, transformers ``save_pretrained(distributed_checkpoint=True)`` and, in a folder
``sharded/``, torchtitan and torch with ``enable_consolidation``. Each rank R writes its chunk of each tensor, the
chunks of part P in one file; ``__metadata__`` says where each chunk begins (``saved_offsets``).

The full shape of a tensor is not recorded. It follows from where the chunks end, so without the last rank's file a
tensor only looks smaller. A hole is always found. A lost end is found if config.json, an index or the shards of other
ranks disagree with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import find_config
from dsconv.checkpoint.formats.huggingface import safetensors
from dsconv.checkpoint.formats.huggingface.config_sizes import too_small
from dsconv.checkpoint.formats.huggingface.index import MAX_INDEX_BYTES, parse_json
from dsconv.checkpoint.formats.huggingface.safetensors import INDEX, holds_weights, read_file_and_metadata
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.pieces import arranged
from dsconv.checkpoint.map.regions import Sizes
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import MAX_NUMEL, safe_repr
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError
from dsconv.text import count

SHARD = re.compile(r"shard-(?P<rank>\d{5,})-model-(?P<part>\d{5,})-of-(?P<parts>\d{5,})\.safetensors")
SHARDED = "sharded"  # torch _hf_utils.py SHARDED_DIR_NAME
INFO = "DCP_SHARDING_INFO"


def detect(root: Root, tag: str | None) -> bool:
    """Return whether the folder, or ``sharded/`` in it, holds such shards."""
    return tag is None and holds_shards(root.path)


def holds_shards(path: Path) -> bool:
    """Return whether a folder, or ``sharded/`` in it, holds such shards."""
    return path.is_dir() and bool(_shards(path) or _shards(path / SHARDED))


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the map of a folder of such shards.

    Args:
        root: The folder, or the one that holds ``sharded/``.
        tag: Not used: such a folder holds one step.
        item: Not used: such a folder holds one model.

    Raises:
        MalformedError: A header is damaged, or does not say where the chunks begin.
        InconsistentCheckpointError: The shards are from two saves.
        MissingShardError: A part, or the end of a tensor, is missing.
    """
    return read_folder(root.path, root.fetch)


def read_folder(path: Path, fetch: Callable[[Iterable[Path]], None]) -> Checkpoint:
    """Read the map of a folder of such shards; ``fetch`` is ``Root.fetch``. It raises what ``read`` raises."""
    folder = path if _shards(path) else path / SHARDED
    files = _shards(folder)
    if folder != path and holds_weights(path) and not _placed(files[0]):
        found = safetensors.read_folder(path, fetch)
        found.warnings += (f"{folder.name}/ was not read: no {INFO} in {files[0].name}; took the files above it",)
        return found
    fetch(files)
    chunks: dict[str, list[tuple[Sizes, Sizes, Piece]]] = {}
    first: dict[str, tuple[TensorEntry, Path]] = {}
    ends: dict[str, Sizes] = {}
    for file in files:
        entries, metadata = read_file_and_metadata(file)
        offsets_of = _offsets(file, metadata, entries)
        for name, entry in entries.items():
            known, where = first.setdefault(name, (entry, file))
            if (known.dtype, len(known.shape)) != (entry.dtype, len(entry.shape)):
                raise InconsistentCheckpointError(
                    f"{file}: {safe_repr(name)} is {entry.dtype} {list(entry.shape)}, in {where.name} {known.dtype}"
                    f" {list(known.shape)}: shards from two saves"
                )
            offsets = offsets_of[name]
            ends[name] = tuple(
                max(end, offset + size)
                for end, offset, size in zip(ends.get(name, (0,) * len(offsets)), offsets, entry.shape, strict=True)
            )
            chunks.setdefault(name, []).extend((offsets, entry.shape, piece) for piece in entry.pieces)
    config = find_config((folder, path))
    warnings = _numbering(folder, files)
    counted = _against_index(folder, path, first, ends)
    warnings += _ends(folder, ends, config, counted)
    whole = {
        name: TensorEntry(name, entry.dtype, ends[name], partial(tuple, arranged(chunks.get(name, []), ends[name])))
        for name, (entry, _) in first.items()
    }
    ranks = {match["rank"] for file in files if (match := SHARD.fullmatch(file.name))}
    info: dict[str, Any] = {"read": f"{SHARDED}/"} if folder != path else {}
    return Checkpoint(
        path,
        "DCP (safetensors)",
        whole,
        folder=config.parent if config is not None else path,
        world={"ranks": len(ranks)},
        info=info,
        warnings=tuple(warnings),
        sources=tuple(files),
    )


def _placed(file: Path) -> bool:
    """Return whether a shard says where its chunks begin."""
    return INFO in read_file_and_metadata(file)[1]


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if SHARD.fullmatch(p.name)) if folder.is_dir() else []


def _offsets(file: Path, metadata: dict[str, str], entries: dict[str, TensorEntry]) -> dict[str, Sizes]:
    if INFO not in metadata:
        raise MalformedError(
            f"{file}: no {INFO} in its metadata: not written by torch.distributed.checkpoint, or saved again without it"
        )
    info = parse_json(metadata[INFO].encode(), file, INFO)
    found = {}
    for name, entry in entries.items():
        item = info.get(name)
        offsets = item.get("saved_offsets") if isinstance(item, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != len(entry.shape)
            or not all(type(n) is int and 0 <= n < MAX_NUMEL for n in offsets)
        ):
            raise MalformedError(
                f"{file}: {INFO} places {safe_repr(name)} of {list(entry.shape)} at {safe_repr(offsets)}"
            )
        found[name] = tuple(offsets)
    return found


def _numbering(folder: Path, files: list[Path]) -> list[str]:
    """Raise an error if the files' numbers show that some are missing. A rank without any file is only a warning."""
    matches = [match for file in files if (match := SHARD.fullmatch(file.name))]
    parts = {int(match["parts"]) for match in matches}
    if len(parts) > 1:
        raise InconsistentCheckpointError(
            f"{folder}: shards of models in {' and in '.join(map(str, sorted(parts)))} parts: files from two saves"
        )
    lost = set(range(1, parts.pop() + 1)) - {int(match["part"]) for match in matches}
    if lost:
        raise MissingShardError(
            f"{folder}: part {min(lost):05d} of the model has no shard: {count(len(lost), 'part', 'is')} missing"
        )
    ranks = {int(match["rank"]) for match in matches}
    gaps = sorted(set(range(1, max(ranks) + 1)) - ranks)
    if gaps:
        return [
            (
                f"there is no shard {gaps[0]:05d}: that rank wrote nothing, or its file is lost with the tensors that"
                " only it held"
            )
        ]
    return []


def _ends(folder: Path, shapes: dict[str, Sizes], config: Path | None, counted: bool) -> list[str]:
    """Raise an error if config.json names a larger size than the chunks reach; warn if it and the index name none."""
    compared = 0
    if config is not None:
        compared, problem = too_small(config, shapes)
        if problem is not None:
            name, expected = problem
            raise MissingShardError(
                f"{folder}: {safe_repr(name)} ends at {list(shapes[name])}, and {config} says"
                f" {list(expected)}: the last rank's shards are missing; copy the files of all ranks"
            )
    if compared or counted:
        return []
    return [
        (
            "the shards do not record full shapes, no index counts their bytes, and no config.json names a size to"
            " compare: a lost last shard would not be noticed"
        )
    ]


def _against_index(
    folder: Path, path: Path, first: dict[str, tuple[TensorEntry, Path]], ends: dict[str, Sizes]
) -> bool:
    """Raise an error if an index names a tensor, or a number of bytes, that the shards do not have.

    It lies beside the shards, or beside the consolidated files above them. Returns whether the bytes are as
    many as one names.
    """
    counted = False
    for index in dict.fromkeys((folder / INDEX, path / INDEX)):
        if not index.is_file() or index.stat().st_size > MAX_INDEX_BYTES:
            continue
        content = parse_json(index.read_bytes(), index, "the index")
        names = content.get("weight_map")
        lost = [name for name in names if name not in ends] if isinstance(names, dict) else []
        if lost:
            raise MissingShardError(
                f"{folder}: {index} names {safe_repr(lost[0])}, which no shard holds: files are missing, or of another"
                " save"
            )
        about = content.get("metadata")
        total = about.get("total_size") if isinstance(about, dict) else None
        nbytes = sum(math.prod(ends[name]) * entry.dtype.itemsize for name, (entry, _) in first.items())
        counted |= type(total) is int and nbytes == total
        if type(total) is int and nbytes < total:
            raise MissingShardError(
                f"{folder}: the shards hold {nbytes} bytes of weights, {index} says {total}: files are missing"
            )
    return counted
