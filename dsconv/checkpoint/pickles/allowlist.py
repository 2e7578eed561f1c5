"""What a pickle may name, and the inert thing that stands in for it.

Nothing a file names is ever imported or called. ``CONSTRUCTORS`` maps exact (module, name) pairs to functions of this
module that build plain data; a name that is not there becomes an ``OpaqueClass``, which can label data but not be
called. The pairs were read off files that torch 2.13 and DeepSpeed 0.10 to 0.19.8 wrote (docs/safety.md lists who
writes which).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dsconv.checkpoint.map import dtypes
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.pickles import distributed_names

MAX_DIMENSIONS = 64  # of a tensor, as in numpy; the product of a longer shape takes quadratic time
MAX_NUMEL = 1 << 63  # torch counts elements in an int64
BASE_WORK = 1_000_000
SMALL = 1 << 20
MAX_KEY_DEPTH = 4
MAX_SHOWN_NAME = 255  # characters of a class, in a message


@dataclass(frozen=True, eq=False)
class OpaqueClass:
    """A class or function that the file names and dsconv knows nothing of: a label, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"
        text = text if text.isprintable() else repr(text[:MAX_SHOWN_NAME])
        return text if len(text) <= MAX_SHOWN_NAME else text[: MAX_SHOWN_NAME - 1] + "…"

    @property
    def makes_objects(self) -> bool:
        return (self.module, self.name) in OBJECT_MAKERS

    @property
    def is_kept(self) -> bool:
        return (self.module, self.name) in KEPT


@dataclass(frozen=True, eq=False)
class Opaque:
    """An object of a class that dsconv does not need. Its state is dropped unread; ``args`` are what it was made of."""

    cls: str
    args: tuple[Any, ...] = ()


@dataclass(eq=False)
class Instance:
    """An object of a class of ``KEPT``: ``args`` are what it was made of, ``state`` its attributes, neither
    interpreted here.
    """

    cls: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; ``default`` where there is none."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


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


class UnsupportedGlobal(Exception):
    """A sound file holds a tensor of a kind that dsconv has no stand-in for."""


class Refused(Exception):
    """A call of a listed function with arguments that no checkpoint has use for."""


class WorkBudget:
    """What is left of the work that a pickle of ``nbytes`` may cause beyond reading it, in items handled.

    A few bytes can hand the same large list to a constructor again, or put one more key into a dictionary where all
    keys have one hash; either takes quadratic time. Real files stay far below the limit (the largest seen causes 0.06
    items a byte).
    """

    def __init__(self, nbytes: int) -> None:
        self.left = BASE_WORK + nbytes
        self.odd_keys = 0

    def spend(self, items: int) -> None:
        self.left -= items
        if self.left < 0:
            raise BadArguments("values that take more work to build than a file of its size has use for")

    def key(self, value: Any, depth: int = 0) -> Any:
        """``value`` as a dictionary key or an item of a set, if it is one that hashes at a bounded cost.

        Python's hashes of text are secret, those of numbers are not: a file can choose numbers that collide, so each
        number that is not a plain index pays for the comparisons with those before it.
        """
        kind = type(value)
        if kind is str or kind is bytes:
            if len(value) > 64:
                self.spend(len(value) // 64)
        elif kind is int or kind is float:
            if depth or kind is float or not -SMALL < value < SMALL:
                self.odd_keys += 1
                self.spend(self.odd_keys // 32)
        elif kind is tuple or kind is frozenset:
            if depth == MAX_KEY_DEPTH:
                raise BadArguments(f"a dictionary key nested over {MAX_KEY_DEPTH} deep")
            self.spend(len(value))
            for item in value:
                self.key(item, depth + 1)
        elif value is not None and not isinstance(value, (bool, *STAND_INS)) and not callable(value):
            raise BadArguments(f"a {kind.__name__} as a dictionary key")
        return value


def safe_repr(value: object, limit: int = 80) -> str:
    """``repr`` of a value out of a file, for a message: safe for any depth and size, and cut to ``limit``
    characters.
    """
    text = _shown(value, limit, 3)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(value: object, limit: int, depth: int) -> str:
    if isinstance(value, (str, bytes)):
        return repr(value[:limit]) if len(value) <= limit else repr(value[:limit]) + "…"
    if isinstance(value, int) and value.bit_length() > 512:
        return f"<an integer of {value.bit_length()} bits>"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (OpaqueClass, DType)):
        return str(value)
    if isinstance(value, (Opaque, Instance)):
        return f"<{value.cls}>"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        opening, closing = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        if depth == 0:
            return f"{opening}…{closing}"
        parts = []
        for item in islice(value, 9):
            parts.append(_shown(item, limit, depth - 1))
            if isinstance(value, dict):
                parts[-1] += f": {_shown(value[item], limit, depth - 1)}"
        if len(value) > 9:
            parts.append("…")
        return opening + ", ".join(parts) + ("," if opening == "(" and len(parts) == 1 else "") + closing
    return f"<{type(value).__name__}>"


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise BadArguments(what)


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    _need(isinstance(value, (tuple, list)), f"{what} that is not a tuple")
    _need(len(value) <= MAX_DIMENSIONS, f"{what} of {len(value)} dimensions; the limit is {MAX_DIMENSIONS}")
    if not all(type(v) is int and 0 <= v < MAX_NUMEL for v in value):
        raise BadArguments(f"{what} {safe_repr(value)} of something else than sizes")
    return tuple(value)


def _ordered_dict(work: WorkBudget, *args: Any) -> dict[Any, Any]:
    if not args:
        return {}
    pairs = args[0].items() if isinstance(args[0], dict) else args[0]
    _need(
        len(args) == 1 and (pairs is not args[0] or isinstance(pairs, (list, tuple))),
        "an OrderedDict of something else than pairs",
    )
    work.spend(len(pairs))
    result: dict[Any, Any] = {}
    for pair in pairs:
        _need(isinstance(pair, (tuple, list)) and len(pair) == 2, "an OrderedDict of something else than pairs")
        result[work.key(pair[0])] = pair[1]
    return result


def _default_dict(work: WorkBudget, *args: Any) -> dict[Any, Any]:
    return _ordered_dict(work, *args[1:])


def _size(work: WorkBudget, *args: Any) -> tuple[int, ...]:
    return _naturals(args[0] if args else (), "a torch.Size")


def _tensor(work: WorkBudget, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """``rest`` is requires_grad, hooks and metadata (torch 2.13 ``torch/_utils.py`` ``get_tensor_metadata``)."""
    _need(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if type(offset) is not int or not 0 <= offset < MAX_NUMEL:
        raise BadArguments(f"a tensor at the storage offset {safe_repr(offset)}")
    dtype = storage.dtype
    _need(dtype is not None, "a tensor of an untyped storage without a dtype")
    shape = _naturals(shape, "a tensor's size")
    strides = _naturals(strides, "a tensor's stride")
    _need(len(shape) == len(strides), "a tensor whose size and stride differ in length")
    metadata = rest[2] if len(rest) > 2 else None
    if metadata:
        raise UnsupportedGlobal(
            f"a tensor with the lazy marks {safe_repr(metadata)}: save it again after resolve_conj() and resolve_neg()"
        )
    tensor = TensorRef(storage, dtype, offset, shape, strides)
    if tensor.numel >= MAX_NUMEL:
        raise BadArguments(f"a tensor of shape {safe_repr(shape)}, more elements than torch can count")
    return tensor


def _tensor_v3(
    work: WorkBudget, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRef:
    _need(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if isinstance(dtype, OpaqueClass):
        raise UnsupportedGlobal(f"a tensor of {dtype}, which dsconv does not read")
    _need(isinstance(dtype, DType), "a tensor without a dtype")
    return _tensor(
        work,
        StorageRef(storage.key, dtype, storage.numel // dtype.itemsize),
        offset,
        shape,
        strides,
        grad,
        hooks,
        *rest,
    )


def _parameter(work: WorkBudget, data: Any, *rest: Any) -> Any:
    return data


def _from_type(work: WorkBudget, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    _need(isinstance(args, tuple), "a tensor subclass rebuilt without a tuple of arguments")
    _need(isinstance(kind, OpaqueClass), "a tensor subclass without a class")
    work.spend(len(args))
    if isinstance(function, OpaqueClass) and (function.module, function.name) == (
        "torch._utils",
        "_rebuild_wrapper_subclass",
    ):
        if kind.is_kept:  # a tensor without a storage of its own: its state says which tensors it is made of
            return Instance(str(kind), args, state)
        raise UnsupportedGlobal(f"a tensor of class {kind}, which dsconv does not read")
    # Not by this function again: a file could nest that as deep as it likes.
    _need(callable(function) and function is not _from_type, "a tensor subclass rebuilt by something unknown")
    return function(work, *args)


def _nested_class(work: WorkBudget, *args: Any) -> OpaqueClass:
    """``getattr``, by which protocols 2 and 3 name a class inside another: only for the pairs that real files hold."""
    if len(args) == 2 and isinstance(args[0], OpaqueClass) and isinstance(args[1], str):
        owner, name = args
        if (owner.module, f"{owner.name}.{name}") in distributed_names.NESTED:
            return OpaqueClass(owner.module, f"{owner.name}.{name}")
    raise Refused(f"calls builtins.getattr{safe_repr(args)}")


def _zero_stage(work: WorkBudget, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 3:
        raise BadArguments(f"the ZeRO stage {safe_repr(value)}")
    return value


def _fragment(work: WorkBudget, numel: Any = 0, start: Any = 0) -> FragmentAddress:
    _need(type(numel) is int and type(start) is int, "a fragment_address of something else than integers")
    return FragmentAddress(numel, start)


def _encode(work: WorkBudget, text: Any, encoding: Any = "utf-8", *rest: Any) -> bytes:
    """Protocol 2 writes bytes as text to be encoded."""
    _need(
        isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8"), "bytes made of something else than text"
    )
    work.spend(len(text) // 16)
    return bytes(text.encode(encoding))


def _bytes(work: WorkBudget, *args: Any) -> bytes:
    if len(args) == 2:  # a bytearray of protocol 2
        return _encode(work, *args)
    _need(not args or (len(args) == 1 and isinstance(args[0], bytes)), "bytes made of something else than bytes")
    return args[0] if args else b""


def _set(work: WorkBudget, *args: Any) -> frozenset[Any]:
    items = args[0] if args else ()
    _need(
        len(args) <= 1 and isinstance(items, (list, tuple, set, frozenset)), "a set made of something else than a list"
    )
    work.spend(len(items))
    return frozenset(work.key(item) for item in items)


def _inert(label: str) -> Callable[..., Opaque]:
    """For harmless values that dsconv has no use for (dates, paths, devices): keep the arguments, build nothing."""

    def make(work: WorkBudget, *args: Any) -> Opaque:
        return Opaque(label, args)

    return make


STAND_INS = (OpaqueClass, Opaque, Instance, StorageKind, TensorRef, DType)
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
    ("builtins", "getattr"): _nested_class,
    ("__builtin__", "getattr"): _nested_class,
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
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING",),
}.items():
    for _name in _names:
        CONSTRUCTORS[_module, _name] = _inert(f"{_module}.{_name}")

# Classes of which a format reads the attributes; their objects become ``Instance``.
KEPT: set[tuple[str, str]] = set(distributed_names.CLASSES)
for _name in (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
):
    KEPT.add(("torch.distributed.checkpoint.metadata", _name))
KEPT.add(("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"))  # torch before 2.3
KEPT.add(("torch.distributed.checkpoint.filesystem", "_StorageInfo"))
for _name in ("LossScaler", "DynamicLossScaler"):
    KEPT.add(("deepspeed.runtime.fp16.loss_scaler", _name))

# These only ever make an object without running its __init__, from the class that is their argument.
OBJECT_MAKERS = {
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("copyreg", "__newobj__"),
    ("copy_reg", "__newobj__"),
}
BASE_CLASSES = {  # named as data: the base of a plain object, the factory of a defaultdict
    (module, name)
    for module in ("builtins", "__builtin__")
    for name in ("object", "bool", "dict", "list", "int", "str", "float", "tuple", "long", "unicode")
}
# Python 2's names and C modules behind the standard library's are not in sys.stdlib_module_names on every platform.
STANDARD_MODULES = frozenset(sys.stdlib_module_names) | {
    "__builtin__",
    "copy_reg",
    "commands",
    "nt",
    "posix",
    "os2",
    "ce",
}


def belongs_to_python(module: str) -> bool:
    """Whether a module is Python's own: a checkpoint has no use for any name there that CONSTRUCTORS does not list."""
    return module.partition(".")[0] in STANDARD_MODULES
