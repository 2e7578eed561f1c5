"""Read a universal checkpoint that was just written back, and compare every byte of it with its source."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.tensors import Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, read_extent
from dsconv.checkpoint.transfer.casting import CASTABLE
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.convert.progress import Progress
from dsconv.convert.universal_plan import UniversalPlan
from dsconv.convert.verify import verify
from dsconv.errors import MismatchError


def verify_universal(
    checkpoint: Checkpoint,
    plan: UniversalPlan,
    folder: Path,
    target: Path,
    progress: Progress | None,
) -> None:
    """Raise MismatchError unless the files of ``plan``, in ``folder``, hold what their sources hold.

    Each file is read by dsconv's own strict reader. Integer and bool buffers, which the format wants as floats, are
    checked against the checksum of what was written.
    """
    source: dict[str, TensorEntry] = {}
    written: dict[str, TensorEntry] = {}
    for file in plan.written:
        opened = TorchFile(folder / file.path)
        for stream in file.streams:
            if not stream.nbytes:
                continue
            value = opened.root
            for key in stream.keys:
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, TensorRef):
                raise MismatchError(
                    f"{target / file.path}: the file that was written holds no tensor. Nothing was kept"
                )
            if stream.entry.dtype != stream.dtype and stream.entry.dtype.name not in CASTABLE:
                record = opened.archive.records[f"data/{value.storage.key}"]
                if crc32(read_extent(Extent(record, record.offset_bytes, record.nbytes))) != record.crc32:
                    raise MismatchError(
                        f"{target / file.path}: the file on disk differs from what was written. Nothing was kept"
                    )
                continue
            name = "/".join((file.path, *stream.keys))
            source[name] = stream.entry
            written[name] = TensorEntry(name, value.dtype, stream.entry.shape, partial(opened.pieces, value))
    for model in plan.models:
        source[model.path] = _bytes_of(model.path, model.source, model.nbytes)
        written[model.path] = _bytes_of(model.path, folder / model.path, model.nbytes)
    result = verify(
        Checkpoint(checkpoint.path, "", source), Checkpoint(target, "", written), allow_cast=True, progress=progress
    )
    if not result.equal:
        raise MismatchError(
            f"{target}: what was written differs from {checkpoint.path}: {result.summary()}. Nothing was kept"
        )


def _bytes_of(name: str, path: Path, nbytes: int) -> TensorEntry:
    piece = Piece(Extent(Record(path, 0, nbytes), 0, nbytes), 0, nbytes)
    return TensorEntry(name, BY_NAME["uint8"], (nbytes,), lambda: (piece,))
