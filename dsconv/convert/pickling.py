"""Pickles of torch's objects, written without importing torch: protocol 2, which every reader of torch's takes.

``dump`` writes plain values, and these stand-ins for what is named, called or made: ``Name``, ``Call``, ``Made``,
``Stored`` and ``Pairs``. They are only written; what reads them is torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsconv.errors import UnsupportedError

MAX_DEPTH = 100


@dataclass(frozen=True)
class Name:
    """A class or function, ``module.name``."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What ``function`` returns for ``args``."""

    function: Name
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Made:
    """An object of ``cls``, made by ``cls.__new__`` of ``args`` and then given ``state``, unless that is None."""

    cls: Name
    state: Any
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Stored:
    """What the reader finds by itself under a persistent ``id``, such as a storage."""

    id: tuple[Any, ...]


@dataclass(frozen=True)
class Pairs:
    """A dictionary whose keys Python could not hash here, because they are stand-ins."""

    items: tuple[tuple[Any, Any], ...]


def size(shape: tuple[int, ...]) -> Call:
    """Return the stand-in for a ``torch.Size``."""
    return Call(Name("torch", "Size"), (shape,))


def dump(value: Any, replace: Callable[[Any], Any] | None = None, limit_bytes: int | None = None) -> bytes:
    """Return the pickle of ``value``.

    Args:
        value: None, bools, numbers, text, tuples, lists, dicts and stand-ins, within each other.
        replace: turns any other value into one of these, and raises UnsupportedError for what it does not know.
        limit_bytes: the size from which on the pickle is refused. Values that share parts are written out in full,
            which a hostile file can make grow.

    Raises:
        UnsupportedError: the value is of another kind, too large, or nested over MAX_DEPTH deep.
    """
    pickler = _Pickler(replace, limit_bytes)
    pickler.put(value, 0)
    return bytes(pickler.out + b".")


class _Pickler:
    def __init__(self, replace: Callable[[Any], Any] | None, limit_bytes: int | None) -> None:
        self.out = bytearray(b"\x80\x02")
        self._replace = replace
        self._limit_bytes = limit_bytes
        self._names: dict[Name, int] = {}

    def put(self, value: Any, depth: int) -> None:
        out, inner = self.out, depth + 1
        if depth > MAX_DEPTH or (self._limit_bytes is not None and len(out) > self._limit_bytes):
            raise UnsupportedError(
                f"a value that is nested over {MAX_DEPTH} deep, or takes over {self._limit_bytes} bytes, cannot be"
                " written"
            )
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self._integer(int(value))
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<L", len(text)) + text
        elif isinstance(value, (tuple, list)):
            out += b"(" if isinstance(value, tuple) else b"]("
            for item in value:
                self.put(item, inner)
            out += b"t" if isinstance(value, tuple) else b"e"
        elif isinstance(value, (dict, Pairs)):
            out += b"}("
            for pair in value.items if isinstance(value, Pairs) else value.items():
                self.put(pair[0], inner)
                self.put(pair[1], inner)
            out += b"u"
        elif isinstance(value, Name):
            self._name(value)
        elif isinstance(value, Call):
            self._name(value.function)
            self.put(value.args, inner)
            out += b"R"
        elif isinstance(value, Made):
            self._name(value.cls)
            self.put(value.args, inner)
            out += b"\x81"
            if value.state is not None:
                self.put(value.state, inner)
                out += b"b"
        elif isinstance(value, Stored):
            self.put(value.id, inner)
            out += b"Q"
        elif self._replace is not None:
            self.put(self._replace(value), depth)
        else:
            raise UnsupportedError(f"a {type(value).__name__} cannot be written into a pickle")

    def _integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<l", value)
        else:
            nbytes = value.bit_length() // 8 + 1
            if nbytes > 255:
                raise UnsupportedError(f"an integer of {value.bit_length()} bits cannot be written")
            self.out += b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little", signed=True)

    def _name(self, name: Name) -> None:
        """Write a name once. After that the reader is sent to its memo."""
        if name in self._names:
            self.out += b"j" + struct.pack("<L", self._names[name])
        else:
            number = self._names[name] = len(self._names)
            self.out += f"c{name.module}\n{name.name}\n".encode() + b"r" + struct.pack("<L", number)
