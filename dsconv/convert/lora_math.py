"""The arithmetic of a LoRA folded into its base, with PEFT's operations in PEFT's order, so that the bits agree.

Read from peft: ``tuners/lora/layer.py`` (``get_delta_weight`` and ``merge`` of Linear, Embedding, _ConvNd and
ParamWrapper), ``tuners/lora/variants.py`` and ``tuners/lora/dora.py`` (DoRA), ``tuners/trainable_tokens/layer.py``.
Memory is a few times the one tensor that is folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lora:
    """What is added to one parameter of the base.

    Attributes:
        down: lora_A: [rank, in]; of an embedding [rank, rows]; of experts [rank × experts, in].
        up: lora_B: [out, rank]; of experts [out, rank × experts].
        scaling: What the product is multiplied by.
        kind: ``linear``, ``embedding``, ``convolution`` or ``experts``.
        transposed: The parameter is stored as [in, out], or experts as [experts, in, out].
        magnitude: DoRA's lora_magnitude_vector.
        upcast: 16-bit factors count as fp32, as ``PeftModel.from_pretrained`` loads an adapter.
    """

    down: TensorEntry
    up: TensorEntry
    scaling: float
    kind: str = "linear"
    transposed: bool = False
    magnitude: TensorEntry | None = None
    upcast: bool = False

    @property
    def sources(self) -> tuple[TensorEntry, ...]:
        return (self.down, self.up, *((self.magnitude,) if self.magnitude is not None else ()))


def folded_weight(base: TensorEntry, lora: Lora, dtype: DType) -> torch.Tensor:
    """Return the base's weight, cast to ``dtype``, with the product added."""
    import torch

    with torch.no_grad():
        weight = read_as(base, dtype)
        delta = _delta(weight, lora)
        if lora.magnitude is not None:
            return _with_magnitude(weight, delta, _factor(lora.magnitude, lora.upcast), lora)
        if lora.kind in ("embedding", "experts"):
            delta = delta.to(weight.dtype)
        weight += delta
        return weight


def read_as(entry: TensorEntry, dtype: DType) -> torch.Tensor:
    """Return an entry's tensor in memory of its own, cast to ``dtype``."""
    import torch

    return entry.read().to(getattr(torch, dtype.name))


def _factor(entry: TensorEntry, upcast: bool) -> torch.Tensor:
    import torch

    value = entry.read()
    return value.float() if upcast and value.dtype in (torch.float16, torch.bfloat16) else value


def _delta(weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return the product in the dtype of the factors; PEFT multiplies 16-bit ones in fp32 on a CPU."""
    import torch

    down, up = _factor(lora.down, lora.upcast), _factor(lora.up, lora.upcast)
    if lora.kind == "experts" and weight.ndim == 3:
        return _experts(weight.shape[0], down, up, lora)
    dtype = down.dtype if lora.kind in ("embedding", "convolution") else up.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    if half:
        down, up = down.float(), up.float()
    if lora.kind == "convolution":
        delta = _convolution(weight, down, up) * lora.scaling
    else:
        delta = up @ down
        delta = (delta.T if lora.transposed or lora.kind == "embedding" else delta) * lora.scaling
    return delta.to(dtype) if half else delta


def _experts(experts: int, down: torch.Tensor, up: torch.Tensor, lora: Lora) -> torch.Tensor:
    import torch

    down = down.reshape(experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, experts)
    form = "o r e, e r i -> e i o" if lora.transposed else "o r e, e r i -> e o i"
    return torch.einsum(form, up, down) * lora.scaling


def _convolution(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    import torch

    if tuple(weight.shape[2:4]) == (1, 1):
        product = up.squeeze(3).squeeze(2) @ down.squeeze(3).squeeze(2)
        return product.unsqueeze(2).unsqueeze(3)
    function = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}[
        weight.ndim
    ]
    return function(down.transpose(0, 1), up).transpose(0, 1)


def _with_magnitude(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return DoRA's weight: base and product, each row brought to its trained length."""
    import torch

    swapped = lora.transposed or lora.kind == "embedding"
    plain, change = (weight.T, delta.T) if swapped else (weight, delta)
    summed = plain + change
    if lora.kind == "convolution":
        dims = tuple(range(1, weight.ndim))
        norm = summed.norm(p=2, dim=dims, keepdim=True).transpose(1, 0)
        factor = (magnitude / norm).transpose(0, 1)
    else:
        norm = torch.linalg.norm(summed, dim=1).to(summed.dtype)
        factor = (magnitude / norm).view(-1, 1)
        factor = factor.T if swapped else factor
    return (factor * (weight + delta)).to(weight.dtype)


def folded_bias(base: TensorEntry, bias: TensorEntry, scaling: float, dtype: DType, upcast: bool) -> torch.Tensor:
    """Return the base's bias with lora_B's added (``lora_bias=True``)."""
    import torch

    with torch.no_grad():
        value = read_as(base, dtype)
        value += _factor(bias, upcast) * scaling
        return value


def with_tokens(base: TensorEntry, delta: TensorEntry, rows: list[int], dtype: DType) -> torch.Tensor:
    """Return an embedding whose ``rows`` are those of ``delta``."""
    import torch

    with torch.no_grad():
        value = read_as(base, dtype)
        return value.index_copy(dim=0, index=torch.tensor(rows), source=delta.read().to(value.dtype))
