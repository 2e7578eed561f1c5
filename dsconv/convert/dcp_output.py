"""The files of a DCP checkpoint for the writer: what the copy fills, what surrounds it, and ``.metadata``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.dcp_layout import METADATA, SUFFIX, DcpPlan, PlacedTensor, chunk_archive, flat_name, metadata
from dsconv.convert.destination import Destination, FileRange, FillingFile, OutputFile, Written
from dsconv.errors import OutputError

SCHEDULER = "scheduler.bin"
# What accelerate's ``save_state`` writes (``accelerate/utils/constants.py``).
OF_ACCELERATE = (
    "pytorch_model",
    "optimizer",
    "scheduler",
    "sampler",
    "scaler",
    "random_states",
    "custom_checkpoint",
    "dl_state_dict",
)


class DcpOutput(Destination):
    """The files of the plans, and their ``.metadata``, which makes them a checkpoint.

    Args:
        plans: the DCP directories, that of the model first.
        hidden: how many keys of each path are left out of the names in messages.
        beside: small files that lie beside the directories, and their contents.
    """

    what = "a DCP checkpoint"
    command = "to-dcp"

    def __init__(self, plans: Sequence[DcpPlan], hidden: int = 0, beside: Mapping[str, bytes] | None = None) -> None:
        self._plans = plans
        self._hidden = hidden
        self._beside = dict(beside or {})
        self._chunks: dict[str, list[_ChunkRanges]] = {name: [] for plan in plans for name in plan.files}

    @property
    def files(self) -> Sequence[OutputFile]:
        """The ``.distcp`` files that the copy fills."""
        data_bytes = dict.fromkeys(self._chunks, 0)
        for plan in self._plans:
            for tensor in plan.tensors:
                for chunk in tensor.chunks:
                    data_bytes[chunk.filename] += chunk.data_bytes
        sizes = [size for plan in self._plans for size in plan.files.items()]
        return [OutputFile(name, nbytes, data_bytes[name]) for name, nbytes in sizes]

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield the tensors, each of which is divided into its chunks."""
        for tensor in (tensor for plan in self._plans for tensor in plan.tensors):
            chunked = _ChunkRanges(tensor, files)
            for name in {chunk.filename for chunk in tensor.chunks}:
                self._chunks[name].append(chunked)
            shown = flat_name(tensor.paths[0][self._hidden :])
            yield tensor.chunks[0].filename, tensor.entry, Target(shown, tensor.dtype, chunked.write, tensor.spans)

    def rest(self, name: str) -> Iterable[tuple[int, bytes]]:
        """Yield the bytes around each chunk of the file, now that its CRC-32 is known."""
        for chunked in self._chunks[name]:
            yield from chunked.around(name)

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return what holds the values that are not copied, and ``.metadata``."""
        found = self._beside | {plan.small: plan.content for plan in self._plans if plan.small}
        return found | {plan.folder + METADATA: metadata(plan) for plan in self._plans}

    @property
    def commit_order(self) -> Sequence[str]:
        """``.metadata`` makes the folder a checkpoint, or the folder of the model if there are several."""
        names = [plan.names if not plan.folder else [plan.folder.rstrip("/")] for plan in reversed(self._plans)]
        return [*self._beside, *chain.from_iterable(names)]

    def older(self, target: Path) -> list[str]:
        """Return the files or folders of an earlier DCP checkpoint in ``target``, the commit marker first.

        Raises:
            OutputError: ``target`` holds an accelerate checkpoint that has more than ``to-dcp`` writes.
        """
        names = sorted(path.name for path in target.iterdir())
        if not any(plan.folder for plan in self._plans):
            return [name for name in names if name == METADATA or name.endswith(SUFFIX)]
        folders = [plan.folder.rstrip("/") for plan in self._plans]
        for name in names:
            if name not in (*folders, SCHEDULER) and name.startswith(OF_ACCELERATE):
                raise OutputError(f"{target} holds another checkpoint ({name}); give the output a folder of its own")
        for path in (path for name in folders if name in names for path in _inside(target / name)):
            if path.name != METADATA and path.suffix != SUFFIX:
                raise OutputError(
                    f"{path} belongs to no DCP checkpoint, and would be removed with {path.parent}: move it away, or"
                    " give the output a folder of its own"
                )
        return [name for name in (*folders, SCHEDULER) if name in names]


def _inside(folder: Path) -> list[Path]:
    """Return what lies in a folder; nothing for a link or a file, which are refused elsewhere."""
    if (not is_remote(folder) and folder.is_symlink()) or not folder.is_dir():
        return []
    return sorted(folder.iterdir())


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
