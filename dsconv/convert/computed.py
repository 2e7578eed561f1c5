"""Tensors of an output that are computed, such as a LoRA folded into its base, or a prompt that an encoder makes.

They are in a ``Checkpoint`` beside entries whose bytes lie in files, so a plan, a dry run and a verification treat both
alike. All other tensors go through the copy. A computed tensor is made, written and dropped before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.checksums import crc32
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES, CopyRun, Target
from dsconv.checkpoint.transfer.ordered import run_all
from dsconv.errors import InconsistentCheckpointError
from dsconv.text import quote

if TYPE_CHECKING:
    import torch


def _no_pieces() -> tuple[Piece, ...]:
    return ()


@dataclass(frozen=True)
class ComputedEntry(TensorEntry):
    """A tensor that ``compute`` makes from ``sources``; no file holds its bytes, so it has no pieces."""

    compute: Callable[[], torch.Tensor] | None = None
    sources: tuple[TensorEntry, ...] = ()

    def read(self, index: Any = None) -> torch.Tensor:
        """Return the computed tensor, or ``tensor[index]``.

        Raises InconsistentCheckpointError when the result is not of the dtype and shape that were planned.
        """
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


def fill_all(pairs: Iterable[tuple[TensorEntry, Target]], run: CopyRun) -> None:
    """Fill each target from its entry: those with bytes in files by the copy, then the computed ones, one at a time.

    The same copy checks the sources of computed tensors against their checksums. Raises what ``CopyRun`` raises, and
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
    caster = Caster()
    for entry, target in made:
        _write(entry, target, run, caster)


def _has_checksum(entry: TensorEntry) -> bool:
    return any(piece.extent.record.crc32 is not None for piece in entry.pieces)


def _nowhere(entry: TensorEntry) -> Target:
    """Return a target that drops its bytes: they are read only to be checked."""
    return Target(entry.name, entry.dtype, lambda data, offset_bytes, crc: None)


def _write(entry: ComputedEntry, target: Target, run: CopyRun, caster: Caster) -> None:
    data = entry.read_bytes()
    step = BLOCK_BYTES // entry.dtype.itemsize * entry.dtype.itemsize
    offset_bytes = 0
    for at in range(0, len(data), step):
        block = data[at : at + step]
        if target.dtype != entry.dtype:
            block, overflowed = caster.cast(block, entry.dtype, target.dtype)
            if overflowed:
                counts = run.stats.overflowed
                counts[target.name] = counts.get(target.name, 0) + overflowed
        target.write(block, offset_bytes, crc32(block))
        offset_bytes += len(block)
        run.stats.bytes_written += len(block)
        if run.progress is not None:
            run.progress(len(block))
