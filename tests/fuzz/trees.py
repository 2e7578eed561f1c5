"""Turn pickles into trees that can be changed and written again, without importing what they name.

``decode`` runs a pickle with Python's own machine over inert stand-ins: a global is a ``Global``, a call of it a
``Call`` and a persistent id a ``Pid``. ``fields`` lists the places of a tree by name, and ``encode`` writes the tree
with some of them replaced.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.checkpoint.building import blob, glob, number, text

Path = tuple[Any, ...]
DELETED = object()


@dataclass(eq=False)
class Global:
    """A global that a pickle names. Calling it makes a ``Call``."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Call:
        return Call(self, arguments)


@dataclass(eq=False)
class Pid:
    """A persistent id, which is a storage in a torch.save file."""

    value: Any


@dataclass(eq=False)
class Call:
    """The result of a call or ``__new__`` of a global, with the state and items that were added afterwards."""

    function: Global
    arguments: tuple[Any, ...]
    new: bool = False
    state: Any = None
    built: bool = False
    items: dict[Any, Any] = field(default_factory=dict)
    listed: list[Any] = field(default_factory=list)

    def __setstate__(self, state: Any) -> None:
        self.state, self.built = state, True

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.listed.append(value)

    def extend(self, values: list[Any]) -> None:
        self.listed.extend(values)


class _Machine(pickle._Unpickler):
    """Python's own unpickler over stand-ins. The C version requires a class for NEWOBJ."""

    def find_class(self, module: str, name: str) -> Any:
        return Global(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return Pid(pid)


def _load_newobj(machine: Any) -> None:
    arguments = machine.stack.pop()
    machine.append(Call(machine.stack.pop(), arguments, new=True))


_Machine.dispatch = {**_Machine.dispatch, pickle.NEWOBJ[0]: _load_newobj}


def decode(data: bytes) -> Any:
    """Return the tree of a sound pickle."""
    return _Machine(io.BytesIO(data)).load()


def children(value: Any) -> Iterator[tuple[Any, str | None, Any]]:
    """Yield (step, name or None, child) for each part of a value."""
    if isinstance(value, dict):
        for at, (key, child) in enumerate(value.items()):
            yield ("key", at), f"key {name_of(key)}", key
            yield ("value", at), name_of(key), child
    elif isinstance(value, (list, tuple)):
        for at, child in enumerate(value):
            yield ("at", at), None, child
    elif isinstance(value, Call):
        for at, child in enumerate(value.arguments):
            yield ("argument", at), f"{value.function.name}[{at}]", child
        if value.built:
            yield ("state",), f"{value.function.name} state", value.state
        for at, (key, child) in enumerate(value.items.items()):
            yield ("item key", at), f"{value.function.name} key {name_of(key)}", key
            yield ("item", at), name_of(key), child
        for at, child in enumerate(value.listed):
            yield ("listed", at), f"{value.function.name} item", child
    elif isinstance(value, Pid):
        yield ("pid",), "storage", value.value


def name_of(key: Any) -> str:
    """Return a key as a field's name. Numbers are replaced, so that many tensors count as one field."""
    if isinstance(key, str):
        return "".join("N" if char.isdigit() else char for char in key)[:60]
    return type(key).__name__


def fields(tree: Any) -> dict[str, list[Path]]:
    """Return the paths of all places with a field's name, by that name. Items of a list are named after the list."""
    found: dict[str, list[Path]] = {"the whole": [()]}

    def walk(value: Any, path: Path, name: str, depth: int) -> None:
        for step, own, child in children(value):
            label = own or f"{name}[]"
            found.setdefault(label, []).append((*path, step))
            if depth < 40:
                walk(child, (*path, step), label, depth + 1)

    walk(tree, (), "the whole", 0)
    return found


def encode(tree: Any, edits: dict[Path, Any]) -> bytes:
    """Return the tree as a pickle, in which ``edits`` puts a value, DELETED, or opcodes (Raw) at its paths."""
    out: list[bytes] = [b"\x80\x02"]

    def put(value: Any, path: Path | None) -> None:
        if path is not None and path in edits:
            value, path = edits[path], None
            value = None if value is DELETED else value  # in places that cannot be left out
        writer = _WRITERS.get(type(value))
        if writer is not None:
            out.append(writer(value))
        elif isinstance(value, Raw):
            out.append(value.opcodes)
        elif isinstance(value, dict):
            out.append(b"}")
            put_items(value, path, "key", "value")
        elif isinstance(value, (list, tuple)):
            out.append(b"](" if isinstance(value, list) else b"(")
            put_all(value, path, "at")
            out.append(b"e" if isinstance(value, list) else b"t")
        elif isinstance(value, (set, frozenset)):
            out.append(glob("builtins", "set") + b"(](")
            put_all(tuple(value), None, "at")
            out.append(b"etR")
        elif isinstance(value, Call):
            put(value.function, None)
            out.append(b"(")
            put_all(value.arguments, path, "argument")
            out.append(b"t\x81" if value.new else b"tR")
            if value.listed:
                out.append(b"(")
                put_all(value.listed, path, "listed")
                out.append(b"e")
            put_items(value.items, path, "item key", "item")
            if value.built:
                put(value.state, _under(path, ("state",)))
                out.append(b"b")
        elif isinstance(value, Pid):
            put(value.value, _under(path, ("pid",)))
            out.append(b"Q")
        else:
            raise TypeError(f"no opcode writes {type(value).__name__}")

    def put_all(values: Any, path: Path | None, step: str) -> None:
        for at, child in enumerate(values):
            inner = _under(path, (step, at))
            if inner is None or edits.get(inner) is not DELETED:
                put(child, inner)

    def put_items(items: dict[Any, Any], path: Path | None, key_step: str, value_step: str) -> None:
        if not items:
            return
        out.append(b"(")
        for at, (key, child) in enumerate(items.items()):
            key_path, value_path = _under(path, (key_step, at)), _under(path, (value_step, at))
            if path is not None and DELETED in (edits.get(key_path), edits.get(value_path)):  # type: ignore[arg-type]
                continue
            put(key, key_path)
            put(child, value_path)
        out.append(b"u")

    put(tree, ())
    return b"".join(out) + b"."


@dataclass(frozen=True)
class Raw:
    """Opcodes that put one value on the stack."""

    opcodes: bytes


def _under(path: Path | None, step: Any) -> Path | None:
    return None if path is None else (*path, step)


_WRITERS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: number,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: text,
    bytes: blob,
    Global: lambda value: glob(value.module, value.name),
}
