"""Read the chunks of a ``.distcp`` file: zips of torch.save, one after another without alignment.

The layout is that of ``torch/distributed/checkpoint/filesystem.py`` ``_write_item``. A chunk is opened as
any ``.pt`` is, and must hold one tensor of the dtype and size that the metadata gives it. With the ZStandard extension
(``_extension.py``) a chunk is a zstd frame of such a zip. Those that are needed are decompressed once, into an unnamed
file that disappears with the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.dcp.metadata import Metadata, Stored, TensorMeta
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.pieces import arranged
from dsconv.checkpoint.map.regions import Sizes
from dsconv.checkpoint.map.tensors import Extent, Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.storage.local import OpenFile, Span, open_for_reading
from dsconv.checkpoint.torchfile.file import KnownPickles, TorchFile
from dsconv.checkpoint.torchfile.plain import plain
from dsconv.errors import (
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    OutputError,
    UnsupportedError,
    require_packages,
)
from dsconv.text import count

ZSTD = "stream.zstd"
ZSTD_VERSION = "1"
MAX_AROUND_BYTES = 1 << 20  # the most that a zip adds to its tensor's bytes
MAX_VALUE_BYTES = 64 << 20  # a parameter group lists the names of its parameters
MAX_KNOWN_BYTES = 4096  # of a value that is kept, for others that are the same
BLOCK_BYTES = 4 << 20
# This many bytes become at most 64 MB before they are counted, since 4 bytes can stand for a block of 128 kB.
ZSTD_STEP_BYTES = 2048
TRAILING = "a zstd frame that does not end where the chunk does"


class ChunkFiles:
    """Opens chunks, one file after another. It is a context manager that closes the file that is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unpacked: Unpacked | None = None
        self._known: KnownPickles = {}  # chunks of one shape have one pickle
        self._values: dict[bytes, Any] = {}  # many parameters have the same settings
        self._file: OpenFile | None = None

    def __enter__(self) -> ChunkFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _seek(self, name: str) -> OpenFile:
        path = self.folder / name
        if self._file is None or path != self._file.path:
            self.__exit__()
            self._file = open_for_reading(path)
        return self._file

    def piece(self, name: str, dtype: DType, sizes: Sizes, stored: Stored) -> Piece:
        """Return the one piece that a chunk is; it fills its own ``sizes`` from element 0 on.

        Args:
            name: The tensor, for messages.
            dtype: The dtype that the metadata gives the tensor.
            sizes: The shape of the chunk, in elements.
            stored: Where the chunk lies.

        Raises:
            MalformedError: The chunk is cut short or is not a file of torch.save.
            InconsistentCheckpointError: Its dtype or size is not what the metadata says.
            UnsupportedError: It was transformed in a way that dsconv does not know, or is not a plain tensor.
        """
        file = self._open(name, stored)
        path = file.path
        with _in_chunk(name, stored):
            span = self._span(file, stored, math.prod(sizes) * dtype.itemsize + MAX_AROUND_BYTES, path)
            chunk = TorchFile(path, span, self._known, may_hold_unread=True)
            tensor = chunk.root
            if not isinstance(tensor, TensorRef):
                raise UnsupportedError(
                    f"{path}: expected a plain tensor, found {safe_repr(tensor)}, which dsconv does not read"
                )
            if tensor.dtype != dtype or tensor.shape != sizes:
                raise InconsistentCheckpointError(
                    f"{path}: holds {tensor.dtype} {list(tensor.shape)} where the metadata says {dtype} {list(sizes)}:"
                    " files from two saves"
                )
            (piece,) = chunk.pieces(tensor)
        if stored.transforms and self.unpacked is not None:
            return self.unpacked.moved(piece, name, path)
        return piece

    def value(self, name: str, stored: Stored) -> Any:
        """Return an item that is not a tensor, such as a learning rate, as a plain value (``torchfile/plain.py``).

        Args:
            name: The item, for messages.
            stored: Where it lies.

        Raises:
            MalformedError: It is cut short, larger than a setting, or not a file of torch.save.
            UnsupportedError: It was transformed in a way that dsconv does not know, or is not a plain value.
        """
        file = self._open(name, stored)
        if stored.nbytes > MAX_VALUE_BYTES:
            raise MalformedError(
                f"{file.path}: {safe_repr(name)} takes {stored.nbytes} bytes; a setting takes at most {MAX_VALUE_BYTES}"
            )
        with _in_chunk(name, stored):
            data = (
                b""
                if stored.transforms or stored.nbytes > MAX_KNOWN_BYTES
                else file.read(stored.offset_bytes, stored.nbytes)
            )
            if data and data in self._values:
                return self._values[data]
            span = self._span(file, stored, MAX_VALUE_BYTES, None)
            chunk = TorchFile(span.path, span)
            found = plain(chunk.root, chunk, safe_repr(name, 200))
            if data:
                self._values[data] = found
        return found

    def _open(self, name: str, stored: Stored) -> OpenFile:
        """Return the file of a chunk, which lies in it as a whole."""
        file = self._seek(stored.file)
        end = stored.offset_bytes + stored.nbytes
        if end > file.nbytes:
            raise MalformedError(
                f"{file.path}: truncated: the chunk of {safe_repr(name)} should end at byte {end}, the file has"
                f" {file.nbytes}. Copy it again"
            )
        return file

    def _span(self, file: OpenFile, stored: Stored, limit_bytes: int, path: Path | None) -> Span:
        """Return the zip of a chunk, decompressed where it was compressed; errors name ``path``, or the real file."""
        if not stored.transforms:
            return Span(file, stored.offset_bytes, stored.nbytes)
        self.unpacked = self.unpacked or Unpacked()
        return self.unpacked.add(file, stored, limit_bytes, path)


@contextlib.contextmanager
def _in_chunk(name: str, stored: Stored) -> Iterator[None]:
    """Add the chunk to errors, whose offsets are counted from its start."""
    try:
        yield
    except DsconvError as error:
        raise type(error)(
            f"{error} (in the chunk of {safe_repr(name, 200)}, {stored.nbytes} bytes from byte {stored.offset_bytes} of"
            " the file)"
        ) from None


class Unpacked:
    """An unnamed file that chunks are decompressed into. It disappears when nothing refers to this object any more.

    It takes as much space in the folder for temporary files as the tensors have bytes, and no memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="dsconv-", buffering=0)  # noqa: SIM115 - it lives as long as the pieces
        self._end = 0
        self._reader: OpenFile | None = None
        self.path = Path(f"/proc/self/fd/{self._file.fileno()}")
        if not self.path.exists():
            self.path = Path(f"/dev/fd/{self._file.fileno()}")

    def add(self, file: OpenFile, stored: Stored, limit_bytes: int, named: Path | None) -> Span:
        """Decompress one chunk and return where it lies now.

        Args:
            file: The file that holds the chunk.
            stored: Where it lies there.
            limit_bytes: The size that a sound chunk cannot exceed.
            named: The path that errors of what reads it name; None for that of this file.

        Raises:
            MalformedError: It is not one whole zstd frame, or becomes larger than ``limit_bytes``.
            UnsupportedError: It was transformed by something else, or (MissingPackageError) zstandard is not installed.
            OutputError: The folder for temporary files is full.
        """
        path = file.path
        _require_zstd(path, stored.transforms)
        import zstandard

        start, position = self._end, stored.offset_bytes
        end = position + stored.nbytes
        stream = zstandard.ZstdDecompressor().decompressobj()
        try:
            while position < end and not stream.eof:
                data = file.read(position, min(BLOCK_BYTES, end - position))
                position += len(data)
                for at in range(0, len(data), ZSTD_STEP_BYTES):
                    if stream.eof:
                        raise MalformedError(f"{path}: {TRAILING}")
                    self._write(stream.decompress(data[at : at + ZSTD_STEP_BYTES]), start + limit_bytes, path)
        except zstandard.ZstdError as error:
            raise MalformedError(f"{path}: not a zstd frame, or a damaged one: {error}") from None
        except OSError as error:
            raise OutputError(
                f"decompressing {path} into {tempfile.gettempdir()} failed: {error.strerror}; "
                "set TMPDIR to a folder with room for all tensors"
            ) from None
        if not stream.eof or position < end or stream.unused_data:
            raise MalformedError(f"{path}: {TRAILING}")
        if self._reader is not None:
            self._reader.close()
        self._reader = open_for_reading(self.path)
        return Span(self._reader, start, self._end - start, named)

    def _write(self, data: bytes, limit: int, path: Path) -> None:
        if self._end + len(data) > limit:
            raise MalformedError(f"{path}: decompresses to more than its tensor has; refused")
        view = memoryview(data)
        while view:
            count = self._file.write(view)
            view, self._end = view[count:], self._end + count

    def moved(self, piece: Piece, name: str, path: Path) -> Piece:
        """Return the piece within this file; its record's name says where it came from."""
        record = replace(piece.extent.record, path=self.path, name=f"{name} of {path}, decompressed")
        return replace(piece, extent=Extent(record, piece.extent.offset_bytes, piece.extent.nbytes))


def _require_zstd(path: Path, transforms: Sequence[str]) -> None:
    for descriptor in transforms:
        name, _, version = descriptor.partition("/")
        if name != ZSTD or version.partition(".")[0] != ZSTD_VERSION or len(transforms) > 1:
            raise UnsupportedError(
                f"{path}: transformed by {safe_repr(tuple(transforms))}; dsconv reads torch's own {ZSTD}/{ZSTD_VERSION}"
            )
    require_packages(f"{path}: is compressed with zstd, and reading it", "zstd", "zstandard")


def _checksum_of(piece: Piece) -> Any:
    """Return the values that two copies of a chunk must share."""
    return piece.extent.record.crc32, piece.extent.nbytes


def files_of(metadata: Metadata, chosen: Mapping[str, str]) -> list[str]:
    """Return the names of the files that hold the chunks of the chosen tensors."""
    return sorted(
        {s.file for name in chosen for _, _, places in metadata.tensors[name].chunks.values() for s in places}
    )


def require_files(folder: Path, names: Iterable[str], metadata: Metadata) -> None:
    """Raise MissingShardError if a folder lacks files that its metadata names."""
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise MissingShardError(
            f"{folder} lacks {count(len(missing), 'file')} that {metadata.files[0].name} names, the first"
            f" {safe_repr(missing[0], 255)}: copy the files of all ranks"
        )


def entries_of(metadata: Metadata, chosen: Mapping[str, str], folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Open every chunk of the chosen tensors.

    Args:
        metadata: What ``read_metadata`` returned.
        chosen: {flat name in the metadata: name in the map}.
        folder: The folder with the ``.distcp`` files.

    Returns:
        The entries by their names in the map, and warnings.

    Raises:
        MissingShardError: A file that the metadata names is missing.
        UnsupportedError: A tensor has a dtype that dsconv does not know.
        InconsistentCheckpointError: Two tensors would have one name, or a chunk belongs to another save.
        MalformedError: A chunk is damaged.
    """
    require_files(folder, files_of(metadata, chosen), metadata)
    dtypes = {name: _dtype(name, metadata.tensors[name]) for name in chosen}
    found: dict[str, list[tuple[Sizes, Sizes, Piece]]] = {name: [] for name in chosen}
    differing: set[str] = set()
    todo = [
        (places, name, (at, sizes)) for name in chosen for at, sizes, places in metadata.tensors[name].chunks.values()
    ]
    todo.sort(key=lambda item: (item[0][0].file, item[0][0].offset_bytes))  # as they lie on disk
    with ChunkFiles(folder) as files, ChunkFiles(folder) as others:
        for (first, *copies), name, (offsets, sizes) in todo:
            piece = files.piece(name, dtypes[name], sizes, first)
            found[name].append((offsets, sizes, piece))
            for copy in copies:
                if _checksum_of(others.piece(name, dtypes[name], sizes, copy)) != _checksum_of(piece):
                    differing.add(name)
        unpacked = files.unpacked
    warnings = []
    if differing:
        warnings.append(
            f"{count(len(differing), 'tensor')} of which ranks stored different values, the first"
            f" {safe_repr(min(differing))}: took the lowest rank's"
        )
    if any(piece.extent.record.crc32 is None for chunks in found.values() for _, _, piece in chunks):
        warnings.append(
            "the chunks were saved without checksums (torch.serialization.set_crc32_options): damage cannot be detected"
        )
    entries: dict[str, TensorEntry] = {}
    taken: set[str] = set()
    owners: dict[tuple[Any, ...], str] = {}
    for flat, name in chosen.items():
        if name in taken:
            raise InconsistentCheckpointError(f"{folder}: two tensors are called {safe_repr(name)}")
        taken.add(name)
        meta = metadata.tensors[flat]
        places = tuple((key, tuple(stored)) for key, (_, _, stored) in meta.chunks.items())
        owner = owners.setdefault((meta.shape, meta.dtype_name, places), name) if places else name
        if owner != name:  # stored once under several names: tied
            entries[owner] = replace(entries[owner], aliases=(*entries[owner].aliases, name))
            continue
        entries[name] = TensorEntry(
            name, dtypes[flat], meta.shape, partial(_layout, arranged(found[flat], meta.shape), unpacked)
        )
    return entries, warnings


def _dtype(name: str, meta: TensorMeta) -> DType:
    if meta.dtype is None:
        raise UnsupportedError(
            f"{meta.path}: {safe_repr(name)} is of dtype {meta.dtype_name}, which dsconv does not read"
        )
    return meta.dtype


def _layout(pieces: tuple[Piece, ...], unpacked: Unpacked | None) -> tuple[Piece, ...]:
    return pieces  # ``unpacked``, the file that they lie in, lives as long as a layout refers to it
