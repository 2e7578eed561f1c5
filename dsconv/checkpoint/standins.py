"""What a pickle may name, and the inert thing that stands in for it.

Nothing a file names is ever imported or called. ``CONSTRUCTORS`` maps exact (module, name) pairs to functions of this
module that build plain data; a name that is not there becomes an ``OpaqueClass``, which can label data but not be called.
The pairs were read off files that torch 2.13 and DeepSpeed 0.10 to 0.19.8 wrote (docs/safety.md lists who writes which).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsconv.checkpoint import dtypes
from dsconv.checkpoint.dtypes import DType


@dataclass(frozen=True, eq=False)
class OpaqueClass:
    """A class or function that the file names and dsconv knows nothing of: a label, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Opaque:
    """An object of a class that dsconv does not need. Its state is dropped unread; ``args`` are what it was made of."""

    cls: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class StorageKind:
    """A storage class; ``dtype`` is None for an untyped one, whose elements are bytes."""

    dtype: DType | None


@dataclass(frozen=True)
class StorageRef:
    """A storage of ``numel`` elements by its key, the name of its record under ``data/``."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage: ``offset`` and ``strides`` are counted in elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass
class FragmentAddress:
    """Where a ZeRO-1/2 partition holds its share of a parameter (deepspeed 0.19.8 ``utils/tensor_fragment.py``).

    Pickled as an empty object and then its state, so it is filled by ``set_state``.
    """

    numel: int = 0
    start: int = 0

    def set_state(self, state: Any) -> None:
        _need(
            isinstance(state, dict) and type(state.get("numel")) is int and type(state.get("start")) is int,
            "a fragment_address without integers",
        )
        self.numel, self.start = state["numel"], state["start"]


class BadArguments(Exception):
    """A stand-in was called with arguments that the real thing would not take."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise BadArguments(what)


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    _need(isinstance(value, (tuple, list)), f"{what} is not a tuple")
    _need(all(type(v) is int and 0 <= v < 1 << 63 for v in value), f"{what} {value!r:.80} holds something else than sizes")
    return tuple(value)


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if not args:
        return {}
    result: dict[Any, Any] = {}
    pairs = args[0].items() if isinstance(args[0], dict) else args[0]
    _need(len(args) == 1 and not isinstance(pairs, (str, bytes)), "OrderedDict takes one list of pairs")
    for pair in pairs:
        _need(isinstance(pair, (tuple, list)) and len(pair) == 2, "OrderedDict takes pairs")
        _need(isinstance(pair[0], (str, int, float, bytes, type(None))), "an OrderedDict key is not a plain value")
        result[pair[0]] = pair[1]
    return result


def _default_dict(*args: Any) -> dict[Any, Any]:
    return _ordered_dict(*args[1:])


def _size(*args: Any) -> tuple[int, ...]:
    return _naturals(args[0] if args else (), "torch.Size")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    _need(isinstance(storage, StorageRef), "a tensor's storage is not a storage")
    _need(type(offset) is int and 0 <= offset < 1 << 63, f"storage offset {offset!r:.80}")
    dtype = storage.dtype
    _need(dtype is not None, "an untyped storage without a dtype")
    shape = _naturals(shape, "a tensor's size")
    strides = _naturals(strides, "a tensor's stride")
    _need(len(shape) == len(strides), "a tensor's size and stride differ in length")
    return TensorRef(storage, dtype, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> TensorRef:
    _need(isinstance(storage, StorageRef) and isinstance(dtype, DType), "a tensor without storage or dtype")
    return _tensor(StorageRef(storage.key, dtype, storage.numel // dtype.itemsize), offset, shape, strides)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    _need(callable(function) and isinstance(args, tuple), "a tensor subclass rebuilt by something unknown")
    _need(isinstance(kind, OpaqueClass), "a tensor subclass without a class")
    return function(*args)


def _zero_stage(value: Any) -> int:
    _need(type(value) is int and 0 <= value <= 3, f"ZeRO stage {value!r:.40}")
    return int(value)


def _fragment(numel: Any = 0, start: Any = 0) -> FragmentAddress:
    _need(type(numel) is int and type(start) is int, "fragment_address of something else than integers")
    return FragmentAddress(numel, start)


def _encode(text: Any, encoding: Any = "utf-8", *rest: Any) -> bytes:
    """Protocol 2 writes bytes as text to be encoded."""
    _need(isinstance(text, str) and encoding in ("latin1", "utf-8"), "_codecs.encode of something else than text")
    return bytes(text.encode(encoding))


def _bytes(*args: Any) -> bytes:
    _need(not args or (len(args) == 1 and isinstance(args[0], (bytes, bytearray))), "bytes made of something else than bytes")
    return bytes(args[0]) if args else b""


def _set(*args: Any) -> frozenset[Any]:
    items = args[0] if args else ()
    _need(len(args) <= 1 and isinstance(items, (list, tuple, set, frozenset)), "a set made of something else than a list")
    _need(all(isinstance(item, (str, int, float, bytes, type(None))) for item in items), "a set of something else than plain values")
    return frozenset(items)


def _inert(label: str) -> Callable[..., Opaque]:
    """For harmless values that dsconv has no use for (dates, paths, devices): keep the arguments, build nothing."""

    def make(*args: Any) -> Opaque:
        return Opaque(label, args)

    return make


CONSTRUCTORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "Counter"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.storage", "UntypedStorage"): StorageKind(None),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _zero_stage,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): _fragment,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _set,
    ("__builtin__", "set"): _set,
    ("__builtin__", "frozenset"): _set,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("__builtin__", "bytearray"): _bytes,
}
for _module in ("torch", "torch.cuda", "torch.storage"):
    for _name, _dtype in dtypes.STORAGE_CLASSES.items():
        CONSTRUCTORS[_module, _name] = StorageKind(dtypes.BY_NAME[_dtype])
for _name, _dtype_value in dtypes.BY_NAME.items():
    CONSTRUCTORS["torch", _name] = _dtype_value
for _module, _names in {
    "builtins": ("complex", "slice", "range"),
    "__builtin__": ("complex", "slice", "range", "xrange"),
    "collections": ("deque",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "_io": ("BytesIO",),
    "io": ("BytesIO",),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "random": ("Random",),
    "torch": ("device", "Generator"),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_device_tensor_from_numpy", "_rebuild_meta_tensor_no_storage"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
}.items():
    for _name in _names:
        CONSTRUCTORS[_module, _name] = _inert(f"{_module}.{_name}")

# These only ever make an object without running its __init__, from the class that is their argument.
OBJECT_MAKERS = {("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("copyreg", "__newobj__")}
BASE_CLASSES = {("builtins", "object"), ("__builtin__", "object"), ("builtins", "dict"), ("builtins", "list"),
                ("builtins", "int"), ("builtins", "str"), ("builtins", "float"), ("builtins", "tuple")}  # fmt: skip
# Python 2's names and C modules behind the standard library's are not in sys.stdlib_module_names on every platform.
STANDARD_MODULES = frozenset(sys.stdlib_module_names) | {"__builtin__", "copy_reg", "commands", "nt", "posix", "os2", "ce"}


def belongs_to_python(module: str) -> bool:
    """Whether a module is Python's own: a checkpoint has no use for any name there that CONSTRUCTORS does not list."""
    return module.partition(".")[0] in STANDARD_MODULES
