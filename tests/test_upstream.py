"""Check that the upstream sources of rules have not changed, and that the rules cite what upstream.toml lists."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from tests import upstream

RECORDED = upstream.versions()
# tests/zero_utils/test_config_real.py compares its tables with the installed packages.
TABLES = "dsconv/zero_utils/config_keys.py"


def older(package: str) -> bool:
    """Return whether the installed release is older than the one that the rules were read from."""
    numbers = [re.findall(r"\d+", text)[:3] for text in (metadata.version(package), RECORDED[package])]
    return [int(number) for number in numbers[0]] < [int(number) for number in numbers[1]]


@pytest.mark.parametrize("package", RECORDED)
def test_no_source_of_a_rule_has_changed(package: str) -> None:
    if older(package):
        pytest.skip(f"{package} {metadata.version(package)} is older than {RECORDED[package]}, which the rules are of")
    found = [line for line in upstream.changes() if line.startswith(f"{package}/")]
    assert not found, "\n".join(["Review these, update the rules, then `make upstream ARGS=--accept`:", *found])


def test_every_fact_is_cited_by_a_rule() -> None:
    assert [str(fact) for fact in upstream.facts() if not upstream.citing(fact)] == []


def test_every_citation_is_a_fact() -> None:
    """A citation is a path with a folder, in a docstring or comment, that is a file of one of these packages."""
    known = {(fact.package, fact.file) for fact in upstream.facts()}
    lacking = set()
    for path, text in upstream.rules().items():
        if path == TABLES:
            continue
        for cited in re.findall(r"(?<![\w/])[a-z_]\w*(?:/\w+)+\.py\b", text):
            homes = [(p, cited.removeprefix(f"{p}/")) for p in RECORDED]
            real = [(p, file) for p, file in homes if (upstream.folder_of(p) / file).is_file()]
            if real and not known & set(real):
                lacking.add(f"{path} cites {cited}")
    assert not lacking, "\n".join(sorted(lacking))


def test_no_docstring_repeats_the_version() -> None:
    """Only upstream.toml has the release that a rule was read from. Docstrings may name older releases."""
    repeated = []
    for package, version in RECORDED.items():
        short = version if package == "deepspeed" else version.rpartition(".")[0]
        cited = re.compile(
            rf"\b{package} {re.escape(short)}(?:\.\d+)?\b[^\n]*\.py\b|\({re.escape(version)} ", re.IGNORECASE
        )
        for path, text in upstream.rules().items():
            repeated += [f"{path}: {found.group()}" for found in cited.finditer(text)]
    assert not repeated, "\n".join(repeated)


def test_a_change_names_the_symbol_and_the_rules_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real = upstream.digest_of
    monkeypatch.setattr(
        upstream,
        "digest_of",
        lambda package, file, symbol: (
            "0" * 16 if symbol.endswith("._save_moe_checkpoint") else real(package, file, symbol)
        ),
    )
    (line,) = upstream.changes()
    assert line.startswith("deepspeed/runtime/engine.py DeepSpeedEngine._save_moe_checkpoint: its source changed")
    assert "dsconv/checkpoint/formats/deepspeed/moe/experts.py" in line


def test_a_symbol_that_is_gone_is_named() -> None:
    assert upstream.digest_of("torch", "serialization.py", "_save") != "no such symbol"
    assert upstream.digest_of("torch", "serialization.py", "_saved") == "no such symbol"
    assert upstream.digest_of("torch", "serialisation.py", "_save") == "no such file"


def test_accepting_writes_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = upstream.TABLE.read_text()
    monkeypatch.setattr(upstream, "TABLE", tmp_path / "upstream.toml")
    (tmp_path / "upstream.toml").write_text(re.sub(r'= "[0-9a-f]{16}"', '= "0000000000000000"', before))
    assert list(upstream.changes())
    upstream.accept()
    assert not list(upstream.changes())
    if not any(older(package) for package in RECORDED):
        assert (tmp_path / "upstream.toml").read_text() == before
