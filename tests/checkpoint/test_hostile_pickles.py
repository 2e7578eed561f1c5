"""Pickles that ask for code to be run: every one is refused by name, nothing runs, nothing is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.payload import CANARY_MODULE, CANARY_SOURCE, SYSTEM, Hostile, touch
from attacks.table import HOSTILE
from dsconv.checkpoint.standins import Opaque, OpaqueClass
from dsconv.checkpoint.torch_file import TorchFile
from dsconv.errors import MalformedError, UnsafeError
from tests.checkpoint.building import (
    call,
    glob,
    load_raw,
    number,
    stack_glob,
    text,
    whole,
    write_pt,
)


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
    assert load_raw(whole(b"N") + call(SYSTEM, touch(str(canary)))) is None


@pytest.mark.parametrize("module", ["os\x1b[2J", "os\u202e", "tor\ud800ch", "x" * 600, " os", "os\0"])
def test_odd_names_are_refused_and_make_printable_messages(module: str, canary: Path) -> None:
    with pytest.raises((UnsafeError, MalformedError)) as caught:
        load_raw(whole(call(stack_glob(module, "system"), touch(str(canary))), protocol=4))
    assert str(caught.value).isprintable()
