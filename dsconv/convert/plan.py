"""The plan of a merge: which tensors go into which file at which offset, as what. A dry run prints it; a run
executes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dsconv.checkpoint.formats.huggingface.safetensors import INDEX, MAX_HEADER_BYTES, SINGLE
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.schema import is_name, wrong_name
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.convert.ties import stored_name
from dsconv.errors import MalformedError, MissingShardError, UnsupportedError
from dsconv.text import count as counted

DEFAULT_SHARD_SIZE = "5GB"
HEADER_ALIGNMENT = 8  # safetensors 0.8: the data begins at a multiple of 8
METADATA = {"format": "pt"}  # transformers before 4.40 fails without it
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True)
class Placed:
    """One tensor of the output. ``offset_bytes`` counts from the start of its file's data."""

    name: str
    entry: TensorEntry
    dtype: DType
    offset_bytes: int

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One output file: its header, ready to be written, and its tensors in order."""

    filename: str
    header: bytes
    tensors: tuple[Placed, ...]
    data_bytes: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """All of a merge's output: the shards, and the name of the index if there are several."""

    shards: tuple[Shard, ...]
    index_name: str = INDEX

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def placed(self) -> Iterable[Placed]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    def index(self) -> bytes | None:
        """Return the bytes of the index file; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {t.name: shard.filename for shard in self.shards for t in shard.tensors}
        numel = sum(t.entry.numel for t in self.placed)
        metadata = {"total_parameters": numel, "total_size": self.data_bytes}
        return (
            json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
        ).encode()


def parse_size(text: str | int) -> int:
    """Return the bytes of ``5GB`` (decimal), ``5GiB`` or a plain number. Raises ValueError for anything else, and
    below 1.
    """
    if isinstance(text, int):
        value: float = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
        if not match or match[2].upper() not in _UNITS:
            raise ValueError(f"{text!r} is not a size: write it like 5GB or 500MB")
        value = float(match[1]) * _UNITS[match[2].upper()]
    if value < 1:
        raise ValueError(f"{text!r} is not a size: it must be at least 1 byte")
    return int(value)


def require_whole_set(checkpoint: Checkpoint) -> None:
    """Raise MissingShardError where the checkpoint is one file of several: it makes no model."""
    if count := checkpoint.info.get("one_of_files"):
        raise MissingShardError(
            f"{checkpoint.path}: is one of {count} files of a model, and was given alone: give {checkpoint.folder}"
        )


def make_plan(
    checkpoint: Checkpoint,
    *,
    dtype: DType | None,
    max_shard_bytes: int,
    exclude_frozen: bool = False,
    dropped_names: tuple[str, ...] = (),
    rename: Callable[[str], str | None] | None = None,
    stem: str = "model",
) -> Plan:
    """Lay the tensors of ``checkpoint`` out in shards.

    The order is the checkpoint's. Within a shard wider elements come first, so that every tensor is aligned to its
    element.

    Args:
        checkpoint: the source.
        dtype: what floats are cast to; None keeps what is stored.
        max_shard_bytes: the size of a shard's data. A larger tensor gets a shard of its own.
        exclude_frozen: leave out weights that were not trained.
        dropped_names: patterns of names that transformers drops, by which one name of a tied weight is chosen.
        rename: gives a tensor another name, or None to leave it out.
        stem: the beginning of the shards' names.

    Raises:
        MalformedError: nothing is left to write, or a name cannot be written.
        MissingShardError: the checkpoint is one file of several.
        UnsupportedError: a header would exceed safetensors' limit.
    """
    require_whole_set(checkpoint)
    chosen: list[tuple[str, TensorEntry, DType]] = []
    for entry in checkpoint.values():
        if exclude_frozen and entry.role == "frozen":
            continue
        name: str | None = stored_name(entry.name, entry.aliases, dropped_names)
        if rename is not None:
            name = rename(entry.name)
        if name is not None and not is_name(name):
            raise wrong_name(name, checkpoint.path, f"the name in the output of {safe_repr(entry.name)}")
        if name is not None:
            chosen.append((name, entry, output_dtype(entry.dtype, dtype)))
    if not chosen:
        raise MalformedError(
            f"{checkpoint.path}: no tensors to write{' after leaving out the frozen ones' if exclude_frozen else ''}"
        )
    groups: list[list[tuple[str, TensorEntry, DType]]] = [[]]
    filled = 0
    for item in chosen:
        nbytes = item[1].numel * item[2].itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += nbytes
    count = len(groups)
    single = SINGLE if stem == "model" else f"{stem}.safetensors"
    names = [single] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return Plan(tuple(_shard(name, group) for name, group in zip(names, groups, strict=True)), f"{single}.index.json")


def _shard(filename: str, group: list[tuple[str, TensorEntry, DType]]) -> Shard:
    placed, offset = [], 0
    for name, entry, dtype in sorted(group, key=lambda item: -item[2].itemsize):
        placed.append(Placed(name, entry, dtype, offset))
        offset += placed[-1].nbytes
    header: dict[str, object] = {"__metadata__": METADATA}
    for tensor in placed:
        offsets = [tensor.offset_bytes, tensor.offset_bytes + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype.safetensors,
            "shape": tensor.dtype.header_shape(tensor.entry.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"{filename}: a header of {len(text)} bytes for {counted(len(placed), 'tensor')}; safetensors allows"
            f" {MAX_HEADER_BYTES}. Use a smaller --max-shard-size"
        )
    return Shard(filename, len(text).to_bytes(8, "little") + text, tuple(placed), offset)


def find_config(folders: Iterable[Path], name: str = "config.json") -> Path | None:
    """Return the path of the first ``name`` in ``folders``, or None if there is none."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
