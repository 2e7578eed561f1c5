"""Pickles that ask for code to be run: every one is refused by name, nothing runs, nothing is imported."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsconv.checkpoint.standins import Opaque, OpaqueClass
from dsconv.checkpoint.torch_file import TorchFile
from dsconv.errors import DsconvError, MalformedError, UnsafeError
from tests.checkpoint.building import (
    blob,
    call,
    glob,
    load_raw,
    lst,
    number,
    stack_glob,
    storage,
    tensor,
    text,
    tup,
    whole,
    write_pt,
)

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
    """``program`` makes the pickle from the canary's path. ``real``: Python's own pickle.loads runs it and so makes the canary."""

    title: str
    program: Callable[[str], bytes]
    says: str
    error: type[DsconvError] = UnsafeError
    real: bool = True


def _touch(canary: str) -> bytes:
    return text(f"touch {shlex.quote(canary)}")


def _code(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def _line(canary: str) -> bytes:
    return b"S" + repr(f"touch {shlex.quote(canary)}").encode() + b"\n"


def _argv(canary: str) -> bytes:
    return lst(text("touch"), text(canary))


class _Reduces:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _pickled(protocol: int) -> Callable[[str], bytes]:
    return lambda c: pickle.dumps({"weights": [1, _Reduces(f"touch {shlex.quote(c)}")]}, protocol=protocol)


SYSTEM = glob("os", "system")
TENSOR_CLASS = glob("torch", "Tensor")
FROM_TYPE = glob("torch._tensor", "_rebuild_from_type_v2")

OPCODES = [
    Hostile("GLOBAL and REDUCE, protocol 0", lambda c: b"cos\nsystem\n(" + _line(c) + b"tR.", "os.system"),
    Hostile("GLOBAL and REDUCE, protocol 2", lambda c: whole(call(SYSTEM, _touch(c))), "os.system"),
    Hostile("STACK_GLOBAL and REDUCE", lambda c: whole(call(stack_glob("os", "system"), _touch(c)), protocol=4), "os.system"),
    Hostile("INST", lambda c: b"(" + _line(c) + b"ios\nsystem\n.", "os.system"),
    Hostile("OBJ", lambda c: b"(" + SYSTEM + _line(c) + b"o.", "os.system"),
    Hostile("NEWOBJ", lambda c: whole(glob("subprocess", "Popen"), tup(_argv(c)), b"\x81"), "subprocess.Popen", real=False),
    Hostile(
        "NEWOBJ_EX",
        lambda c: whole(glob("subprocess", "Popen"), tup(_argv(c)), b"}\x92", protocol=4),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "BUILD with a poisoned __setstate__",
        lambda c: whole(glob("argparse", "Namespace"), b")\x81}", text("__setstate__"), SYSTEM, b"sb", _touch(c), b"b"),
        "os.system",
    ),
    Hostile(
        "BUILD with slot state",
        lambda c: whole(glob("argparse", "Namespace"), b")\x81N}", text("__setstate__"), SYSTEM, b"s\x86b", _touch(c), b"b"),
        "os.system",
    ),
    Hostile("EXT1", lambda c: whole(b"\x82\x01", tup(_touch(c)), b"R"), "extension registry", real=False),
    Hostile("EXT2", lambda c: whole(b"\x83\x01\x01", tup(_touch(c)), b"R"), "extension registry", real=False),
    Hostile("EXT4", lambda c: whole(b"\x84\x01\x01\x00\x00", tup(_touch(c)), b"R"), "extension registry", real=False),
    *[Hostile(f"__reduce__ pickled in protocol {p}", _pickled(p), f"{os.system.__module__}.system") for p in range(6)],
]
MEMO_TRICKS = [
    Hostile(
        "the function hides in the memo",
        lambda c: whole(SYSTEM, b"q\x00", b"0h\x00", tup(_touch(c)), b"R"),
        "os.system",
    ),
    Hostile(
        "a memo number is overwritten",
        lambda c: whole(glob("collections", "OrderedDict"), b"q\x000", SYSTEM, b"q\x000h\x00", tup(_touch(c)), b"R"),
        "os.system",
    ),
    Hostile(
        "module and name come from the memo",
        lambda c: whole(text("system"), b"\x94", text("os"), b"\x9400h\x01h\x00\x93", tup(_touch(c)), b"R", protocol=4),
        "os.system",
    ),
    Hostile("the result is thrown away", lambda c: whole(call(SYSTEM, _touch(c)), b"0N"), "os.system"),
    Hostile("the call stands between marks and is dropped", lambda c: whole(b"(", call(SYSTEM, _touch(c)), b"1N"), "os.system"),
    Hostile("DUP copies the function", lambda c: whole(SYSTEM, b"2", tup(_touch(c)), b"R\x86"), "os.system"),
    Hostile("the call makes a dictionary's key", lambda c: whole(b"}", call(SYSTEM, _touch(c)), b"Ns"), "os.system"),
    Hostile("the call makes a persistent id", lambda c: whole(call(SYSTEM, _touch(c)), b"Q"), "os.system", real=False),
    Hostile("long memo numbers", lambda c: whole(SYSTEM, b"r\x10\x00\x00\x000j\x10\x00\x00\x00", tup(_touch(c)), b"R"), "os.system"),
]


def _function(module: str, name: str, *args: Callable[[str], bytes], protocol: int = 2, real: bool = True) -> Hostile:
    return Hostile(
        f"calls {name} of {module}",
        lambda c: whole(
            call(stack_glob(module, name) if protocol >= 4 else glob(module, name), *[arg(c) for arg in args]), protocol=protocol
        ),
        f"{module}.{name}",
        real=real,
    )


def _fixed(data: bytes) -> Callable[[str], bytes]:
    return lambda c: data


def _source(c: str) -> bytes:
    return text(_code(c))


def _own_name(c: str) -> bytes:
    return text(CANARY_MODULE)


def _nested(c: str) -> bytes:
    return blob(whole(call(SYSTEM, _touch(c))))


FUNCTIONS = [
    _function("posix", "system", _touch),
    _function("nt", "system", _touch, real=False),
    _function("os", "popen", _touch, real=False),  # whether the canary is there at once is a race
    _function("os", "execvp", _fixed(text("touch")), _argv, real=False),
    _function("os", "spawnvp", _fixed(number(0)), _fixed(text("touch")), _argv),
    _function("os", "mkdir", lambda c: text(c)),
    _function("subprocess", "call", _argv),
    _function("subprocess", "run", _argv),
    _function("subprocess", "check_output", _argv),
    _function("subprocess", "getoutput", _touch),
    _function("commands", "getoutput", _touch, real=False),
    _function("builtins", "eval", _source),
    _function("builtins", "exec", _source, protocol=4),
    _function("__builtin__", "eval", _source),
    _function("__builtin__", "execfile", lambda c: text(c), real=False),
    _function("builtins", "compile", _source, _fixed(text("x")), _fixed(text("exec")), real=False),
    _function("builtins", "__import__", _own_name),
    _function("builtins", "getattr", lambda c: glob(CANARY_MODULE, "Evil"), _fixed(text("strike"))),
    _function("builtins", "setattr", _fixed(glob("torch", "Tensor")), _fixed(text("x")), _fixed(b"N"), real=False),
    _function("builtins", "open", lambda c: text(c), _fixed(text("w"))),
    _function("builtins", "map", _fixed(SYSTEM), _argv, real=False),
    _function("io", "open", lambda c: text(c), _fixed(text("w"))),
    _function("_io", "FileIO", lambda c: text(c), _fixed(text("w"))),
    _function("importlib", "import_module", _own_name),
    _function("importlib._bootstrap", "_gcd_import", _own_name, real=False),
    _function("imp", "load_source", _own_name, lambda c: text(c), real=False),
    _function("pkgutil", "resolve_name", _own_name),
    _function("pydoc", "locate", _own_name),
    _function("runpy", "run_module", _own_name),
    _function("runpy", "run_path", lambda c: text(c), real=False),
    _function("runpy", "_run_code", _source, _fixed(b"}")),
    _function("code", "interact", real=False),
    _function("timeit", "timeit", _source, _fixed(text("pass")), _fixed(glob("time", "perf_counter")), _fixed(number(1))),
    _function("cProfile", "run", _source, real=False),  # needs __main__
    _function("profile", "run", _source, real=False),
    _function("pdb", "run", _source, real=False),
    _function("bdb", "Bdb", real=False),
    _function("pty", "spawn", _argv, real=False),
    _function("ctypes", "CDLL", lambda c: text(c), real=False),
    _function("shutil", "copyfile", _fixed(text("/etc/hostname")), lambda c: text(c)),
    _function("shutil", "rmtree", lambda c: text(c), real=False),
    _function("socket", "create_connection", _fixed(tup(text("127.0.0.1"), number(9))), real=False),
    _function("urllib.request", "urlopen", _fixed(text("http://127.0.0.1:9/")), real=False),
    _function("webbrowser", "open", _fixed(text("http://127.0.0.1:9/")), real=False),
    _function("atexit", "register", _fixed(SYSTEM), _touch, real=False),
    _function("threading", "Timer", _fixed(number(0)), _fixed(SYSTEM), _fixed(lst()), real=False),
    _function("functools", "partial", _fixed(SYSTEM), _touch, real=False),
    _function("functools", "reduce", _fixed(SYSTEM), _argv, real=False),
    _function("operator", "attrgetter", _fixed(text("system")), real=False),
    _function("operator", "methodcaller", _fixed(text("system")), _touch, real=False),
    _function("copyreg", "add_extension", _fixed(text("os")), _fixed(text("system")), _fixed(number(1)), real=False),
    _function("codecs", "lookup", _own_name, real=False),
    _function("codecs", "decode", _source, _fixed(text("rot13")), real=False),
    _function("pickle", "loads", _nested),
    _function("_pickle", "loads", _nested),
    _function("cPickle", "loads", _nested),
    _function("marshal", "loads", _nested, real=False),
    _function("types", "FunctionType", real=False),
    _function("types", "CodeType", real=False),
    _function("logging.config", "dictConfig", _fixed(b"}"), real=False),
    _function("multiprocessing", "Process", real=False),
    _function("sys", "setrecursionlimit", _fixed(number(5)), real=False),
    _function("torch", "load", lambda c: text(c), real=False),
    _function("torch.hub", "load", lambda c: text(c), _fixed(text("x")), real=False),
    _function("torch.serialization", "load", lambda c: text(c), real=False),
    _function("torch.storage", "_load_from_bytes", _nested, real=False),
    _function("torch.jit", "load", lambda c: text(c), real=False),
    _function("torch.utils.cpp_extension", "load_inline", _source, real=False),
    _function("torch._utils", "_rebuild_wrapper_subclass", real=False),
    _function("numpy", "load", lambda c: text(c), real=False),
    _function("numpy.testing._private.utils", "runstring", _source, _fixed(b"}"), real=False),
    _function("numpy.f2py.crackfortran", "getlincoef", _source, _fixed(b"}"), real=False),
    _function("joblib", "load", lambda c: text(c), real=False),
    _function("pandas", "read_pickle", lambda c: text(c), real=False),
    _function(CANARY_MODULE, "strike"),
    _function(CANARY_MODULE, "Evil"),
]
SHARDED = "torch.distributed._shard.sharded_tensor.api"
DOTTED = [
    _function("torch", "serialization.os.system", _touch, protocol=4, real=False),
    _function("torch.serialization", "os.system", _touch, protocol=4, real=False),
    _function("argparse", "_os.system", _touch, protocol=4),
    _function("random", "_os.system", _touch, protocol=4),
    _function("collections", "_sys.modules.get", _fixed(text("os")), protocol=4, real=False),
    _function("collections", "OrderedDict.fromkeys", _argv, protocol=4, real=False),
    _function("pathlib", "Path.touch", lambda c: call(glob("pathlib", "Path"), text(c)), protocol=4),
    _function(CANARY_MODULE, "Evil.__setstate__", protocol=4),
    _function("os.path", "os.system", _touch, protocol=4),
]
INDIRECT = [
    Hostile(
        "getattr of a module by name",
        lambda c: whole(
            call(call(glob("builtins", "getattr"), call(glob("builtins", "__import__"), text("os")), text("system")), _touch(c))
        ),
        "builtins.__import__",
    ),
    Hostile(
        "getattr of a class that files name, for something else than what they ask",
        lambda c: whole(call(glob("__builtin__", "getattr"), glob(SHARDED, "ShardedTensor"), text("__init__"))),
        "builtins.getattr",
        real=False,
    ),
    Hostile(
        "getattr of a class as a call",
        lambda c: whole(call(call(glob("__builtin__", "getattr"), glob(SHARDED, "ShardedTensor"), text("ProcessGroupState")), _touch(c))),
        "ShardedTensor.ProcessGroupState",
        real=False,
    ),
    Hostile(
        "a tensor without storage rebuilt by itself",
        lambda c: whole(call(glob("torch._utils", "_rebuild_wrapper_subclass"), glob("torch.distributed.tensor", "DTensor"))),
        "torch._utils._rebuild_wrapper_subclass",
        real=False,
    ),
    Hostile(
        "copyreg.__newobj__ of a process",
        lambda c: whole(call(glob("copyreg", "__newobj__"), glob("subprocess", "Popen"), _argv(c))),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of a process",
        lambda c: whole(call(glob("copyreg", "_reconstructor"), glob("subprocess", "Popen"), glob("builtins", "object"), b"N")),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of itself",
        lambda c: whole(call(glob("copyreg", "_reconstructor"), glob("copyreg", "_reconstructor"), glob("builtins", "object"), b"N")),
        "copyreg._reconstructor",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of text",
        lambda c: whole(call(glob("copyreg", "_reconstructor"), text("os"), b"N", b"N")),
        "copyreg._reconstructor",
        real=False,
    ),
    Hostile(
        "NEWOBJ of copyreg.__newobj__",
        lambda c: whole(glob("copyreg", "__newobj__"), tup(_touch(c)), b"\x81"),
        "copyreg.__newobj__",
        real=False,
    ),
    Hostile("a partial is called", lambda c: whole(call(call(glob("functools", "partial"), SYSTEM, _touch(c)))), "functools.partial"),
    Hostile(
        "an attrgetter is called",
        lambda c: whole(
            call(call(call(glob("operator", "attrgetter"), text("system")), call(glob("builtins", "__import__"), text("os"))), _touch(c))
        ),
        "operator.attrgetter",
    ),
    Hostile(
        "an object of an unknown class is called",
        lambda c: whole(call(glob(CANARY_MODULE, "Evil") + b")\x81", _touch(c))),
        CANARY_MODULE,
        real=False,
    ),
    Hostile("text is called", lambda c: whole(call(text("os.system"), _touch(c))), "'os.system'", real=False),
    Hostile("a dtype is called", lambda c: whole(call(glob("torch", "float32"), _touch(c))), "float32", real=False),
    Hostile("a storage class is called", lambda c: whole(call(glob("torch", "FloatStorage"), number(1 << 40))), "StorageKind", real=False),
    Hostile("INST of an unknown class", lambda c: f"(i{CANARY_MODULE}\nstrike\n.".encode(), f"{CANARY_MODULE}.strike"),
    Hostile("OBJ of an unknown class", lambda c: b"(" + glob(CANARY_MODULE, "Evil") + b"N" + b"o.", f"{CANARY_MODULE}.Evil"),
]
ALLOWED_WITH_HOSTILE_ARGUMENTS = [
    Hostile(
        "a tensor subclass rebuilt by os.system",
        lambda c: whole(call(FROM_TYPE, SYSTEM, TENSOR_CLASS, tup(_touch(c)), b"N")),
        "os.system",
        real=False,
    ),
    Hostile(
        "a tensor subclass rebuilt by torch.hub.load",
        lambda c: whole(call(FROM_TYPE, glob("torch.hub", "load"), TENSOR_CLASS, tup(text(c)), b"N")),
        "rebuilt by something unknown",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor subclass rebuilt by an unknown function",
        lambda c: whole(call(FROM_TYPE, glob(CANARY_MODULE, "strike"), TENSOR_CLASS, b")", b"N")),
        "rebuilt by something unknown",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor subclass rebuilt by itself",
        lambda c: whole(call(FROM_TYPE, FROM_TYPE, TENSOR_CLASS, b")", b"N")),
        "rebuilt by something unknown",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor subclass that is a function",
        lambda c: whole(call(FROM_TYPE, glob("torch._utils", "_rebuild_tensor_v2"), glob("collections", "OrderedDict"), b")", b"N")),
        "without a class",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor of a class instead of a storage",
        lambda c: whole(tensor(of=glob(CANARY_MODULE, "Evil"))),
        "storage",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a storage of an unknown class",
        lambda c: whole(tup(text("storage"), glob(CANARY_MODULE, "Evil"), text("0"), text("cpu"), number(4)), b"Q"),
        CANARY_MODULE,
        DsconvError,
        real=False,
    ),
    Hostile("a storage whose name leaves the folder", lambda c: whole(storage("../../etc/passwd")), "passwd", MalformedError, real=False),
    Hostile(
        "bytes of a huge number", lambda c: whole(call(glob("builtins", "bytes"), number(1 << 45))), "bytes", MalformedError, real=False
    ),
    Hostile(
        "a bytearray of a huge number",
        lambda c: whole(call(glob("builtins", "bytearray"), number(1 << 45))),
        "bytes",
        MalformedError,
        real=False,
    ),
    Hostile(
        "an OrderedDict of a range",
        lambda c: whole(call(glob("collections", "OrderedDict"), call(glob("builtins", "range"), number(1 << 45)))),
        "pairs",
        MalformedError,
        real=False,
    ),
    Hostile(
        "an OrderedDict of text",
        lambda c: whole(call(glob("collections", "OrderedDict"), text("abcd"))),
        "pairs",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a set of lists", lambda c: whole(call(glob("builtins", "set"), lst(lst()))), "list as a dictionary key", MalformedError, real=False
    ),
    Hostile("a dictionary keyed by a list", lambda c: whole(b"}]Ns"), "list as a dictionary key", MalformedError, real=False),
    Hostile(
        "_codecs.encode into a codec that is a module",
        lambda c: whole(call(glob("_codecs", "encode"), text("x"), _own_name(c))),
        "text",
        MalformedError,
        real=False,
    ),
    Hostile(
        "_codecs.encode into a codec that is an object",
        lambda c: whole(call(glob("_codecs", "encode"), text("x"), glob(CANARY_MODULE, "Evil"))),
        "text",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a torch.Size of an unknown object",
        lambda c: whole(call(glob("torch", "Size"), glob(CANARY_MODULE, "Evil"))),
        "torch.Size",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a torch.Size below zero", lambda c: whole(call(glob("torch", "Size"), lst(number(-1)))), "torch.Size", MalformedError, real=False
    ),
    Hostile(
        "a ZeRO stage by an object",
        lambda c: whole(call(glob("deepspeed.runtime.zero.config", "ZeroStageEnum"), glob(CANARY_MODULE, "Evil"))),
        CANARY_MODULE,
        MalformedError,
        real=False,
    ),
    Hostile(
        "a fragment_address with text",
        lambda c: whole(call(glob("deepspeed.utils.tensor_fragment", "fragment_address"), text("a"), text("b"))),
        "fragment_address",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a plain value made with keywords",
        lambda c: whole(glob("torch", "Size"), b")}", text("x"), b"Ns\x92", protocol=4),
        "keywords",
        MalformedError,
        real=False,
    ),
    Hostile(
        "too few arguments for a tensor",
        lambda c: whole(call(glob("torch._utils", "_rebuild_tensor_v2"))),
        "corrupt",
        MalformedError,
        real=False,
    ),
    Hostile("a call without a tuple", lambda c: whole(glob("collections", "OrderedDict"), b"]R"), "tuple", MalformedError, real=False),
]
HOSTILE = OPCODES + MEMO_TRICKS + FUNCTIONS + DOTTED + INDIRECT + ALLOWED_WITH_HOSTILE_ARGUMENTS


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path that must not come to be; a module that would make it lies on the import path."""
    path = tmp_path / "canary"
    (tmp_path / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE.format(canary=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield path
    assert not path.exists(), "the payload ran"
    assert CANARY_MODULE not in sys.modules
    own = ("dsconv", "zlib_ng", "gzip", "encodings", "_pytest")  # what reading any file may import, the first time
    assert not [name for name in set(sys.modules) - before if not name.startswith(own)]


def test_the_table_is_large_and_its_titles_differ() -> None:
    assert len(HOSTILE) >= 100
    assert len({case.title for case in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.title)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(case: Hostile, canary: Path, tmp_path: Path) -> None:
    program = case.program(str(canary))
    file = write_pt(tmp_path / "hostile.pt", program, _0=bytes(16))
    raw = tmp_path / "hostile.pkl"
    for source, load in ((file, lambda: TorchFile(file)), (raw, lambda: load_raw(program, raw, _persistent))):
        with pytest.raises(case.error) as caught:
            load()
        message = str(caught.value)
        assert message.startswith(f"{source}: data.pkl ") or (case.error is not UnsafeError and message.startswith(f"{source}: "))
        assert case.says in message or (source is raw and b"Q" in program)
        assert caught.value.exit_code == (4 if case.error is UnsafeError else 3)
        assert len(message) < 700
        assert message.isprintable()


def _persistent(pid: object) -> object:
    raise ValueError("no persistent ids here")


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Python's own unpickler falls for the programs marked so: the table above does not test blanks."""
    cases = [case for case in HOSTILE if case.real]
    assert len(cases) >= 40
    for i, case in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE.format(canary=str(folder / "canary")))
        (folder / "program").write_bytes(case.program(str(folder / "canary")))
    # One process for all, a fork a program: what one does to the interpreter does not reach the next.
    runner = f"""
import os, pickle, sys
for i in range({len(cases)}):
    if os.fork() == 0:
        os.chdir(str(i))
        sys.path.insert(0, os.getcwd())
        try:
            pickle.load(open("program", "rb"))
        finally:
            os._exit(0)
    os.wait()
"""
    subprocess.run([sys.executable, "-I", "-c", runner], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    blank = [case.title for i, case in enumerate(cases) if not (tmp_path / str(i) / "canary").exists()]
    assert not blank


INERT = {
    "a class is named": glob(CANARY_MODULE, "Evil"),
    "an object is made by NEWOBJ": glob(CANARY_MODULE, "Evil") + b")\x81",
    "an object is made by NEWOBJ_EX": glob(CANARY_MODULE, "Evil") + b")}\x92",
    "an object has state, which __setstate__ would take": glob(CANARY_MODULE, "Evil") + b")\x81}" + text("a") + number(1) + b"sb",
    "an object has state of another class": glob(CANARY_MODULE, "Evil") + b")\x81" + glob(CANARY_MODULE, "strike") + b"b",
    "a class has state set": glob(CANARY_MODULE, "Evil") + b"}" + text("x") + b"Nsb",
    "an object is made by copyreg": call(glob("copyreg", "_reconstructor"), glob(CANARY_MODULE, "Evil"), glob("builtins", "object"), b"N"),
    "an object is made by __newobj__": call(glob("copyreg", "__newobj__"), glob(CANARY_MODULE, "Evil")),
    "an object takes items of a list": glob(CANARY_MODULE, "Evil") + b")\x81(NNe",
    "an object takes items of a dictionary": glob(CANARY_MODULE, "Evil") + b")\x81(NNu",
    "a function of torch is named": glob("torch.hub", "load"),
    "a path is made": call(glob("pathlib", "PosixPath"), text("/etc/passwd")),
    "a range is made": call(glob("builtins", "range"), number(1 << 60)),
    "a decimal is made": call(glob("decimal", "Decimal"), text("1e999999999")),
}


@pytest.mark.parametrize("title", INERT)
def test_what_only_labels_data_is_accepted_and_nothing_runs(title: str, canary: Path, tmp_path: Path) -> None:
    value = TorchFile(write_pt(tmp_path / "inert.pt", whole(INERT[title]))).root
    assert isinstance(value, (Opaque, OpaqueClass))


def test_a_factory_of_a_defaultdict_is_never_called(canary: Path) -> None:
    value = load_raw(whole(call(glob("collections", "defaultdict"), glob(CANARY_MODULE, "strike")), text("a"), b"Ns"))
    assert value == {"a": None}
    assert type(value) is dict


def test_bytes_after_the_end_are_not_read(canary: Path) -> None:
    assert load_raw(whole(b"N") + call(SYSTEM, _touch(str(canary)))) is None


@pytest.mark.parametrize("module", ["os\x1b[2J", "os\u202e", "tor\ud800ch", "x" * 600, " os", "os\0"])
def test_odd_names_are_refused_and_make_printable_messages(module: str, canary: Path) -> None:
    with pytest.raises((UnsafeError, MalformedError)) as caught:
        load_raw(whole(call(stack_glob(module, "system"), _touch(str(canary))), protocol=4))
    assert str(caught.value).isprintable()
