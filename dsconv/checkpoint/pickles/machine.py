"""A pickle machine that cannot run anything.

Every pickle that dsconv reads goes through ``load``. It knows the opcodes of protocols 0 to 5, builds plain data, and
lets a file call only the functions of ``allowlist.CONSTRUCTORS``. It is written out rather than derived from
``pickle.Unpickler`` because the C machine allocates what a file tells it to (a memo index of 2**31, a string of 2**40)
and hashes what a file nests, before a ``find_class`` hook sees anything.

Cost: about 1 µs an opcode; the pickle of one rank of a model of 300 tensors takes some 10 ms. What a file makes the
constructors and the dictionaries do on top is bounded by ``budget.WorkBudget``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles import allowlist
from dsconv.checkpoint.pickles.budget import WorkBudget
from dsconv.checkpoint.pickles.errors import BadArguments, BadPickle, Refused, UnsupportedGlobal
from dsconv.checkpoint.pickles.kept_classes import KEPT
from dsconv.checkpoint.pickles.opcodes import OPERATIONS
from dsconv.checkpoint.pickles.values import Instance, Opaque, OpaqueClass, safe_repr
from dsconv.errors import DsconvError, MalformedError, UnsafeError, UnsupportedError

MAX_PICKLE_BYTES = 256 << 20  # 100,000 tensors need some 20 MB
MAX_NAME_CHARS = (
    1000  # of a class and its module; without a limit, one long name that is used often costs quadratic time
)
STOP = ord(".")


def load(data: bytes, path: Path, persistent_load: Callable[[Any], Any], what: str = "data.pkl") -> Any:
    """The object that ``data`` describes, of plain Python data and stand-ins.

    Raises UnsafeError, naming file and function, where the pickle calls anything off the list; UnsupportedError where a
    tensor is of a kind that has no stand-in; MalformedError where it is not a pickle, is truncated, or exceeds a limit.
    """
    return Machine(data, path, persistent_load, what).run()


def load_next(
    data: bytes, position: int, path: Path, persistent_load: Callable[[Any], Any], what: str
) -> tuple[Any, int]:
    """The same of a pickle that begins at ``position`` of ``data`` and is followed by something else: (object, its
    end).
    """
    machine = Machine(data, path, persistent_load, what)
    machine.position = position
    return machine.run(), machine.position


class Machine:
    """One run over one pickle. ``position`` is where it stopped reading."""

    def __init__(self, data: bytes, path: Path, persistent_load: Callable[[Any], Any], what: str) -> None:
        if len(data) > MAX_PICKLE_BYTES:
            raise MalformedError(f"{path}: {what} is a pickle of {len(data)} bytes; the limit is {MAX_PICKLE_BYTES}")
        self.data = data
        self.path = path
        self.what = what
        self.persistent_load = persistent_load
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.work = WorkBudget(len(data))

    def run(self) -> Any:
        data = self.data
        end = len(data)
        try:
            while self.position < end:
                code = data[self.position]
                self.position += 1
                if code == STOP:
                    if self.marks or len(self.stack) != 1:
                        raise BadPickle("stops with an unfinished stack")
                    return self.stack[0]
                operation = OPERATIONS[code]
                if operation is None:
                    raise BadPickle(f"has an unknown opcode 0x{code:02x}")
                operation(self)
            raise BadPickle("is truncated")
        except DsconvError:  # from refuse or persistent_load; these are ValueErrors too, so first
            raise
        except BadPickle as error:
            raise MalformedError(f"{self.path}: {self.what} {error} at its byte {self.position}") from None
        except BadArguments as error:
            raise MalformedError(f"{self.path}: {self.what} holds {error}, at its byte {self.position}") from None
        except Refused as error:
            raise self.refuse(str(error)) from None
        except UnsupportedGlobal as error:
            raise UnsupportedError(f"{self.path}: {self.what} holds {error}, at its byte {self.position}") from None
        except (IndexError, struct.error, ValueError, TypeError, OverflowError) as error:
            raise MalformedError(
                f"{self.path}: {self.what} is corrupt at its byte {self.position} ({type(error).__name__}:"
                f" {error!s:.200})"
            ) from None

    def refuse(self, why: str) -> UnsafeError:
        return UnsafeError(
            f"{self.path}: {self.what} {why}; refused, and nothing was run. A checkpoint is data: if you trust the"
            " file, load it where it was made and save it again without that object"
        )

    # Reading the stream

    def take(self, nbytes: int) -> bytes:
        start = self.position
        if nbytes > len(self.data) - start:
            raise BadPickle(f"is truncated: it wants {nbytes} bytes where {len(self.data) - start} are left")
        self.position = start + nbytes
        return self.data[start : start + nbytes]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise BadPickle("is truncated inside a line")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise BadPickle("closes a container that it never opened")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # What a name means

    def find(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_NAME_CHARS:
            raise BadPickle(f"names something in {len(module) + len(name)} characters; the limit is {MAX_NAME_CHARS}")
        known = allowlist.CONSTRUCTORS.get((module, name))
        if known is not None:
            return known
        unknown = OpaqueClass(module, name)
        pair = (module, name)
        if (
            pair not in allowlist.OBJECT_MAKERS
            and pair not in allowlist.BASE_CLASSES
            and allowlist.belongs_to_python(module)
        ):
            raise self.refuse(f"names {unknown}, which no checkpoint needs")
        return unknown

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise BadPickle("calls something without a tuple of arguments")
        if isinstance(function, OpaqueClass):
            if allowlist.makes_objects(function) and args and isinstance(args[0], OpaqueClass):
                return self.make(args[0], args[1:])
            raise self.refuse(f"calls {function}{safe_repr(args)}")
        if not callable(function):
            raise self.refuse(f"calls {safe_repr(function)}, which is not a function")
        self.work.spend(len(args))
        return function(self.work, *args)

    def make(self, cls: OpaqueClass, args: Any) -> Opaque | Instance:
        """An object of a class, its __init__ not run: data, whatever the class."""
        if allowlist.makes_objects(cls):
            raise self.refuse(f"makes an object of {cls}, which is a function")
        if (cls.module, cls.name) in KEPT:
            return Instance(str(cls), args if isinstance(args, tuple) else ())
        return Opaque(str(cls))
