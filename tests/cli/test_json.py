"""What ``--json`` prints follows the published schema. ``Ran.json`` checks that in all other tests, too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsconv.cli.commands import HOMES, command_of, run
from dsconv.engine.running import RunReport
from dsconv.engine.validation_report import Cell, ValidationReport
from tests import schemas
from tests.cli.running import dsconv as command
from tests.trained import Trained


def test_the_schemas_are_those_of_the_reports() -> None:
    for name, schema in schemas.schemas().items():
        assert schemas.file_of(name).read_text() == schemas.text_of(schema), f"make schemas writes {name} anew"
    assert {path.stem for path in schemas.FOLDER.iterdir()} == {name.replace("/", ".") for name in schemas.schemas()}
    page = (schemas.FOLDER.parent / "json.md").read_text()
    for each in map(command_of, HOMES):
        assert f"`{each.name}`" in page or not any(p.name == "as_json" for p in each.params)
    assert all(f"schemas/{name.replace('/', '.')}.json" in page for name in schemas.schemas())


def test_commands_print_what_their_schema_says(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(trained("llama_frozen-z2-bf16-w2").checkpoint), str(tmp_path / "out")
    lines = (
        ("merge/1", "zero-to-fp32", source, out, "--dtype", "bf16"),
        ("merge/1", "merge", source, out, "--dry-run", "--force"),
        ("to-universal/1", "to-universal", source, str(tmp_path / "universal")),
        ("to-universal/1", "to-universal", source, str(tmp_path / "other"), "--dry-run"),
        ("to-dcp/1", "to-dcp", source, str(tmp_path / "dcp")),
        ("to-dcp/1", "to-dcp", source, str(tmp_path / "other"), "--dry-run"),
        ("to-dcp/1", "to-dcp", source, str(tmp_path / "moved"), "--optimizer"),
        ("inspect/1", "inspect", source, "--values"),
        ("verify/1", "verify", source, out),
        ("diff/1", "diff", source, out),
        ("config/1", "config", "--recipe", "zero1"),
        ("config/1", "config", "--list-recipes"),
        ("config/1", "config", str(tmp_path / "ds.json")),
    )
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "no such key": 1}))
    for name, *arguments in lines:
        run([*arguments, "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert printed["schema"] == f"dsconv.{name}", arguments
        schemas.check(printed)


def test_runs_and_validations_print_what_their_schema_says() -> None:
    """The classes that ``train``, ``resume`` and ``validate`` print; tests of the engine run the commands."""
    ran = RunReport("run", 1, 2, False, False, 0.5, None, "metrics.jsonl", "zero3", 1.0)
    cell = Cell("a", "zero1", "resume", "zero1", "bf16", None, "bitwise", {"why": ["x"]}, 1.0)
    report = ValidationReport("m", 2, 4, 2, None, True, [cell], {"a": {"b": [1.0]}}, {"torch": "2"}, 3.0)
    schemas.check({"schema": "dsconv.train/1", **ran.to_dict()})
    schemas.check({"schema": "dsconv.validate/1", **report.to_dict()})


def test_errors_and_interrupts(tmp_path: Path) -> None:
    assert command("merge", tmp_path, "--json").json["exit_code"] == 3
    assert command("inspect", "--json").json["type"] == "UsageError"
    program = (
        "import os, signal, dsconv.cli as cli, dsconv.cli.commands as commands\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "commands.run = lambda arguments: os.kill(os.getpid(), {})\n"
        "cli.main(['doctor', '--json'])"
    )
    for number, kind, code in (("2", "KeyboardInterrupt", 130), ("15", "Terminated", 143)):
        ran = subprocess.run(
            [sys.executable, "-c", program.format(number)], capture_output=True, text=True, check=False
        )
        printed = json.loads(ran.stdout)
        schemas.check(printed)
        assert (printed["type"], printed["exit_code"], ran.returncode) == (kind, code, code)
