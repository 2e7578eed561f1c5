"""Whole tensors of a checkpoint into memory, by the same copy that writes files: several workers, checksums checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import CopyRun, Target, copies_of, default_workers, source_checks
from dsconv.checkpoint.transfer.reading import tensor_bytes

if TYPE_CHECKING:
    import torch


def load_tensors(
    entries: Iterable[TensorEntry],
    dtype_of: Callable[[TensorEntry], DType] = lambda entry: entry.dtype,
    workers: int | None = None,
) -> dict[str, torch.Tensor]:
    """{name: new CPU tensor} of ``entries``, each cast at most once, to what ``dtype_of`` says.

    Raises MalformedError where a file ends early or a record fails its CRC-32.
    """
    import torch

    targets: list[tuple[TensorEntry, Target]] = []
    tensors: dict[str, torch.Tensor] = {}
    for entry in entries:
        dtype = dtype_of(entry)
        tensor = torch.empty(entry.shape, dtype=getattr(torch, dtype.name))
        tensors[entry.name] = tensor
        if tensor.numel():
            checksum = RunningChecksum(entry.numel * dtype.itemsize)
            targets.append((entry, Target(entry.name, dtype, partial(_fill, tensor_bytes(tensor)), checksum)))
    copies = [copy for entry, target in targets for copy in copies_of(entry, target)]
    checks, padding = source_checks(copies)
    run = CopyRun(workers or default_workers(), checks)
    run.run(chain(copies, padding))
    run.check_records()
    return tensors


def _fill(view: memoryview, data: memoryview, offset_bytes: int) -> None:
    view[offset_bytes : offset_bytes + len(data)] = data
