"""Casting blocks of elements from one dtype to another, once and to nearest even."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dsconv.checkpoint.map.dtypes import DType

CASTABLE = frozenset({"float64", "float32", "float16", "bfloat16"})


def output_dtype(stored: DType, wanted: DType | None) -> DType:
    """Return what a tensor is written as.

    Floats of 16 bits and more are cast to ``wanted``, if it is given; integers, bools and fp8 never are.
    """
    return wanted if wanted is not None and stored.name in CASTABLE else stored


class Caster:
    """Casts blocks with torch into a buffer of its own. Each thread has one."""

    def __init__(self) -> None:
        self._out = bytearray()

    def cast(self, data: memoryview, source: DType, target: DType) -> tuple[memoryview, int]:
        """Cast ``data``, elements of ``source``, to ``target``.

        Returns:
            The cast bytes, which are valid until the next call, and how many finite values became infinite.
        """
        import torch

        numel = len(data) // source.itemsize
        if len(self._out) < numel * target.itemsize:
            self._out = bytearray(numel * target.itemsize)
        values = torch.frombuffer(data, dtype=getattr(torch, source.name))
        out = torch.frombuffer(self._out, dtype=getattr(torch, target.name), count=numel)
        out.copy_(values)
        overflowed = 0
        # The extremes tell whether a look at every element, which takes forty times as long, is worth it.
        if target.name in ("float16", "bfloat16") and not bool(
            torch.isfinite(torch.stack(torch.aminmax(values)).to(out.dtype)).all()
        ):
            overflowed = int((torch.isinf(out) & torch.isfinite(values)).sum())
        return memoryview(self._out)[: numel * target.itemsize], overflowed


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Make the threads that start in here cast on one core each. Otherwise every one of them would use all cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
