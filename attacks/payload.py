"""The parts of a hostile file: the program, the canary (the file that shows that it ran), and pickle opcodes."""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from dsconv.errors import DsconvError, UnsafeError
from tests.checkpoint.building import blob, call, glob, lst, stack_glob, text, whole

CANARY_MODULE = "dsconv_canary_module"
CANARY_SOURCE = """
import pathlib
def strike(*args, **kwargs):
    pathlib.Path({canary!r}).touch()
strike()
class Evil:
    def __new__(cls, *args, **kwargs):
        strike()
        return super().__new__(cls)
    __init__ = __setstate__ = __reduce__ = strike
"""


@dataclass(frozen=True)
class Hostile:
    """``program`` makes the pickle from the canary's path. ``real``: Python's own pickle.loads runs it, which makes the
    canary.
    """

    title: str
    program: Callable[[str], bytes]
    says: str
    error: type[DsconvError] = UnsafeError
    real: bool = True


def touch(canary: str) -> bytes:
    return text(f"touch {shlex.quote(canary)}")


def code(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def line(canary: str) -> bytes:
    return b"S" + repr(f"touch {shlex.quote(canary)}").encode() + b"\n"


def argv(canary: str) -> bytes:
    return lst(text("touch"), text(canary))


class Reduces:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def pickled(protocol: int) -> Callable[[str], bytes]:
    return lambda c: pickle.dumps({"weights": [1, Reduces(f"touch {shlex.quote(c)}")]}, protocol=protocol)


SYSTEM = glob("os", "system")
TENSOR_CLASS = glob("torch", "Tensor")
FROM_TYPE = glob("torch._tensor", "_rebuild_from_type_v2")


def function(module: str, name: str, *args: Callable[[str], bytes], protocol: int = 2, real: bool = True) -> Hostile:
    return Hostile(
        f"calls {name} of {module}",
        lambda c: whole(
            call(stack_glob(module, name) if protocol >= 4 else glob(module, name), *[arg(c) for arg in args]),
            protocol=protocol,
        ),
        f"{module}.{name}",
        real=real,
    )


def fixed(data: bytes) -> Callable[[str], bytes]:
    return lambda c: data


def source(c: str) -> bytes:
    return text(code(c))


def own_name(c: str) -> bytes:
    return text(CANARY_MODULE)


def nested(c: str) -> bytes:
    return blob(whole(call(SYSTEM, touch(c))))
