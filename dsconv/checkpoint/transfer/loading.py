"""Load whole tensors of a checkpoint into memory, with the same copy and the same checks as files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.copy import CopyRun, Target, copies_of, default_workers
from dsconv.checkpoint.transfer.reading import tensor_bytes
from dsconv.checkpoint.transfer.record_checks import source_checks
from dsconv.errors import require_packages

if TYPE_CHECKING:
    import torch


def load_tensors(
    entries: Iterable[TensorEntry],
    dtype_of: Callable[[TensorEntry], DType] = lambda entry: entry.dtype,
    workers: int | None = None,
) -> dict[str, torch.Tensor]:
    """Read tensors into new CPU tensors.

    Args:
        entries: the tensors to read.
        dtype_of: the dtype that each tensor is cast to, at most once.
        workers: the number of copying threads (default: one per core, at most 8).

    Returns:
        The tensors by name.

    Raises:
        MalformedError: a file ends early, or a record fails its CRC-32.
    """
    require_packages("reading tensors into memory", "torch", "torch")
    import torch

    targets: list[tuple[TensorEntry, Target]] = []
    tensors: dict[str, torch.Tensor] = {}
    for entry in entries:
        dtype = dtype_of(entry)
        tensor = torch.empty(entry.shape, dtype=getattr(torch, dtype.name))
        tensors[entry.name] = tensor
        if tensor.numel():
            targets.append((entry, Target(entry.name, dtype, _into(tensor_bytes(tensor)))))
    copies = [copy for entry, target in targets for copy in copies_of(entry, target)]
    checks, padding = source_checks(copies)
    run = CopyRun(workers or default_workers(), checks)
    run.run(chain(copies, padding))
    run.check_records()
    return tensors


def _into(view: memoryview) -> Callable[[memoryview, int, int], None]:
    def write(data: memoryview, offset_bytes: int, crc: int) -> None:
        view[offset_bytes : offset_bytes + len(data)] = data

    return write
