"""Settings and counters of a file, as plain values that can be written again."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import Instance, Opaque, TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous
from dsconv.errors import MalformedError, UnsupportedError

MAX_SMALL_BYTES = 1 << 20  # a setting is a number or a handful of them
MAX_DEPTH = 40  # real settings are nested four deep
# numpy's names of scalar dtypes and the codes of ``struct`` for them.
_NUMPY_CODES = {
    "f8": "<d",
    "f4": "<f",
    "f2": "<e",
    "i8": "<q",
    "i4": "<i",
    "i2": "<h",
    "i1": "<b",
    "u8": "<Q",
    "b1": "<?",
}


def plain(value: Any, file: TorchFile, where: str, depth: int = 0) -> Any:
    """Return ``value`` with small tensors read and numpy's numbers made Python's.

    Args:
        value: What the pickle holds: numbers, texts, lists, mappings, tensors, objects of DeepSpeed.
        file: The file that it is from.
        where: What it is, for messages.
        depth: How deep it is nested.

    Raises:
        MalformedError: It is nested too deep.
        UnsupportedError: It holds something that could not be written again.
    """
    if depth > MAX_DEPTH:
        raise MalformedError(f"{file.path}: {where} is nested over {MAX_DEPTH} deep")
    deeper = partial(plain, file=file, where=where, depth=depth + 1)
    if value is None or isinstance(value, (bool, int, float, str, DType)):
        return value
    if isinstance(value, TensorRef):
        if value.numel * value.dtype.itemsize > MAX_SMALL_BYTES or not is_contiguous(value.shape, value.strides):
            raise UnsupportedError(
                f"{file.path}: {where} holds a tensor of shape {list(value.shape)}, larger than a setting should be"
            )
        return SmallTensor(value.dtype, value.shape, file.value(value) if value.numel else b"")
    if isinstance(value, dict):
        return {deeper(k): deeper(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(deeper(v) for v in value)
    if type(value) is Instance:
        return Instance(value.cls, deeper(value.args), deeper(value.state))
    if isinstance(value, Opaque) and value.cls.endswith("multiarray.scalar") and len(value.args) == 2:
        kind, data = value.args
        code = _NUMPY_CODES.get(str(kind.args[0])) if isinstance(kind, Opaque) and kind.args else None
        if code and isinstance(data, bytes) and len(data) == struct.calcsize(code):
            return struct.unpack(code, data)[0]
    raise UnsupportedError(
        f"{file.path}: {where} holds {safe_repr(value)}, which cannot be written again; keep plain numbers there"
    )
