"""The element types that checkpoints hold, under the names that torch and safetensors give them.

Sources: ``torch/storage.py`` (storage classes), safetensors 0.8 ``safetensors/src/tensor.rs`` (``Dtype``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DType:
    """One element type. ``itemsize`` is in bytes.

    Elements of less than a byte are packed: ``packed`` are how many of them take how many bytes. The map counts their
    bytes, so that they are copied like any others: the last dimension of a shape is in bytes, as torch has it for
    ``float4_e2m1fn_x2``. safetensors counts the elements themselves (``header_shape``).
    """

    name: str  # torch's name, as in ``torch.bfloat16``
    safetensors: str
    itemsize: int
    floating: bool = False
    packed: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return self.name

    def header_shape(self, shape: tuple[int, ...]) -> list[int]:
        """Return a shape of the map as a safetensors header has it: in elements."""
        elements, nbytes = self.packed
        return [*shape[:-1], shape[-1] // nbytes * elements] if self.packed != (1, 1) else list(shape)

    def map_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of a safetensors header as the map has it; None if a row does not end with a byte."""
        elements, nbytes = self.packed
        if self.packed == (1, 1):
            return shape
        return (*shape[:-1], shape[-1] // elements * nbytes) if shape and shape[-1] % elements == 0 else None


_TABLE = (
    DType("float64", "F64", 8, True),
    DType("float32", "F32", 4, True),
    DType("float16", "F16", 2, True),
    DType("bfloat16", "BF16", 2, True),
    DType("float8_e4m3fn", "F8_E4M3", 1, True),
    DType("float8_e5m2", "F8_E5M2", 1, True),
    DType("float8_e8m0fnu", "F8_E8M0", 1, True),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, True),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, True),
    DType("float4_e2m1fn_x2", "F4", 1, True, (2, 1)),
    DType("complex64", "C64", 8),
    DType("int64", "I64", 8),
    DType("int32", "I32", 4),
    DType("int16", "I16", 2),
    DType("int8", "I8", 1),
    DType("uint64", "U64", 8),
    DType("uint32", "U32", 4),
    DType("uint16", "U16", 2),
    DType("uint8", "U8", 1),
    DType("bool", "BOOL", 1),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
# torch has no type for these; they are copied, and cannot be read into a torch tensor.
_UNKNOWN_TO_TORCH = (
    DType("float6_e2m3", "F6_E2M3", 1, True, (4, 3)),
    DType("float6_e3m2", "F6_E3M2", 1, True, (4, 3)),
)
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in (*_TABLE, *_UNKNOWN_TO_TORCH)}
STORAGE_CLASSES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "half": "float16"}


# What ``dtype`` may be in Python, for type checkers; a torch.dtype is taken too.
DTypeName = Literal["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]
OUTPUTS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # what weights are cast to, and its short name


def parse_dtype(given: object) -> DType:
    """Return the dtype that a user asks for.

    Args:
        given: fp32, bf16, fp16, torch's names for these (with or without ``torch.``), or a ``torch.dtype``.

    Raises:
        ValueError: it is none of these. Weights cast to integers, say, would be destroyed.
    """
    name = str(given).removeprefix("torch.") if isinstance(given, str) or type(given).__name__ == "dtype" else ""
    name = ALIASES.get(name, name)
    if name not in OUTPUTS:
        raise ValueError(
            f"unknown dtype {given!r}: use fp32, bf16 or fp16; float32, bfloat16, float16 and torch.dtype are taken too"
        )
    return BY_NAME[name]


def short_name(dtype: DType | None) -> str | None:
    """Return fp32, bf16 or fp16; None for no dtype."""
    return None if dtype is None else OUTPUTS.get(dtype.name, dtype.name)
