"""The mechanism for trained fixtures: what its cache key covers, and what happens when a case fails."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.fixtures import gloo
from tests.fixtures.ranks import Case, complete

KEPT = (
    "zero",
    "native",
    "autotp",
    "pipeline",
    "moe",
    "universal",
    "universal_mp",
    "dcp",
    "rankfiles",
    "memory",
)


def names_of(maker: str) -> set[str]:
    files, _ = gloo.closure([importlib.import_module(f"tests.fixtures.{maker}").make.__module__])
    return {str(path.relative_to(gloo.REPOSITORY)) for path in files}


def test_the_key_covers_all_that_a_maker_imports() -> None:
    assert names_of("zero") >= {f"tests/fixtures/{name}.py" for name in ("worker", "models", "case")}
    assert names_of("universal_mp") >= {
        f"tests/fixtures/{name}.py" for name in ("universal_mp", "universal", "autotp", "pipeline", "worker", "models")
    }
    _, packages = gloo.closure(["tests.fixtures.dcp"])
    assert {"torch", "transformers", "accelerate", "safetensors"} <= packages


def test_a_new_case_of_the_matrix_trains_itself_alone() -> None:
    assert "tests/fixtures/cases.py" not in names_of("zero")
    assert "tests/fixtures/gloo.py" not in {name for maker in KEPT for name in names_of(maker)}


def test_a_change_of_an_imported_file_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {maker: gloo.root_of.__wrapped__(maker) for maker in ("zero", "universal_mp", "dcp")}
    read = Path.read_bytes
    changed = gloo.REPOSITORY / "tests" / "fixtures" / "models.py"
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b""))
    after = {maker: gloo.root_of.__wrapped__(maker) for maker in before}
    assert {maker for maker in before if before[maker] != after[maker]} == {"zero", "universal_mp"}


def test_a_version_of_a_package_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gloo.root_of.__wrapped__("dcp")
    monkeypatch.setattr(gloo, "version_of", lambda package: "0.0" if package == "accelerate" else "1.0")
    first = gloo.root_of.__wrapped__("dcp")
    monkeypatch.setattr(gloo, "version_of", lambda package: "0.1" if package == "accelerate" else "1.0")
    assert len({before, first, gloo.root_of.__wrapped__("dcp")}) == 3


@pytest.mark.parametrize("maker", KEPT)
def test_the_truth_is_not_dsconvs_own(maker: str) -> None:
    _, packages = gloo.closure([f"tests.fixtures.{maker}"])
    assert "dsconv" not in packages


@pytest.mark.parametrize("maker", KEPT)
def test_options_are_identified_by_their_text(maker: str) -> None:
    """The DONE file holds this text. If it contained an address, the same case would be trained again and again."""
    for case in importlib.import_module(f"tests.fixtures.{maker}").CASES.values():
        assert " at 0x" not in repr(case)


def test_a_case_whose_options_changed_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert not complete(tmp_path, ["one"], {"one": Case(2, "options")})
    (tmp_path / "one" / "DONE").write_text(repr(Case(2, "options")))
    assert complete(tmp_path, ["one"], {"one": Case(2, "options")})
    assert not complete(tmp_path, ["one"], {"one": Case(2, "others")})


def make(name: str, options: str, folder: Path, rank: int) -> None:
    """Run as one rank of the test below, and fail as the options say."""
    if options == "fails" and rank == 1:
        raise ValueError("rank one's own reason")
    (folder / f"rank{rank}").write_text(options)


def test_a_case_that_fails_says_why_and_leaves_the_others_alone(tmp_path: Path) -> None:
    cases = {"first": Case(2, "works"), "second": Case(2, "fails"), "third": Case(2, "works")}
    found = gloo.outcomes("tests.test_fixtures", cases, tmp_path)
    assert (found["first"], found["third"]) == ("", "")
    assert "second, rank 1" in found["second"]
    assert "ValueError: rank one's own reason" in found["second"]
    assert (tmp_path / "third" / "rank1").read_text() == "works"
    with pytest.raises(gloo.FixtureError, match="rank one's own reason"):
        gloo.run("tests.test_fixtures", {"second": cases["second"]}, tmp_path)
