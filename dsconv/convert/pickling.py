"""Pickles of torch's objects, written without importing torch: protocol 2, which every reader of torch's takes.

``dump`` writes plain values, and these stand-ins for what is named, called or made: ``Name``, ``Call``, ``Made`` and
``Stored``. They are only written; what reads them is torch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


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
    """An object of ``cls``, made without its __init__ and then given ``state``. Equal states do not make equal
    objects.
    """

    cls: Name
    state: Any


@dataclass(frozen=True)
class Stored:
    """What the reader finds by itself under a persistent ``id``, such as a storage."""

    id: tuple[Any, ...]


def size(shape: tuple[int, ...]) -> Call:
    """A ``torch.Size``."""
    return Call(Name("torch", "Size"), (shape,))


def dump(value: Any) -> bytes:
    """The pickle of ``value``. A dictionary is given as one, or as pairs in ``Pairs`` where keys are stand-ins."""
    out = bytearray(b"\x80\x02")
    _put(out, value, {})
    return bytes(out + b".")


@dataclass(frozen=True)
class Pairs:
    """A dictionary whose keys Python could not hash here."""

    items: tuple[tuple[Any, Any], ...]


def _put(out: bytearray, value: Any, names: dict[Name, int]) -> None:
    if value is None:
        out += b"N"
    elif isinstance(value, bool):
        out += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        _put_integer(out, value)
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<L", len(data)) + data
    elif isinstance(value, tuple):
        out += b"("
        for item in value:
            _put(out, item, names)
        out += b"t"
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _put(out, item, names)
        out += b"e"
    elif isinstance(value, (dict, Pairs)):
        out += b"}("
        for key, item in value.items if isinstance(value, Pairs) else value.items():
            _put(out, key, names)
            _put(out, item, names)
        out += b"u"
    elif isinstance(value, Name):
        _put_name(out, value, names)
    elif isinstance(value, Call):
        _put_name(out, value.function, names)
        _put(out, value.args, names)
        out += b"R"
    elif isinstance(value, Made):
        _put_name(out, value.cls, names)
        out += b")\x81"
        _put(out, value.state, names)
        out += b"b"
    else:
        assert isinstance(value, Stored), type(value)
        _put(out, value.id, names)
        out += b"Q"


def _put_integer(out: bytearray, value: int) -> None:
    if 0 <= value < 256:
        out += b"K" + bytes([value])
    elif -(1 << 31) <= value < 1 << 31:
        out += b"J" + struct.pack("<i", value)
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"\x8a" + bytes([len(data)]) + data


def _put_name(out: bytearray, name: Name, names: dict[Name, int]) -> None:
    """A name, once; after that the reader is sent to its memo."""
    if name in names:
        out += b"j" + struct.pack("<L", names[name])
    else:
        names[name] = len(names)
        out += f"c{name.module}\n{name.name}\n".encode() + b"r" + struct.pack("<L", names[name])
