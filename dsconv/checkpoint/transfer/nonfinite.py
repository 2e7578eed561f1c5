"""Notice NaN and infinite values in the bytes that a copy moves.

As integers, the patterns of NaN and infinity are the largest of their sign: in float32, 0x7F800000 and above, and with
the sign bit 0xFF800000 and above. So the largest signed and the largest unsigned integer of a block show whether it has
any. A block that is cast goes through numpy anyway, and each of its values is checked. A block that is only copied does
not: importing numpy would take longer than most merges, so SAMPLES values of it are checked, at equal distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from dsconv.checkpoint.map.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

SAMPLES = 64  # of a block of 1 MB: some microseconds
# By dtype: the codes of signed and unsigned integers of its size, and the bits of infinity.
BITS: dict[str, tuple[Literal["q", "i", "h"], Literal["Q", "I", "H"], int]] = {
    "float64": ("q", "Q", 0x7FF0_0000_0000_0000),
    "float32": ("i", "I", 0x7F80_0000),
    "float16": ("h", "H", 0x7C00),
    "bfloat16": ("h", "H", 0x7F80),
}


def count_nonfinite(data: memoryview, dtype: DType) -> int:
    """Return how many values of ``data`` are NaN or infinite; 0 for a dtype that is no float of 16 bits or more."""
    if dtype.name not in BITS or not data.nbytes:
        return 0
    import numpy as np

    signed, unsigned, infinity = BITS[dtype.name]
    sign = 1 << (8 * dtype.itemsize - 1)
    bits: np.ndarray[Any, Any] = np.frombuffer(data, unsigned)
    if int(bits.max()) < infinity | sign and int(bits.view(signed).max()) < infinity:
        return 0
    return int(np.count_nonzero((bits & (sign - 1)) >= infinity))


def sample_nonfinite(data: memoryview, dtype: DType) -> int:
    """Return how many of at most SAMPLES values of ``data`` are NaN or infinite. It needs no numpy."""
    if dtype.name not in BITS or not data.nbytes:
        return 0
    signed, unsigned, infinity = BITS[dtype.name]
    numel = data.nbytes // dtype.itemsize
    sign = 1 << (8 * dtype.itemsize - 1)
    step = -(-numel // SAMPLES)
    values = data.cast(unsigned)[::step]
    if max(values) < infinity | sign and max(data.cast(signed)[::step]) < infinity:
        return 0
    return sum(value & (sign - 1) >= infinity for value in values)
