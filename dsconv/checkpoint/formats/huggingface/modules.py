"""Modules as trees of parameter shapes, and the layers of ``torch.nn`` that have parameters."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
MAX_STEPS = 500_000  # statements and expressions of one model; the largest of transformers takes some 200,000
MAX_REPEATED = 10_000  # items of a list that is multiplied


class CannotTell(Exception):
    """Raised if the source does not decide which parameters exist."""


class Unknown:
    """A value that was not computed."""

    def __deepcopy__(self, memo: Any) -> Unknown:
        return self


UNKNOWN = Unknown()


@dataclass
class Configuration:
    """A configuration's values by their own names; ``names`` maps other names to these."""

    values: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Return a value. Raises CannotTell if there is none."""
        name = self.names.get(name, name)
        if name not in self.values:
            if name.startswith("_"):  # transformers' own settings, such as the choice of an attention function
                return UNKNOWN
            raise CannotTell
        value = self.values[name]
        return Configuration(value) if isinstance(value, dict) and name.endswith("_config") else value

    def __deepcopy__(self, memo: Any) -> Configuration:
        return Configuration(copy.deepcopy(self.values, memo), self.names)


@dataclass
class Tensor:
    """A tensor's shape, where it is known; ``kept`` says that the module's state dict has it."""

    shape: Shape | None
    kept: bool = True


@dataclass
class Module:
    """A module: its own tensors, its children, and its other attributes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, Module] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    node: ast.ClassDef | None = None

    def flat(self, prefix: str = "") -> Iterator[tuple[str, Shape | None]]:
        """Yield (name, shape) of all tensors of the state dict."""
        for name, tensor in self.tensors.items():
            if tensor.kept:
                yield prefix + name, tensor.shape
        for name, child in self.children.items():
            yield from child.flat(f"{prefix}{name}.")

    def set(self, name: str, value: Any) -> None:
        """Assign an attribute as a tensor, a child or another value, as a module does."""
        self.tensors.pop(name, None)
        self.children.pop(name, None)
        self.attributes.pop(name, None)
        if isinstance(value, Module):
            self.children[name] = value
        elif isinstance(value, Tensor):
            self.tensors[name] = value
        else:
            self.attributes[name] = value

    def get(self, name: str) -> Any:
        """Return an attribute; UNKNOWN if there is none."""
        for place in (self.children, self.tensors, self.attributes):
            if name in place:
                return place[name]
        return UNKNOWN

    def __deepcopy__(self, memo: Any) -> Module:
        return Module(
            copy.deepcopy(self.tensors, memo),
            copy.deepcopy(self.children, memo),
            copy.deepcopy(self.attributes, memo),
            self.node,
        )


def bounded_range(*arguments: Any) -> range:
    """Return a range that is no longer than a model has steps: a list of it takes memory. Raises CannotTell."""
    found = range(*arguments)
    try:
        if len(found) <= MAX_STEPS:
            return found
    except OverflowError:
        pass
    raise CannotTell


def repeated(left: Any, right: Any) -> Any:
    """Return a list or a text as often as a configuration says; UNKNOWN where that is no list of modules' length."""
    times = next((one for one in (left, right) if isinstance(one, int)), 0)
    items = next((len(one) for one in (left, right) if isinstance(one, (str, list, tuple))), 0)
    return UNKNOWN if times * items > MAX_REPEATED else left * right


def _leaf(**shapes: Shape | None) -> Module:
    return Module({name: Tensor(shape) for name, shape in shapes.items() if shape is not None})


def _sizes(*values: Any) -> Shape:
    if not all(type(value) is int for value in values):
        raise CannotTell
    return tuple(values)


def _linear(in_features: Any, out_features: Any, bias: Any = True, **_: Any) -> Module:
    rows, columns = _sizes(out_features, in_features)
    return _leaf(weight=(rows, columns), bias=(rows,) if sure(bias) else None)


def _embedding(num_embeddings: Any, embedding_dim: Any, *_: Any, **__: Any) -> Module:
    return _leaf(weight=_sizes(num_embeddings, embedding_dim))


def _norm(normalized_shape: Any, eps: Any = 0, elementwise_affine: Any = True, bias: Any = True, **_: Any) -> Module:
    shape = _sizes(*normalized_shape) if isinstance(normalized_shape, (list, tuple)) else _sizes(normalized_shape)
    if not sure(elementwise_affine):
        return Module()
    return _leaf(weight=shape, bias=shape if sure(bias) else None)


def _rms_norm(normalized_shape: Any, eps: Any = 0, elementwise_affine: Any = True, **_: Any) -> Module:
    return _norm(normalized_shape, eps, elementwise_affine, False)


def _convolution(dimensions: int) -> Callable[..., Module]:
    def build(
        in_channels: Any, out_channels: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: Any = 1, bias: Any = True, **_: Any,
    ) -> Module:  # fmt: skip
        kernel = tuple(kernel_size) if isinstance(kernel_size, (list, tuple)) else (kernel_size,) * dimensions
        rows, columns, parts = _sizes(out_channels, in_channels, groups)
        return _leaf(weight=(rows, columns // parts, *_sizes(*kernel)), bias=(rows,) if sure(bias) else None)

    return build


def _conv1d(nf: Any, nx: Any) -> Module:
    """transformers' own Conv1D: a linear layer that is stored as [in, out]."""
    out, into = _sizes(nf, nx)
    return _leaf(weight=(into, out), bias=(out,))


def sure(value: Any) -> bool:
    if isinstance(value, Unknown):
        raise CannotTell
    return bool(value)


def _module_list(modules: Any = (), *more: Any) -> Module:
    return _numbered(modules)


def _sequential(*modules: Any) -> Module:
    return _numbered(modules)


def _numbered(modules: Any) -> Module:
    if not isinstance(modules, (list, tuple)) or not all(isinstance(one, Module) for one in modules):
        raise CannotTell
    return Module(children={str(number): one for number, one in enumerate(modules)})


def _module_dict(modules: Any = None) -> Module:
    found = modules or {}
    if not isinstance(found, dict) or not all(isinstance(one, Module) for one in found.values()):
        raise CannotTell
    return Module(children={str(key): one for key, one in found.items()})


LAYERS: dict[str, Callable[..., Module]] = {
    "nn.Linear": _linear, "nn.Embedding": _embedding, "nn.LayerNorm": _norm, "nn.RMSNorm": _rms_norm,
    "nn.Conv1d": _convolution(1), "nn.Conv2d": _convolution(2), "nn.Conv3d": _convolution(3), "Conv1D": _conv1d,
    "nn.ModuleList": _module_list, "nn.Sequential": _sequential, "nn.ModuleDict": _module_dict,
}  # fmt: skip
PLAIN = ("Dropout", "Identity", "ReLU", "SiLU", "GELU", "Tanh", "Sigmoid", "Softmax", "CrossEntropyLoss", "Flatten")
LAYERS |= {f"nn.{name}": lambda *_, **__: Module() for name in PLAIN}
FILLED = {"torch.ones", "torch.zeros", "torch.empty", "torch.rand", "torch.randn"}
