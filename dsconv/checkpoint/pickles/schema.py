"""The one typed reader for what comes out of a pickle. It checks types, bounds and names before any code uses a value.

A pickle may hold anything under any key, so a format takes each value through one of the ``expect_…`` functions. All of
them have the arguments ``(value, path, what)``: the value, the file that a message names, and the field that a message
names (``"param_groups[2].lr"``). They return the value with its type known, or raise MalformedError, or
UnsupportedError where the value is an object of a class that dsconv does not read. ``field`` takes a value out of a
dictionary and checks it in one step::

    groups = field(state, "param_groups", expect_list, path)              # the key must be there
    step = field(root, "global_steps", expect_int, path, default=None)    # an absent key or None gives the default
    shapes = expect_shapes(groups[0], path, "param_shapes[0]")

Two more rules hold for code that walks a value on its own. A pickle can contain itself, so a recursive walk needs a
limit of depth. A file can choose numbers that hash alike, so a dictionary is never keyed by numbers or tuples that a
file chose: use text, such as ``TensorRef.view_key``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dsconv.checkpoint.pickles.values import (
    MAX_DIMENSIONS,
    MAX_NUMEL,
    Instance,
    Opaque,
    OpaqueClass,
    TensorRef,
    safe_repr,
)
from dsconv.errors import DsconvError, MalformedError, UnsupportedError
from dsconv.text import quote

MAX_TEXT_CHARS = 1 << 20
MAX_NAME_CHARS = 4096  # of a tensor; the longest names of real models have some 200
RESERVED_NAME = "__metadata__"  # safetensors keeps its own settings under this name

T = TypeVar("T")
D = TypeVar("D")
REQUIRED: Any = object()


def field(mapping: Any, key: str, expect: Callable[[Any, Path, str], T], path: Path, *, default: D = REQUIRED) -> T | D:
    """Return ``mapping[key]`` as ``expect`` checks it.

    Args:
        mapping: What should be a dictionary.
        key: The key, which messages name.
        expect: One of the functions of this module.
        path: The file.
        default: What an absent key or a None gives. Without it the key is required.

    Raises:
        MalformedError: ``mapping`` is no dictionary, lacks a required key, or holds a value that does not fit.
        UnsupportedError: The value is an object of a class that dsconv does not read.
    """
    if not isinstance(mapping, dict):
        raise wrong(mapping, path, "the file", f"a dictionary with {quote(key)}")
    value = mapping.get(key)
    if value is None:
        if default is REQUIRED:
            raise MalformedError(f"{path}: not what its name says: it has nothing under {quote(key)}")
        return default
    return expect(value, path, key)


def wrong(value: Any, path: Path, what: str, expected: str) -> DsconvError:
    """Return the error for a value that is not what was expected, for the caller to raise."""
    if isinstance(value, (Opaque, OpaqueClass, Instance)):
        kind = value if isinstance(value, OpaqueClass) else value.cls
        return UnsupportedError(f"{path}: {what} is a {kind}, which dsconv does not read; expected {expected}")
    return MalformedError(f"{path}: {what} is {safe_repr(value)}; expected {expected}")


def expect_dict(value: Any, path: Path, what: str) -> dict[Any, Any]:
    """Return ``value`` if it is a dictionary. Its keys and values are not checked."""
    if not isinstance(value, dict):
        raise wrong(value, path, what, "a dictionary")
    return value


def expect_list(value: Any, path: Path, what: str) -> Sequence[Any]:
    """Return ``value`` if it is a list or a tuple. Its items are not checked."""
    if not isinstance(value, (list, tuple)):
        raise wrong(value, path, what, "a list")
    return value


def expect_text(value: Any, path: Path, what: str) -> str:
    """Return ``value`` if it is text of at most ``MAX_TEXT_CHARS`` that UTF-8 can hold (without lone surrogates)."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not is_unicode(value):
        raise wrong(value, path, what, "text")
    return value


def expect_bool(value: Any, path: Path, what: str) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise wrong(value, path, what, "True or False")
    return value


def expect_int(value: Any, path: Path, what: str, least: int = 0, most: int = MAX_NUMEL - 1) -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``; True and False are not integers."""
    if type(value) is not int or not least <= value <= most:
        raise wrong(value, path, what, f"an integer from {least} to {most}")
    return value


def expect_number(value: Any, path: Path, what: str) -> int | float:
    """Return ``value`` if it is an integer that fits in 64 bits or a float, infinite and NaN included."""
    if type(value) is not float and not (type(value) is int and -MAX_NUMEL <= value < MAX_NUMEL):
        raise wrong(value, path, what, "a number")
    return value


def expect_name(value: Any, path: Path, what: str) -> str:
    """Return ``value`` if it can be the name of a tensor in every format that dsconv writes.

    It is text of at most ``MAX_NAME_CHARS`` without lone surrogates, and not ``__metadata__``, under which safetensors
    keeps its own settings.
    """
    if not is_name(value):
        raise wrong_name(value, path, what)
    return value  # type: ignore[no-any-return]


def expect_names(value: Any, path: Path, what: str) -> list[str]:
    """Return a list of tensors' names, from a list or a tuple of them."""
    for i, name in enumerate(expect_list(value, path, what)):
        if not is_name(name):
            raise wrong_name(name, path, f"{what}[{i}]")
    return list(value)


def expect_named(value: Any, path: Path, what: str) -> dict[str, Any]:
    """Return ``value`` if it is a dictionary whose keys are tensors' names. Its values are not checked."""
    for name in expect_dict(value, path, what):
        if not is_name(name):
            raise wrong_name(name, path, f"a key of {what}")
    return value  # type: ignore[no-any-return]


def expect_sizes(value: Any, path: Path, what: str) -> tuple[int, ...]:
    """Return a shape, offsets or strides: a tuple of at most ``MAX_DIMENSIONS`` integers from 0 to 2^63 - 1."""
    if not are_sizes(value):
        raise wrong(value, path, what, f"at most {MAX_DIMENSIONS} sizes")
    return tuple(value)


def expect_shape(value: Any, path: Path, what: str) -> tuple[int, ...]:
    """Return sizes whose product is less than 2^63, the most elements that torch can count."""
    if not is_shape(value):
        raise wrong(value, path, what, f"a shape of at most {MAX_DIMENSIONS} sizes and fewer than 2^63 elements")
    return tuple(value)


def expect_shapes(value: Any, path: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Return ``value`` as a dictionary of tensors' names and shapes."""
    shapes = {}
    for name, shape in expect_named(value, path, what).items():
        if not is_shape(shape):
            expect_shape(shape, path, f"{what}[{safe_repr(name)}]")
        shapes[name] = tuple(shape)
    return shapes


def expect_ties(value: Any, path: Path, what: str) -> dict[str, str]:
    """Return {alias: owner} from names that may refer to each other in a chain. No owner is an alias itself.

    Raises:
        MalformedError: A name is not a tensor's name, or names refer to each other in a circle.
    """
    direct = expect_named(value, path, what)
    for name, owner in direct.items():
        if not is_name(owner):
            raise wrong_name(owner, path, f"{what}[{safe_repr(name)}]")
    owners: dict[str, str] = {}
    for alias in direct:
        chain: list[str] = []
        owner = alias
        while owner in direct and owner not in owners:
            if len(chain) == len(direct):
                raise MalformedError(
                    f"{path}: {what} ties {safe_repr(alias)} in a circle; expected a tensor that owns it"
                )
            chain.append(owner)
            owner = direct[owner]
        owners.update(dict.fromkeys(chain, owners.get(owner, owner)))
    return owners


def expect_tensor(value: Any, path: Path, what: str) -> TensorRef:
    """Return ``value`` if it is a tensor."""
    if not isinstance(value, TensorRef):
        raise wrong(value, path, what, "a tensor")
    return value


def expect_instance(value: Any, path: Path, what: str, cls: str) -> Instance:
    """Return ``value`` if it is an object of the class called ``cls``, in whatever module its release had it."""
    if not isinstance(value, Instance) or value.cls.rpartition(".")[2] != cls:
        raise wrong(value, path, what, f"a {cls}")
    return value


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold ``text``. A pickle can hold lone surrogates, which no other format can."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(value: Any) -> bool:
    """Return whether ``value`` can be a tensor's name; see ``expect_name``."""
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARS and is_unicode(value) and value != RESERVED_NAME


def wrong_name(value: Any, path: Path, what: str) -> DsconvError:
    """Return the error for what cannot be a tensor's name, for the caller to raise."""
    if isinstance(value, str) and value == RESERVED_NAME:
        return MalformedError(
            f"{path}: {what} is {RESERVED_NAME!r}, which safetensors keeps for itself; rename the tensor and save again"
        )
    return wrong(value, path, what, f"a tensor's name, of at most {MAX_NAME_CHARS} characters that UTF-8 can hold")


def are_sizes(value: Any) -> bool:
    """Return whether ``value`` is a tuple or list of at most ``MAX_DIMENSIONS`` integers from 0 to 2^63 - 1."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < MAX_NUMEL for n in value)


def is_shape(value: Any) -> bool:
    """Return whether ``value`` is sizes of fewer than 2^63 elements, a size of 0 counted as 1."""
    if not are_sizes(value):
        return False
    numel = 1
    for size in value:
        numel *= size or 1
    return numel < MAX_NUMEL
