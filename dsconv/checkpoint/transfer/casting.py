"""Cast blocks of elements from one floating dtype to another: once, to nearest even, with numpy.

Casting needs no torch, whose import takes longer than most merges. numpy has no bfloat16, so its bits are computed. The
results are torch's bit for bit (torch, ``c10/util/BFloat16.h`` and the vectorized casts of ``aten/src/ATen/cpu/vec``),
NaN and subnormal values included, with one deliberate exception: float64 is rounded straight to 16 bits. torch rounds
it to float32 first, and thus twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

CASTABLE = frozenset({"float64", "float32", "float16", "bfloat16"})
CHUNK = 1 << 16  # elements that are cast at once; they fit in a core's own cache
SIGN, MAGNITUDE = 0x8000_0000, 0x7FFF_FFFF
INFINITY = 0x7F80_0000  # of float32; larger magnitudes are NaN
BF16_OVERFLOW = 0x7F7F_8000  # the smallest float32 that rounds to an infinite bfloat16
F16_OVERFLOW = 0x477F_F000  # 65520.0, the smallest float32 that rounds to an infinite float16
F16_NORMAL = 0x3880_0000  # 2**-14, the smallest normal float16
# torch's bfloat16 NaN: the vectorized casts of float32 and float64 set all bits, and the cast of float16 does not.
VECTORIZED_NAN, PLAIN_NAN = 0xFFFF, 0x7FC0


def output_dtype(stored: DType, wanted: DType | None) -> DType:
    """Return the dtype that a tensor is written in.

    Floats of 16 bits and more are cast to ``wanted``, if it is given; integers, bools and fp8 never are.
    """
    return wanted if wanted is not None and stored.name in CASTABLE else stored


class Caster:
    """Cast blocks into its own buffer. Each thread has one."""

    def __init__(self) -> None:
        self._out = bytearray()

    def cast(self, data: memoryview, source: DType, target: DType) -> tuple[memoryview, int]:
        """Cast ``data``, elements of ``source``, to ``target``.

        Returns:
            The cast bytes, which are valid until the next call, and how many finite values became infinite.
        """
        numel = len(data) // source.itemsize
        if len(self._out) < numel * target.itemsize:
            self._out = bytearray(numel * target.itemsize)
        out = memoryview(self._out)[: numel * target.itemsize]
        if not {source.name, target.name} <= CASTABLE:
            return out, _cast_with_torch(data, source, out, target)
        overflowed = 0
        for start in range(0, numel, CHUNK):
            stop = min(start + CHUNK, numel)
            part = data[start * source.itemsize : stop * source.itemsize]
            overflowed += _cast(part, source.name, out[start * target.itemsize : stop * target.itemsize], target.name)
        return out, overflowed


def _cast(data: memoryview, source: str, room: memoryview, target: str) -> int:
    """Cast one chunk into ``room``; return how many finite values became infinite."""
    import numpy as np

    if source == target:
        room[:] = data
        return 0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target == "float64":
            np.frombuffer(room, np.float64)[:] = _float32_bits(data, source).view(np.float32)
            return 0
        if source == "float64":
            values = np.frombuffer(data, np.float64)
            if target == "float32":
                out = np.frombuffer(room, np.float32)
                out[:] = values
                return int(np.count_nonzero(np.isinf(out) & np.isfinite(values)))
            return _to_16_bits(_rounded_to_odd(values), room, target, VECTORIZED_NAN)
        bits = _float32_bits(data, source)
        if target == "float32":
            np.frombuffer(room, np.uint32)[:] = bits
            return 0
        return _to_16_bits(bits, room, target, VECTORIZED_NAN if source == "float32" else PLAIN_NAN)


def _to_16_bits(bits: np.ndarray[Any, Any], room: memoryview, target: str, nan: int) -> int:
    import numpy as np

    out = np.frombuffer(room, np.uint16)
    return _to_bfloat16(bits, out, nan) if target == "bfloat16" else _to_float16(bits, out)


def _float32_bits(data: memoryview, source: str) -> np.ndarray[Any, Any]:
    """Return the values of ``data`` as bits of float32, which holds each of them exactly."""
    import numpy as np

    if source == "bfloat16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits)
    if source == "float16":
        bits = np.frombuffer(data, np.float16).astype(np.float32).view(np.uint32)
        bits[(bits & MAGNITUDE) > INFINITY] |= 0x0040_0000  # a NaN is made quiet, as processors do
        return bits
    return np.frombuffer(data, np.uint32)


def _rounded_to_odd(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float64 as bits of float32 that keep, in their last bit, whether anything was cut off.

    Rounded once more, to 16 bits, they give what the float64 itself rounds to (Boldo and Melquiond, "Emulation of a FMA
    and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    import numpy as np

    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    inexact = (back != values) & ~np.isnan(values)
    bits[inexact & (np.abs(back) > np.abs(values))] -= 1  # cut off, not rounded up
    bits[inexact] |= 1
    return bits


def _to_bfloat16(bits: np.ndarray[Any, Any], out: np.ndarray[Any, Any], nan: int) -> int:
    import numpy as np

    work = np.right_shift(bits, 16)
    work &= 1
    work += 0x7FFF
    work += bits
    work >>= 16  # numpy narrows whole words faster than it takes every second half word
    out[:] = work
    np.bitwise_and(bits, MAGNITUDE, out=work)
    if int(work.max(initial=0)) < BF16_OVERFLOW:
        return 0
    out[work > INFINITY] = nan
    return int(np.count_nonzero((work >= BF16_OVERFLOW) & (work < INFINITY)))


def _to_float16(bits: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> int:
    import numpy as np

    magnitude = np.bitwise_and(bits, MAGNITUDE)
    work = np.right_shift(magnitude, 13)
    work &= 1
    work += np.uint32((0xFFF - (112 << 23)) & 0xFFFF_FFFF)  # the exponent's bias goes from 127 to 15
    work += magnitude
    work >>= 13
    out[:] = work.astype(np.uint16)
    small = magnitude < F16_NORMAL
    if small.any():  # 0.5 has float16's smallest subnormal as its last bit, so the sum is rounded there
        sums = (magnitude[small].view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F00_0000)
        out[small] = sums.astype(np.uint16)
    overflowed = 0
    if int(magnitude.max(initial=0)) >= F16_OVERFLOW:
        infinite = magnitude >= F16_OVERFLOW
        overflowed = int(np.count_nonzero(infinite & (magnitude < INFINITY)))
        out[infinite] = 0x7C00
        nan = magnitude > INFINITY
        out[nan] = (0x7E00 | ((magnitude[nan] >> 13) & 0x3FF)).astype(np.uint16)
    out |= (bits >> 16).astype(np.uint16) & 0x8000
    return overflowed


def _cast_with_torch(data: memoryview, source: DType, room: memoryview, target: DType) -> int:
    """Cast from or to a dtype that is not a float of 16 bits or more, which a model may need in a loader."""
    import torch

    values = torch.frombuffer(data, dtype=getattr(torch, source.name))
    out = torch.frombuffer(room, dtype=getattr(torch, target.name))
    out.copy_(values)
    if not target.floating or target.itemsize > 4:
        return 0
    return int((torch.isinf(out.float()) & torch.isfinite(values.double())).sum())
