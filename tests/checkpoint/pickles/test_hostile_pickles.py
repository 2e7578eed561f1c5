"""Pickles that try to run code: every one is refused by name, and nothing is run or imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attacks.containers import CONTAINERS, Container, records_of
from attacks.payload import CANARY_MODULE, CANARY_SOURCE, SYSTEM, touch
from attacks.places import Place, places
from attacks.table import HOSTILE, TECHNIQUES
from dsconv import open_checkpoint
from dsconv.checkpoint.pickles.values import Opaque, OpaqueClass
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import DsconvError, MalformedError, UnsafeError
from tests.checkpoint.building import call, glob, load_raw, number, stack_glob, text, whole, write_pt
from tests.fixtures.cases import ALL
from tests.fixtures.gloo import DATA
from tests.trained import Trained

PLACES = [
    "state dict (.bin)",
    "torch's legacy format",
    "model states, stage 0",
    "model states, ZeRO-2",
    "model states, ZeRO-3",
    "optimizer states, ZeRO-1",
    "optimizer states, ZeRO-2",
    "optimizer states, ZeRO-3",
    "pipeline layer",
    "pipeline stage",
    "expert",
    "universal parameter",
    "DCP .metadata",
    "one file a rank",
]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a path that must never exist. A module that would make it lies on the import path."""
    path = tmp_path / "canary"
    (tmp_path / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE.format(canary=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield path
    assert not path.exists(), "the payload ran"
    assert CANARY_MODULE not in sys.modules
    own = ("dsconv", "zlib_ng", "gzip", "encodings", "_pytest")  # reading any file may import these the first time
    assert not [name for name in set(sys.modules) - before if not name.startswith(own)]


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    """Return each kind of file with a pickle, in a copy of a real checkpoint."""
    return {place.title: place for place in places(tmp_path_factory.mktemp("places"))}


def test_the_table_is_large_and_its_titles_differ() -> None:
    assert len(HOSTILE) >= 300
    assert sum(case.real for case in HOSTILE) >= 150
    assert len({case.title for case in HOSTILE}) == len(HOSTILE)
    assert len(TECHNIQUES) >= 9
    assert len(PLACES) >= 14


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(technique: str, canary: Path, tmp_path: Path) -> None:
    for case in TECHNIQUES[technique]:
        program = case.program(str(canary))
        file = write_pt(tmp_path / "hostile.pt", program, _0=bytes(16))
        raw = tmp_path / "hostile.pkl"
        for source, load in ((file, lambda: TorchFile(file)), (raw, lambda: load_raw(program, raw, _persistent))):  # noqa: B023
            with pytest.raises(case.error) as caught:
                load()
            message = str(caught.value)
            assert message.startswith(f"{source}: data.pkl ") or (
                case.error is not UnsafeError and message.startswith(f"{source}: ")
            )
            assert case.says in message or (source is raw and b"Q" in program), case.title
            assert caught.value.exit_code == (4 if case.error is UnsafeError else 3)
            assert len(message) < 700
            assert message.isprintable()
        assert not canary.exists(), case.title


def _persistent(pid: object) -> object:
    raise ValueError("no persistent ids here")


@pytest.mark.parametrize("title", PLACES)
def test_every_program_is_refused_wherever_it_hides(title: str, hiding: dict[str, Place], canary: Path) -> None:
    """The error names the file, whichever file of the checkpoint it is. The sound file is read before and after."""
    place = hiding[title]
    open_checkpoint(place.checkpoint)
    for case in HOSTILE:
        place.poison(case.program(str(canary)))
        with pytest.raises(DsconvError) as caught:
            open_checkpoint(place.checkpoint)
        message = str(caught.value)
        assert str(place.file) in message, f"{case.title}: {message}"
        assert case.says in message or "persistent id" in message, f"{case.title}: {message}"
        assert isinstance(caught.value, UnsafeError) or case.error is not UnsafeError, f"{case.title}: {message}"
        assert not canary.exists(), case.title
    place.heal()
    assert len(open_checkpoint(place.checkpoint)) > 0


@pytest.mark.parametrize("title", ["state dict (.bin)", "model states, ZeRO-3"])
@pytest.mark.parametrize("box", CONTAINERS, ids=lambda box: box.title)
def test_a_program_is_refused_in_whatever_container(
    box: Container, title: str, hiding: dict[str, Place], canary: Path
) -> None:
    place = hiding[title]
    place.file.write_bytes(box.make(records_of(place.sound), whole(call(SYSTEM, touch(str(canary))))))
    with pytest.raises(DsconvError) as caught:
        open_checkpoint(place.checkpoint)
    place.heal()
    assert str(place.file) in str(caught.value)
    assert box.says in str(caught.value)


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Python's own unpickler runs the programs that are marked as real, so the table does not consist of duds."""
    cases = [case for case in HOSTILE if case.real]
    for i, case in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE.format(canary=str(folder / "canary")))
        (folder / "program").write_bytes(case.program(str(folder / "canary")))
    # One process forks for each program, so that no program affects the next. It has imported torch, like any process
    # that loads checkpoints.
    runner = f"""
import os, pickle, sys, torch
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
    subprocess.run(
        [sys.executable, "-I", "-c", runner],
        cwd=tmp_path,
        check=True,
        timeout=120,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    blank = [case.title for i, case in enumerate(cases) if not (tmp_path / str(i) / "canary").exists()]
    assert not blank


def test_a_poisoned_checkpoint_is_whole_to_a_reader_that_runs_it(hiding: dict[str, Place], tmp_path: Path) -> None:
    """The places work too: torch.load runs the program, and still returns the same object."""
    place = hiding["model states, stage 0"]
    before = torch.load(place.file, weights_only=False)["module"]
    place.poison(whole(call(glob("os", "mkdir"), text(str(tmp_path / "made")))))
    after = torch.load(place.file, weights_only=False)["module"]
    place.heal()
    assert (tmp_path / "made").is_dir()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_real_checkpoints_of_every_release_are_accepted(trained: Callable[[str], Trained]) -> None:
    """No checkpoint of DeepSpeed 0.9 to today is taken for an attack or refused for the names in its files."""
    saved = ("native_ops", "old_releases", "old_tensor_parallel")
    kept = sorted(path.parent for name in saved for path in (DATA / name).rglob("truth.json"))
    folders = [Trained(folder) for folder in kept] + [trained(case.name) for case in ALL]
    refused = []
    for made in folders:
        try:
            assert len(open_checkpoint(made.checkpoint)) > 0
        except DsconvError as error:
            refused.append((made.folder.name, type(error).__name__))
    assert len(folders) > 300
    assert set(refused) == {("wide-z3-bf16-w2-nvme_swapped", "UnsupportedError")}


INERT = {
    "a class is named": glob(CANARY_MODULE, "Evil"),
    "an object is made by NEWOBJ": glob(CANARY_MODULE, "Evil") + b")\x81",
    "an object is made by NEWOBJ_EX": glob(CANARY_MODULE, "Evil") + b")}\x92",
    "an object has state, which __setstate__ would take": glob(CANARY_MODULE, "Evil")
    + b")\x81}"
    + text("a")
    + number(1)
    + b"sb",
    "an object has state of another class": glob(CANARY_MODULE, "Evil")
    + b")\x81"
    + glob(CANARY_MODULE, "strike")
    + b"b",
    "a class has state set": glob(CANARY_MODULE, "Evil") + b"}" + text("x") + b"Nsb",
    "an object is made by copyreg": call(
        glob("copyreg", "_reconstructor"), glob(CANARY_MODULE, "Evil"), glob("builtins", "object"), b"N"
    ),
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


@pytest.mark.parametrize("module", ["os\x1b[2J", "os\u202e", "tor\ud800ch", "x" * 600, "\0" * 600, " os", "os\0"])
def test_odd_names_are_refused_and_make_printable_messages(module: str, canary: Path) -> None:
    with pytest.raises((UnsafeError, MalformedError)) as caught:
        load_raw(whole(call(stack_glob(module, "system"), touch(str(canary))), protocol=4))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
