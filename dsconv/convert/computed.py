"""Tensors of an output that are computed, such as a LoRA folded into its base, or a prompt that an encoder makes.

They are in a ``Checkpoint`` beside entries whose bytes lie in files, so a plan, a dry run and a verification treat both
alike. All other tensors go through the copy. A computed tensor is made, written and dropped before the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES, CopyRun, Target
from dsconv.checkpoint.transfer.ordered import run_all
from dsconv.checkpoint.transfer.pool import Jobs, run_jobs
from dsconv.errors import InconsistentCheckpointError
from dsconv.text import quote

if TYPE_CHECKING:
    import torch


Blocks = Iterator[tuple[memoryview, int]]


def _no_pieces() -> tuple[Piece, ...]:
    return ()


@dataclass(frozen=True)
class ComputedEntry(TensorEntry):
    """A tensor that is made from ``sources``; no file holds its bytes, so it has no pieces.

    ``compute`` makes all of it, or ``blocks`` yields its bytes from the first to the last, each with the number of its
    values that became infinite. Bytes are valid until the next ones are asked for.
    """

    compute: Callable[[], torch.Tensor] | None = None
    sources: tuple[TensorEntry, ...] = ()
    blocks: Callable[[], Blocks] | None = None

    def read(self, index: Any = None) -> torch.Tensor:
        """Return the computed tensor, or ``tensor[index]``.

        Raises InconsistentCheckpointError when the result is not of the dtype and shape that were planned.
        """
        import torch

        if self.blocks is not None:
            raw = torch.frombuffer(bytearray(self.read_bytes()), dtype=torch.uint8) if self.numel else torch.empty(0)
            tensor = raw.view(getattr(torch, self.dtype.name)).reshape(self.shape)
            return tensor if index is None else tensor[index]
        if self.compute is None:
            raise InconsistentCheckpointError(f"tensor {quote(self.name)}: nothing says how to compute it")
        tensor = self.compute().detach().contiguous()
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if found != (self.dtype.name, self.shape):
            raise InconsistentCheckpointError(
                f"tensor {quote(self.name)}: computed {found[0]} {list(found[1])}, expected {self.dtype}"
                f" {list(self.shape)}"
            )
        return tensor if index is None else tensor[index]

    def read_bytes(self) -> memoryview:
        """Return the computed tensor's bytes, row-major."""
        if self.blocks is not None:
            return memoryview(b"".join(bytes(block) for block, _ in self.blocks()))
        import torch

        tensor = self.read()
        return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def computed(
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    compute: Callable[[], torch.Tensor],
    *sources: TensorEntry,
    aliases: tuple[str, ...] = (),
) -> ComputedEntry:
    """Return the entry ``name`` whose value is ``compute()``, made of ``sources``."""
    return ComputedEntry(name, dtype, shape, _no_pieces, aliases, compute=compute, sources=sources)


def streamed(entry: TensorEntry, dtype: DType, blocks: Callable[[], Blocks], *sources: TensorEntry) -> ComputedEntry:
    """Return ``entry`` in another dtype, with the bytes that ``blocks`` yields, made of it and of ``sources``."""
    return ComputedEntry(
        entry.name, dtype, entry.shape, _no_pieces, entry.aliases, entry.role, sources=(entry, *sources), blocks=blocks
    )


def fill_all(pairs: Iterable[tuple[TensorEntry, Target]], run: CopyRun) -> None:
    """Fill each target from its entry: those with bytes in files by the copy, then the computed ones.

    Of those, one at a time is made whole; the ones that are made in blocks go through all threads. The same copy checks
    the sources of computed tensors against their checksums. Raises what ``CopyRun`` raises, and
    InconsistentCheckpointError for a result of another dtype or shape than planned.
    """
    stored: list[tuple[TensorEntry, Target]] = []
    made: list[tuple[ComputedEntry, Target]] = []
    for entry, target in pairs:
        if isinstance(entry, ComputedEntry):
            made.append((entry, target))
        else:
            stored.append((entry, target))
    checked = {source.name: source for entry, _ in made for source in entry.sources if _has_checksum(source)}
    run_all([*stored, *((source, _nowhere(source)) for source in checked.values())], run)
    counting = threading.Lock()
    for entry, target in made:
        if entry.blocks is None:
            _write(entry, target, run, Caster(), counting, lambda: False)

    def work(jobs: Jobs[tuple[ComputedEntry, Target]]) -> None:
        caster = Caster()
        for entry, target in jobs:
            _write(entry, target, run, caster, counting, lambda: jobs.stopped)

    if in_blocks := [pair for pair in made if pair[0].blocks is not None]:
        run_jobs(in_blocks, work, run.workers)


def _has_checksum(entry: TensorEntry) -> bool:
    return any(piece.extent.record.crc32 is not None for piece in entry.pieces)


def _nowhere(entry: TensorEntry) -> Target:
    """Return a target that drops its bytes: they are read only to be checked."""
    return Target(entry.name, entry.dtype, lambda data, offset_bytes, crc: None)


def _write(
    entry: ComputedEntry,
    target: Target,
    run: CopyRun,
    caster: Caster,
    counting: threading.Lock,
    stopped: Callable[[], bool],
) -> None:
    offset_bytes = 0
    for made, overflowed in _blocks_of(entry):
        if stopped():
            return
        block = made
        if target.dtype != entry.dtype:
            block, overflowed = caster.cast(made, entry.dtype, target.dtype)
        target.write(block, offset_bytes, crc32(block))
        offset_bytes += len(block)
        with counting:
            if overflowed:
                run.stats.overflowed[target.name] = run.stats.overflowed.get(target.name, 0) + overflowed
            run.stats.bytes_written += len(block)
        if run.progress is not None:
            run.progress(len(block))


def _blocks_of(entry: ComputedEntry) -> Blocks:
    if entry.blocks is not None:
        yield from entry.blocks()
        return
    data = entry.read_bytes()
    step = BLOCK_BYTES // entry.dtype.itemsize * entry.dtype.itemsize
    for at in range(0, len(data), step):
        yield data[at : at + step], 0
