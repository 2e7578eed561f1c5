"""Bytes of tensors as numbers: float64 holds the values of every dtype that is compared or summed up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.transfer.casting import CASTABLE, Caster

if TYPE_CHECKING:
    import numpy as np

WIDE = BY_NAME["float64"]
INTEGERS = {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "uint64": "<u8", "uint32": "<u4"}
INTEGERS |= {"uint16": "<u2", "uint8": "u1", "bool": "?"}


def is_number(dtype: DType) -> bool:
    """Return whether values of ``dtype`` are read as numbers; floats of 8 bits and less are not."""
    return dtype.name in CASTABLE or dtype.name in INTEGERS


def as_float64(data: memoryview, dtype: DType, caster: Caster) -> np.ndarray[Any, Any]:
    """Return the elements of a block as float64, in memory of ``caster`` that its next call overwrites."""
    import numpy as np

    if dtype.name in CASTABLE:
        return np.frombuffer(caster.cast(data, dtype, WIDE)[0], np.float64)
    return np.frombuffer(data, INTEGERS[dtype.name]).astype(np.float64)
