"""The functions that a pickle may call. Each builds plain data from arguments that it checks first.

``allowlist.CONSTRUCTORS`` says which of them a file reaches by which name. Each takes the budget of the pickle and then
the arguments in the file. They raise BadArguments where the real function would not take the arguments, and Refused or
UnsupportedGlobal where the call asks for what dsconv does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.pickles import kept_classes
from dsconv.checkpoint.pickles.budget import WorkBudget
from dsconv.checkpoint.pickles.errors import BadArguments, Refused, UnsupportedGlobal
from dsconv.checkpoint.pickles.values import (
    MAX_DIMENSIONS,
    MAX_NUMEL,
    FragmentAddress,
    Instance,
    Opaque,
    OpaqueClass,
    StorageRef,
    TensorRef,
    safe_repr,
)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise BadArguments(what)


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    _require(isinstance(value, (tuple, list)), f"{what} that is not a tuple")
    _require(len(value) <= MAX_DIMENSIONS, f"{what} of {len(value)} dimensions; the limit is {MAX_DIMENSIONS}")
    if not all(type(v) is int and 0 <= v < MAX_NUMEL for v in value):
        raise BadArguments(f"{what} {safe_repr(value)} of something else than sizes")
    return tuple(value)


def ordered_dict(work: WorkBudget, *args: Any) -> dict[Any, Any]:
    if not args:
        return {}
    pairs = args[0].items() if isinstance(args[0], dict) else args[0]
    _require(
        len(args) == 1 and (pairs is not args[0] or isinstance(pairs, (list, tuple))),
        "an OrderedDict of something else than pairs",
    )
    work.spend(len(pairs))
    result: dict[Any, Any] = {}
    for pair in pairs:
        _require(isinstance(pair, (tuple, list)) and len(pair) == 2, "an OrderedDict of something else than pairs")
        result[work.key(pair[0])] = pair[1]
    return result


def default_dict(work: WorkBudget, *args: Any) -> dict[Any, Any]:
    return ordered_dict(work, *args[1:])


def size(work: WorkBudget, *args: Any) -> tuple[int, ...]:
    return _naturals(args[0] if args else (), "a torch.Size")


def rebuild_tensor(work: WorkBudget, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """``rest`` is requires_grad, hooks and metadata (torch 2.13 ``torch/_utils.py`` ``get_tensor_metadata``)."""
    _require(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if type(offset) is not int or not 0 <= offset < MAX_NUMEL:
        raise BadArguments(f"a tensor at the storage offset {safe_repr(offset)}")
    dtype = storage.dtype
    _require(dtype is not None, "a tensor of an untyped storage without a dtype")
    shape = _naturals(shape, "a tensor's size")
    strides = _naturals(strides, "a tensor's stride")
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
    work: WorkBudget, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRef:
    _require(isinstance(storage, StorageRef), "a tensor whose storage is not a storage")
    if isinstance(dtype, OpaqueClass):
        raise UnsupportedGlobal(f"a tensor of {dtype}, which dsconv does not read")
    _require(isinstance(dtype, DType), "a tensor without a dtype")
    return rebuild_tensor(
        work,
        StorageRef(storage.key, dtype, storage.numel // dtype.itemsize),
        offset,
        shape,
        strides,
        grad,
        hooks,
        *rest,
    )


def rebuild_parameter(work: WorkBudget, data: Any, *rest: Any) -> Any:
    return data


def rebuild_from_type(work: WorkBudget, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    _require(isinstance(args, tuple), "a tensor subclass rebuilt without a tuple of arguments")
    _require(isinstance(kind, OpaqueClass), "a tensor subclass without a class")
    work.spend(len(args))
    if isinstance(function, OpaqueClass) and (function.module, function.name) == (
        "torch._utils",
        "_rebuild_wrapper_subclass",
    ):
        if (
            kind.module,
            kind.name,
        ) in kept_classes.KEPT:  # it has no storage: its state says which tensors it is made of
            return Instance(str(kind), args, state)
        raise UnsupportedGlobal(f"a tensor of class {kind}, which dsconv does not read")
    # Not by this function again: a file could nest that as deep as it likes.
    _require(callable(function) and function is not rebuild_from_type, "a tensor subclass rebuilt by something unknown")
    return function(work, *args)


def nested_class(work: WorkBudget, *args: Any) -> OpaqueClass:
    """``getattr``, by which protocols 2 and 3 name a class inside another: only for the pairs that real files hold."""
    if len(args) == 2 and isinstance(args[0], OpaqueClass) and isinstance(args[1], str):
        owner, name = args
        if (owner.module, f"{owner.name}.{name}") in kept_classes.NESTED:
            return OpaqueClass(owner.module, f"{owner.name}.{name}")
    raise Refused(f"calls builtins.getattr{safe_repr(args)}")


def zero_stage(work: WorkBudget, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 3:
        raise BadArguments(f"the ZeRO stage {safe_repr(value)}")
    return value


def fragment_address(work: WorkBudget, numel: Any = 0, start: Any = 0) -> FragmentAddress:
    _require(type(numel) is int and type(start) is int, "a fragment_address of something else than integers")
    return FragmentAddress(numel, start)


def encode(work: WorkBudget, text: Any, encoding: Any = "utf-8", *rest: Any) -> bytes:
    """Protocol 2 writes bytes as text to be encoded."""
    _require(
        isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8"), "bytes made of something else than text"
    )
    work.spend(len(text) // 16)
    return bytes(text.encode(encoding))


def make_bytes(work: WorkBudget, *args: Any) -> bytes:
    if len(args) == 2:  # a bytearray of protocol 2
        return encode(work, *args)
    _require(not args or (len(args) == 1 and isinstance(args[0], bytes)), "bytes made of something else than bytes")
    return args[0] if args else b""


def make_set(work: WorkBudget, *args: Any) -> frozenset[Any]:
    items = args[0] if args else ()
    _require(
        len(args) <= 1 and isinstance(items, (list, tuple, set, frozenset)), "a set made of something else than a list"
    )
    work.spend(len(items))
    return frozenset(work.key(item) for item in items)


def inert(label: str) -> Callable[..., Opaque]:
    """For harmless values that dsconv has no use for (dates, paths, devices): keep the arguments, build nothing."""

    def make(work: WorkBudget, *args: Any) -> Opaque:
        return Opaque(label, args)

    return make
