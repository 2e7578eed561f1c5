"""Tensors that are read when they are used: what ``lazy_mode=True`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import UsageError

if TYPE_CHECKING:
    import torch

FP32 = BY_NAME["float32"]
OUTPUT_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


class GatheredTensor:
    """A tensor of the checkpoint that is read when it is used.

    ``shape``, ``dtype``, ``numel()`` and their like read nothing. ``contiguous()`` reads the tensor into new memory;
    every other attribute or method of a tensor does so too and is then the tensor's own.
    """

    def __init__(self, entry: TensorEntry) -> None:
        import torch

        self._entry = entry
        self.shape = torch.Size(entry.shape)
        self.dtype: torch.dtype = getattr(torch, fp32_of_buffers(entry).name)
        self.device = torch.device("cpu")
        self.requires_grad = False

    def contiguous(self) -> torch.Tensor:
        """Read the tensor and return it as a new CPU tensor."""
        return load_tensors([self._entry], fp32_of_buffers)[self._entry.name]

    def numel(self) -> int:
        """Return the number of elements."""
        return self._entry.numel

    nelement = numel

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or its size along ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def element_size(self) -> int:
        """Return the bytes of one element."""
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.numel() * self.element_size()

    def is_floating_point(self) -> bool:
        """Return whether the elements are floats."""
        return bool(self.dtype.is_floating_point)

    def is_contiguous(self) -> bool:
        """Return True: what ``contiguous()`` reads is."""
        return True

    def detach(self) -> GatheredTensor:
        """Return this tensor, which has no gradient."""
        return self

    cpu = detach

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.contiguous(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.contiguous()[index]

    def __len__(self) -> int:
        return len(self.contiguous()) if not self.shape else self.shape[0]

    def __array__(self, *args: Any, **options: Any) -> Any:
        return self.contiguous().__array__(*args, **options)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _read(kwargs or {})
        return function(*_read(args), **read)

    def __repr__(self) -> str:
        return f"GatheredTensor(shape={list(self.shape)}, dtype={self.dtype})"


def to_torch_tensor(
    state_dict: Mapping[str, Any], return_empty_tensor: bool = False, dtype: Any = None
) -> dict[str, torch.Tensor]:
    """Read the tensors of a lazy state dict. Names that share a tensor share the one that is read.

    Args:
        state_dict: Tensors by name, lazy or not.
        return_empty_tensor: Return tensors of the right shapes and dtypes without reading.
        dtype: What floating tensors are cast to: a torch.dtype or one of ``OUTPUT_DTYPE_NAMES``.

    Raises:
        UsageError: ``dtype`` is none of these; it is a ValueError.
    """
    import torch

    wanted = None if dtype is None else getattr(torch, output_dtype_of(dtype).name)
    found: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, tensor in state_dict.items():
        owner = owners.setdefault(id(tensor), name)
        if owner != name:
            found[name] = found[owner]
            continue
        target = wanted if wanted is not None and tensor.dtype.is_floating_point else tensor.dtype
        found[name] = (
            torch.empty(tensor.shape, dtype=target) if return_empty_tensor else tensor.contiguous().to(dtype=target)
        )
    return found


def output_dtype_of(dtype: Any) -> DType:
    """Return the dtype that a user asked for, by name or as a torch.dtype, of the three that outputs have.

    Raises:
        UsageError: It is another; as DeepSpeed's, the error is a ValueError.
    """
    name = OUTPUT_DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        raise UsageError(f"Unsupported output dtype {dtype!r}. Choose one of: {', '.join(sorted(OUTPUT_DTYPES))}")
    return BY_NAME[name]


def fp32_of_buffers(entry: TensorEntry) -> DType:
    """Return fp32 for a floating buffer, and the stored dtype for any other tensor, as DeepSpeed's functions do."""
    return output_dtype(entry.dtype, FP32) if entry.role == "buffer" else entry.dtype


def _read(value: Any) -> Any:
    if isinstance(value, GatheredTensor):
        return value.contiguous()
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    return type(value)(map(_read, value)) if type(value) in (list, tuple) else value
