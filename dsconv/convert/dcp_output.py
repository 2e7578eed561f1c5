"""A DCP directory as a destination: ``.distcp`` files, and ``.metadata``, which makes them a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.dcp_layout import METADATA, SUFFIX, DcpPlan, PlacedTensor, chunk_archive, metadata
from dsconv.convert.destination import Destination, FileRange, FillingFile, OutputFile, Written


class DcpOutput(Destination):
    """The files of a plan, and ``.metadata``, which makes them a checkpoint."""

    what = "a DCP checkpoint"
    command = "to-dcp"

    def __init__(self, plan: DcpPlan) -> None:
        self.plan = plan
        self._chunks: dict[str, list[_ChunkRanges]] = {name: [] for name in plan.files}

    @property
    def files(self) -> Sequence[OutputFile]:
        """The ``.distcp`` files."""
        data_bytes = dict.fromkeys(self.plan.files, 0)
        for tensor in self.plan.tensors:
            for chunk in tensor.chunks:
                data_bytes[chunk.filename] += chunk.data_bytes
        return [OutputFile(name, nbytes, data_bytes[name]) for name, nbytes in self.plan.files.items()]

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield the tensors, each of which is divided into its chunks."""
        for tensor in self.plan.tensors:
            chunked = _ChunkRanges(tensor, files)
            for name in {chunk.filename for chunk in tensor.chunks}:
                self._chunks[name].append(chunked)
            target = Target(tensor.names[0], tensor.dtype, chunked.write, tensor.spans)
            yield tensor.chunks[0].filename, tensor.entry, target

    def rest(self, name: str) -> Iterable[tuple[int, bytes]]:
        """Yield the bytes around each chunk of the file, now that its CRC-32 is known."""
        for chunked in self._chunks[name]:
            yield from chunked.around(name)

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return ``.metadata``."""
        return {self.plan.folder + METADATA: metadata(self.plan)}

    @property
    def commit_order(self) -> Sequence[str]:
        """``.metadata`` makes the folder a checkpoint."""
        return [*self.plan.files, METADATA]

    def older(self, target: Path) -> list[str]:
        """Return the files of an earlier DCP checkpoint in ``target``, ``.metadata`` first."""
        return sorted(path.name for path in target.iterdir() if path.name == METADATA or path.name.endswith(SUFFIX))


class _ChunkRanges:
    """The ranges of one tensor: each of its chunks has its own, and its own CRC-32."""

    def __init__(self, tensor: PlacedTensor, files: Mapping[str, FillingFile]) -> None:
        self._tensor = tensor
        self._ranges: list[FileRange] = [
            files[chunk.filename].range(chunk.offset_bytes + chunk.head_bytes, chunk.data_bytes)
            for chunk in tensor.chunks
        ]

    def write(self, data: memoryview, offset_bytes: int, crc: int) -> None:
        """Divide ``data`` among the chunks. Its CRC-32 serves where one chunk takes all of it."""
        itemsize, whole = self._tensor.dtype.itemsize, len(data)
        while len(data):
            number = self._tensor.chunk_at(offset_bytes // itemsize)
            chunk = self._tensor.chunks[number]
            inside = offset_bytes - chunk.start * itemsize
            part = data[: chunk.data_bytes - inside]
            self._ranges[number].write(part, inside, crc if len(part) == whole else crc32(part))
            data, offset_bytes = data[len(part) :], offset_bytes + len(part)

    def around(self, filename: str) -> Iterable[tuple[int, bytes]]:
        """Yield (offset in the file, bytes) of what surrounds the chunks that lie in ``filename``."""
        for chunk, filled in zip(self._tensor.chunks, self._ranges, strict=True):
            if chunk.filename == filename:
                archive = chunk_archive(self._tensor.dtype, chunk.sizes)
                for offset, data in archive.fixed(checksum.value for checksum in (filled.checksum,)):
                    yield chunk.offset_bytes + offset, data
