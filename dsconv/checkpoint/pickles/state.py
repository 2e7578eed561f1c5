"""What a pickle has built so far, and what the names and calls in it stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles import allowlist
from dsconv.checkpoint.pickles.budget import OBJECT_BYTES, WorkBudget
from dsconv.checkpoint.pickles.constructors import Inert
from dsconv.checkpoint.pickles.errors import BadPickle
from dsconv.checkpoint.pickles.kept_classes import KEPT
from dsconv.checkpoint.pickles.values import MAX_NAME_CHARS, Instance, Opaque, OpaqueClass, UnreadTensor, safe_repr
from dsconv.errors import MalformedError, UnsafeError

MAX_PICKLE_BYTES = 256 << 20  # 100,000 tensors need some 20 MB


class MachineState:
    """The state of one run over one pickle, and what a name or a call in it means. ``opcodes`` work on it.

    Attributes:
        data: The pickle.
        position: Where the next byte is read.
        stack: The values since the last mark.
        marks: The stacks below each mark that is open.
        memo: The values by their memo numbers, as far as the numbers follow each other from 0.
        scattered: The values of all other memo numbers.
        budget: What is left of memory and steps.
        opaque: How many objects of each class were not read, for classes that are not on the allowlist.
        unread: The kinds of the tensors that were not read.
    """

    def __init__(
        self, data: bytes, path: Path, persistent_load: Callable[[Any], Any], what: str, position: int = 0
    ) -> None:
        """Prepare to read the pickle that begins at ``position``; the other arguments are those of ``load``."""
        if len(data) > MAX_PICKLE_BYTES:
            raise MalformedError(f"{path}: {what} is a pickle of {len(data)} bytes; the limit is {MAX_PICKLE_BYTES}")
        self.data = data
        self.path = path
        self.what = what
        self.persistent_load = persistent_load
        self.position = position
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.scattered: dict[int, Any] = {}
        self.budget = WorkBudget(len(data))
        self.opaque: dict[str, int] = {}
        self.unread: list[str] = []
        self._named: dict[tuple[str, str], Any] = {}

    def refuse(self, why: str) -> UnsafeError:
        """Return the error for a pickle that asks for code to be run, for the caller to raise."""
        return UnsafeError(
            f"{self.path}: {self.what} {why}; refused, and nothing was run. A checkpoint is data: if you trust the"
            " file, load it where it was made and save it again without that object"
        )

    # Reading the stream

    def take(self, nbytes: int) -> bytes:
        """Return the next ``nbytes`` bytes."""
        start = self.position
        if nbytes > len(self.data) - start:
            raise BadPickle(f"is truncated: it wants {nbytes} bytes where {len(self.data) - start} are left")
        self.position = start + nbytes
        return self.data[start : start + nbytes]

    def number(self, kind: struct.Struct) -> Any:
        """Return the next integer."""
        start = self.position
        self.position = start + kind.size
        if self.position > len(self.data):
            raise BadPickle(f"is truncated: it wants {kind.size} bytes where {len(self.data) - start} are left")
        return kind.unpack_from(self.data, start)[0]

    def line(self) -> bytes:
        """Return the bytes up to the next newline, without it."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise BadPickle("is truncated inside a line")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def pop_mark(self) -> list[Any]:
        """Return the values since the last mark and take both off the stack."""
        if not self.marks:
            raise BadPickle("closes a container that it never opened")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # What a name means

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a global: a constructor, a value, or an OpaqueClass."""
        pair = (module, name)
        known = self._named.get(pair)
        if known is None:
            known = self._named[pair] = self._find(module, name)
        return known

    def _find(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_NAME_CHARS:
            raise BadPickle(f"names something in {len(module) + len(name)} characters; the limit is {MAX_NAME_CHARS}")
        pair = (module, name)
        known = allowlist.CONSTRUCTORS.get(pair)
        if known is not None:
            return known
        self.budget.allocate(2 * OBJECT_BYTES + 4 * (len(module) + len(name)))
        unknown = OpaqueClass(module, name)
        if pair not in allowlist.OBJECT_MAKERS and pair not in allowlist.LABELS and allowlist.belongs_to_python(module):
            raise self.refuse(f"names {unknown}, which no checkpoint needs")
        return unknown

    def call(self, function: Any, args: Any, may_be_member: bool = False) -> Any:
        """Return what a call makes. This is the only place where anything is called that a file names.

        Args:
            function: What the file calls.
            args: Its arguments, which should be a tuple.
            may_be_member: Whether the opcode is the one by which Python pickles the members of enumerations.
        """
        if not isinstance(args, tuple):
            raise BadPickle("calls something without a tuple of arguments")
        self.budget.allocate(OBJECT_BYTES)
        if isinstance(function, OpaqueClass):
            if allowlist.makes_objects(function) and args and isinstance(args[0], OpaqueClass):
                return self.make(args[0], args[1:])
            if allowlist.makes_objects(function) and args and isinstance(args[0], Inert):
                return args[0](self.budget)
            if may_be_member and allowlist.is_member(function, args):
                return self._opaque(function.label, args)
            raise self.refuse(f"calls {function}{safe_repr(args)}")
        if not callable(function):
            raise self.refuse(f"calls {safe_repr(function)}, which is not a function")
        self.budget.spend(len(args))
        made = function(self.budget, *args)
        if type(made) is UnreadTensor:
            self.unread.append(made.cls)
        return made

    def make(self, cls: OpaqueClass, args: Any) -> Opaque | Instance:
        """Return what stands for an object of ``cls``. Its __init__ is not run, so it is data whatever the class."""
        if allowlist.makes_objects(cls):
            raise self.refuse(f"makes an object of {cls}, which is a function")
        self.budget.allocate(OBJECT_BYTES)
        if (cls.module, cls.name) in KEPT:
            return Instance(cls.label, args if isinstance(args, tuple) else ())
        return self._opaque(cls.label, ())

    def _opaque(self, label: str, args: tuple[Any, ...]) -> Opaque:
        self.opaque[label] = self.opaque.get(label, 0) + 1
        return Opaque(label, args)
