"""Weights that are stored as FP8 with a scale for each block of a matrix, as floats of 16 or 32 bits.

DeepSeek-V3 and transformers' fine-grained FP8 keep a weight as float8_e4m3fn, and beside it, as ``<name>_scale_inv``,
what each block of 128 × 128 is multiplied by (transformers ``integrations/finegrained_fp8.py``
``Fp8Dequantize._dequantize_one``; DeepSeek-V3 ``inference/kernel.py`` ``weight_dequant``). The product is made in
float32 and rounded once. A matrix goes through a few rows at a time.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.config_files import read_config
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.casting import Caster
from dsconv.checkpoint.transfer.reading import Sources, read_flat_into
from dsconv.convert.computed import Blocks, streamed
from dsconv.errors import UnsupportedError
from dsconv.text import quote

if TYPE_CHECKING:
    import numpy as np

FP8 = "float8_e4m3fn"
QUANTIZED = (FP8, "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2")
SCALE = "_scale_inv"
ACTIVATION = ".activation_scale"  # what inputs are multiplied by; a model of plain floats has none
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
CONFIG_KEY = "quantization_config"
METHOD = "fp8"  # transformers ``utils/quantization_config.py`` FineGrainedFP8Config
STEP_BYTES = 1 << 20  # of FP8 at a time
FLOAT32 = BY_NAME["float32"]


def dequantized(checkpoint: Checkpoint, config: Path | None, dtype: DType | None) -> Checkpoint:
    """Return a checkpoint whose FP8 weights are of ``dtype``, computed as they are written.

    Args:
        checkpoint: Any checkpoint. One without FP8, or without any sign that its FP8 is quantized, is returned as it
            is; so is every one if ``dtype`` is None.
        config: The model's config.json, which names the scheme and the size of the blocks.
        dtype: The wanted dtype.

    Raises:
        UnsupportedError: The scheme is not known.
    """
    scales = {name for name in checkpoint if name.endswith(SCALE)}
    if dtype is None or not (scales or any(entry.dtype.name in QUANTIZED for entry in checkpoint.values())):
        return checkpoint
    scheme = (read_config(config) or {}).get(CONFIG_KEY) if config is not None else None
    if not scales and not scheme:
        return checkpoint
    block = _block_size(scheme, config)
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.items():
        if name in scales or name.endswith(ACTIVATION):
            continue
        scale = checkpoint[name + SCALE] if name + SCALE in scales else None
        if scale is None and entry.dtype.name not in QUANTIZED:
            entries[name] = entry
        else:
            entries[name] = _weight(checkpoint, entry, scale, block, dtype)
    if lost := sorted(name for name in scales if name.removesuffix(SCALE) not in checkpoint):
        raise UnsupportedError(f"{checkpoint.path}: {quote(lost[0])} is the scale of a weight that is not there")
    left_out = {**(checkpoint.info.get("left_out") or {}), "scales of FP8 weights": len(checkpoint) - len(entries)}
    return checkpoint.with_entries(
        entries,
        {"dequantized": dtype.name, "left_out": left_out},
        no_training="its weights have another dtype than those that were trained",
    )


def _block_size(scheme: Any, config: Path | None) -> tuple[int, int] | None:
    """Return the rows and columns of a block that a configuration names; None where it names none.

    Raises:
        UnsupportedError: It names another scheme.
    """
    if scheme is None:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method != METHOD:
        raise UnsupportedError(
            f"{config}: {CONFIG_KEY} names the scheme {quote(method)}, which --dtype does not dequantize; it knows"
            f" {METHOD} with a scale for each block. Leave out --dtype to keep the weights as they are stored"
        )
    size = scheme.get("weight_block_size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise UnsupportedError(f"{config}: weight_block_size is {quote(size)}; expected two positive numbers")
    return size[0], size[1]


def _weight(
    checkpoint: Checkpoint, entry: TensorEntry, scale: TensorEntry | None, block: tuple[int, int] | None, dtype: DType
) -> TensorEntry:
    name, where = quote(entry.name), checkpoint.path
    if scale is None:
        raise UnsupportedError(
            f"{where}: {name} is {entry.dtype} without a scale {quote(entry.name + SCALE)}, so --dtype cannot"
            " dequantize it. Leave out --dtype to keep the weights as they are stored"
        )
    if entry.dtype.name != FP8 or len(entry.shape) < 2 or scale.dtype.name not in SCALES:
        raise UnsupportedError(
            f"{where}: {name} is {entry.dtype} {list(entry.shape)} with scales of {scale.dtype}; --dtype dequantizes"
            f" matrices of {FP8} with scales of {', '.join(SCALES)}"
        )
    rows, columns = entry.shape[-2:]
    if len(scale.shape) > 1:
        grid, leading = scale.shape[-2:], scale.shape[:-2]
    else:  # one scale of all
        grid, leading = ((1, 1) if scale.numel == 1 else (0, 0)), entry.shape[:-2]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == grid:
        size = block
    elif all(grid) and not rows % grid[0] and not columns % grid[1]:  # as transformers does without a size
        size = rows // grid[0], columns // grid[1]
    else:
        size = (0, 0)
    if not all(size) or leading != entry.shape[:-2]:
        raise UnsupportedError(
            f"{where}: {name} of shape {list(entry.shape)} has scales of shape {list(scale.shape)}; expected one for"
            f" each block of {' × '.join(map(str, block)) if block else 'equal blocks'}"
        )
    return streamed(entry, dtype, partial(_blocks, entry, scale, size, grid, dtype), scale)


def _blocks(
    entry: TensorEntry, scale: TensorEntry, size: tuple[int, int], grid: tuple[int, ...], dtype: DType
) -> Blocks:
    """Yield the bytes of a weight in ``dtype``, and how many values became infinite, a few rows at a time."""
    import numpy as np

    rows, columns = entry.shape[-2:]
    pieces = entry.pieces
    table, caster = _values(), Caster()
    step = min(size[0], max(1, STEP_BYTES // max(1, columns)))
    with Sources() as sources, np.errstate(over="ignore", invalid="ignore"):
        scales = np.broadcast_to(_scales(scale, sources).reshape(-1, *grid), (_count(entry.shape[:-2]), *grid))
        for number, of_matrix in enumerate(scales):
            for row in range(0, rows, size[0]):
                factors = np.repeat(of_matrix[row // size[0]], size[1])[:columns]
                for first in range(row, min(row + size[0], rows), step):
                    taken = min(step, row + size[0] - first, rows - first)
                    raw = memoryview(bytearray(taken * columns))
                    read_flat_into(entry, (number * rows + first) * columns, raw, sources, pieces)
                    values = table[np.frombuffer(raw, np.uint8)].reshape(taken, columns)
                    values *= factors
                    yield caster.cast(values.data.cast("B"), FLOAT32, dtype)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _scales(scale: TensorEntry, sources: Sources) -> np.ndarray[Any, Any]:
    """Return scales as float32, which holds each of them exactly."""
    import numpy as np

    raw = memoryview(bytearray(scale.nbytes))
    read_flat_into(scale, 0, raw, sources)
    if scale.dtype.itemsize == 1:  # an exponent
        exponents = np.frombuffer(raw, np.uint8).astype(np.int32)
        values = np.ldexp(np.float32(1), exponents - 127).astype(np.float32)
        if scale.dtype.name != "uint8":
            values[exponents == 255] = np.nan
        return values
    data, _ = Caster().cast(raw, scale.dtype, FLOAT32)
    return np.frombuffer(bytes(data), np.float32)


@cache
def _values() -> np.ndarray[Any, Any]:
    """Return the float32 of each float8_e4m3fn (torch ``c10/util/Float8_e4m3fn.h`` ``fp8e4m3fn_to_fp32_value``)."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    values = np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
    nan = (codes & 127) == 127
    values.view(np.uint32)[nan] = np.where(codes[nan] & 128, 0xFFF0_0000, 0x7FF0_0000)
    return values
