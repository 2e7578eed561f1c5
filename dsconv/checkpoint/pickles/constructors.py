"""The functions that a pickle may call. Each builds plain data from arguments that it checks first.

``allowlist.CONSTRUCTORS`` says which of them a file reaches by which name. Each takes the budget of the pickle and then
the arguments in the file. They raise BadArguments where the real function would not take the arguments, and Refused or
UnsupportedGlobal where the call asks for what dsconv does not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.pickles.budget import (
    DICT_BYTES,
    OBJECT_BYTES,
    SET_BYTES,
    SET_ITEM_BYTES,
    TUPLE_BYTES,
    TUPLE_ITEM_BYTES,
    WorkBudget,
)
from dsconv.checkpoint.pickles.errors import BadArguments, Refused, UnsupportedGlobal
from dsconv.checkpoint.pickles.kept_classes import KEPT
from dsconv.checkpoint.pickles.values import (
    MAX_DIMENSIONS,
    MAX_NAME_CHARS,
    MAX_NUMEL,
    FragmentAddress,
    Instance,
    Opaque,
    OpaqueClass,
    StorageRef,
    TensorRef,
    UnreadTensor,
    safe_repr,
)
from dsconv.text import count

WRAPPER = ("torch._utils", "_rebuild_wrapper_subclass")
# Tensors that wrap the plain, full-precision one that they keep under this attribute: FSDP gathers it as float8, and
# saves it as it is (torchao 0.18 ``float8/fsdp_utils.py``; the other two are of releases before 0.9).
PLAIN_INSIDE = {
    ("torchao.float8.fsdp_utils", f"WeightWith{kind}Float8CastTensor"): "_tensor"
    for kind in ("Dynamic", "Delayed", "Static")
}
NESTED_NAME = re.compile(r"[A-Z]\w*", re.ASCII)
METHOD_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
TORCH_FUNCTIONS = "torch._C._VariableFunctionsClass"  # whose static methods torch.relu and its like are


def _require(condition: bool, what: str) -> None:
    """Raise BadArguments with ``what`` unless ``condition``."""
    if not condition:
        raise BadArguments(what)


def _sizes(budget: WorkBudget, value: Any, what: str) -> tuple[int, ...]:
    """Return a shape or strides as a tuple, or raise BadArguments."""
    if not isinstance(value, (tuple, list)):
        raise BadArguments(f"{what} that is not a tuple")
    if len(value) > MAX_DIMENSIONS:
        raise BadArguments(f"{what} of {count(len(value), 'dimension')}; the limit is {MAX_DIMENSIONS}")
    for item in value:
        if type(item) is not int or not 0 <= item < MAX_NUMEL:
            raise BadArguments(f"{what} {safe_repr(value)} of something else than sizes")
    budget.spend(len(value))
    if type(value) is tuple:
        return value
    budget.allocate(TUPLE_BYTES + TUPLE_ITEM_BYTES * len(value))
    return tuple(value)


def ordered_dict(budget: WorkBudget, *args: Any) -> dict[Any, Any]:
    """Build an OrderedDict or a Counter, as a plain dictionary, from nothing, a dictionary, or a list of pairs."""
    budget.allocate(DICT_BYTES)
    if not args:
        return {}
    pairs = args[0].items() if isinstance(args[0], dict) else args[0]
    _require(
        len(args) == 1 and (pairs is not args[0] or isinstance(pairs, (list, tuple))),
        "an OrderedDict of something else than pairs",
    )
    budget.spend(len(pairs))
    result: dict[Any, Any] = {}
    budget.allocate_items(result, len(pairs))
    for pair in pairs:
        _require(isinstance(pair, (tuple, list)) and len(pair) == 2, "an OrderedDict of something else than pairs")
        result[budget.key(pair[0])] = pair[1]
    return result


def default_dict(budget: WorkBudget, *args: Any) -> dict[Any, Any]:
    """Build a defaultdict as a plain dictionary. Its factory, the first argument, is dropped."""
    return ordered_dict(budget, *args[1:])


def size(budget: WorkBudget, *args: Any) -> tuple[int, ...]:
    """Build a torch.Size as a tuple."""
    return _sizes(budget, args[0] if args else (), "a torch.Size")


def rebuild_tensor(budget: WorkBudget, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """Build a tensor. ``rest`` is requires_grad, hooks and metadata (``torch/_utils.py``)."""
    _require(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if type(offset) is not int or not 0 <= offset < MAX_NUMEL:
        raise BadArguments(f"a tensor at the storage offset {safe_repr(offset)}")
    dtype = storage.dtype
    _require(dtype is not None, "a tensor of an untyped storage without a dtype")
    shape = _sizes(budget, shape, "a tensor's size")
    strides = _sizes(budget, strides, "a tensor's stride")
    _require(len(shape) == len(strides), "a tensor whose size and stride differ in length")
    metadata = rest[2] if len(rest) > 2 else None
    if metadata:
        raise UnsupportedGlobal(
            f"a tensor with the lazy marks {safe_repr(metadata)}: save it again after resolve_conj() and resolve_neg()"
        )
    tensor = TensorRef(storage, dtype, offset, shape, strides)
    if tensor.numel >= MAX_NUMEL:
        raise BadArguments(f"a tensor of shape {safe_repr(shape)}, more elements than torch can count")
    return tensor


def rebuild_tensor_v3(
    budget: WorkBudget,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> TensorRef:
    """Build a tensor whose dtype is named beside its untyped storage (``torch/_utils.py``)."""
    _require(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if isinstance(dtype, OpaqueClass):
        raise UnsupportedGlobal(f"a tensor of {dtype}, which dsconv does not read")
    _require(isinstance(dtype, DType), "a tensor without a dtype")
    budget.allocate(OBJECT_BYTES)
    typed = StorageRef(storage.key, dtype, storage.numel // dtype.itemsize)
    return rebuild_tensor(budget, typed, offset, shape, strides, grad, hooks, *rest)


def rebuild_parameter(budget: WorkBudget, data: Any, *rest: Any) -> Any:
    """Return the tensor of a parameter."""
    return data


def rebuild_from_type(budget: WorkBudget, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Build a tensor of a subclass: call ``function``, one of this module's, with ``args``.

    A subclass that wraps other tensors has no storage. It becomes an ``Instance`` whose state says what it is made of.
    """
    _require(isinstance(args, tuple), "a tensor subclass rebuilt without a tuple of arguments")
    _require(isinstance(kind, OpaqueClass), "a tensor subclass without a class")
    budget.spend(len(args))
    if isinstance(function, OpaqueClass) and (function.module, function.name) == WRAPPER:
        inner = state.get(PLAIN_INSIDE.get((kind.module, kind.name), "")) if isinstance(state, dict) else None
        if isinstance(inner, TensorRef) and len(args) > 2 and (inner.dtype, inner.shape) == (args[1], args[2]):
            return inner
        made = Instance if (kind.module, kind.name) in KEPT else UnreadTensor
        return made(kind.label, args, state)
    # Not by this function again: a file could nest that as deep as it likes.
    _require(callable(function) and function is not rebuild_from_type, "a tensor subclass rebuilt by something unknown")
    return function(budget, *args)


def nested_class(budget: WorkBudget, *args: Any) -> OpaqueClass | Inert:
    """Return what ``getattr`` names inside a class, which is how protocols 2 and 3 write a nested class.

    Some releases of Python write the member of an enumeration so, too, and all of them the method of an object. A name
    in a class must begin with a capital letter, since what begins with a small one could be a function.
    """
    owner, name = args if len(args) == 2 else (None, None)
    if isinstance(owner, Inert) and (owner.label, name) == ("zoneinfo.ZoneInfo", "_unpickle"):
        return owner
    if isinstance(owner, Opaque):  # the method of an object, named as the function of a partial
        budget.spend(len(owner.cls))
        module, _, owner_name = owner.cls.rpartition(".")
        owner, pattern = OpaqueClass(module, owner_name), METHOD_NAME
    else:
        pattern = METHOD_NAME if isinstance(owner, OpaqueClass) and owner.label == TORCH_FUNCTIONS else NESTED_NAME
    if isinstance(owner, OpaqueClass) and isinstance(name, str) and pattern.fullmatch(name):
        nchars = len(owner.module) + len(owner.name) + len(name)
        _require(nchars < MAX_NAME_CHARS, f"a class whose name has {nchars} characters; the limit is {MAX_NAME_CHARS}")
        budget.allocate(2 * OBJECT_BYTES + 4 * nchars)
        return OpaqueClass(owner.module, f"{owner.name}.{name}")
    raise Refused(f"calls builtins.getattr{safe_repr(args)}")


def type_of_none(budget: WorkBudget, *args: Any) -> OpaqueClass:
    """Return the class of None, which files name as ``type(None)``. No other use of ``type`` is allowed."""
    if len(args) == 1 and args[0] is None:
        return OpaqueClass("types", "NoneType")
    raise Refused(f"calls builtins.type{safe_repr(args)}")


def partial(budget: WorkBudget, *args: Any) -> Opaque:
    """Keep a functools.partial as data. What it would call is checked where the file names it."""
    if not args or not (isinstance(args[0], (OpaqueClass, Opaque)) or callable(args[0])):
        raise Refused(f"calls functools.partial{safe_repr(args)}")
    return Opaque("functools.partial", args)


def zero_stage(budget: WorkBudget, value: Any) -> int:
    """Return DeepSpeed's ZeroStageEnum as its number, 0 to 3."""
    if type(value) is not int or not 0 <= value <= 3:
        raise BadArguments(f"the ZeRO stage {safe_repr(value)}")
    return value


def fragment_address(budget: WorkBudget, numel: Any = 0, start: Any = 0) -> FragmentAddress:
    """Build the place of a parameter's share in a ZeRO partition; both numbers are in elements."""
    _require(type(numel) is int and type(start) is int, "a fragment_address of something else than integers")
    return FragmentAddress(numel, start)


def encode(budget: WorkBudget, text: Any, encoding: Any = "utf-8", *rest: Any) -> bytes:
    """Return the bytes of ``text``, which is how protocol 2 writes bytes."""
    _require(
        isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8"), "bytes made of something else than text"
    )
    budget.spend(len(text) // 16)
    budget.allocate(4 * len(text))
    return bytes(text.encode(encoding))


def make_bytes(budget: WorkBudget, *args: Any) -> bytes:
    """Build bytes, or a bytearray as bytes, from nothing, bytes, or text and an encoding."""
    if len(args) == 2:  # a bytearray of protocol 2
        return encode(budget, *args)
    _require(not args or (len(args) == 1 and isinstance(args[0], bytes)), "bytes made of something else than bytes")
    return args[0] if args else b""


def make_set(budget: WorkBudget, *args: Any) -> frozenset[Any]:
    """Build a set or frozenset from nothing or from a list, tuple or set."""
    items = args[0] if args else ()
    _require(
        len(args) <= 1 and isinstance(items, (list, tuple, set, frozenset)), "a set made of something else than a list"
    )
    budget.spend(len(items))
    budget.allocate(SET_BYTES + SET_ITEM_BYTES * len(items))
    return frozenset(budget.key(item) for item in items)


class Inert:
    """A function for harmless values that dsconv has no use for, such as dates, paths and devices.

    It keeps the arguments of a call in an ``Opaque`` called ``label``, and builds nothing else.
    """

    __slots__ = ("label",)

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, budget: WorkBudget, *args: Any) -> Opaque:
        return Opaque(self.label, args)


def unread_tensor(label: str) -> Callable[..., UnreadTensor]:
    """Return a function that makes an ``UnreadTensor`` called ``label``."""

    def make(budget: WorkBudget, *args: Any) -> UnreadTensor:
        return UnreadTensor(label, args)

    return make
