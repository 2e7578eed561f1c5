"""Whatever happens to its streams, signals and exceptions, the program ends with one line and an exit code."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from dsconv.cli import commands, console

EVIL = "a\x1b]0;owned\x07\x9b2J\u202e\u2028\nb"
HARMLESS = "a\\x1b]0;owned\\x07\\x9b2J\\u202e\\u2028\\nb"
CLI = Path(commands.__file__).parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({EVIL: numpy.ones(3, "float32"), "模型": numpy.zeros((2, 2), "float32")}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x\\u001b[31m", "dtype": "float32"}')
    return folder


def run(*arguments: str | Path, shell: str = '"$@"', env: Mapping[str, str] | None = None, program: str = "") -> Ran:
    """Run a command line in a shell, which may close streams or turn them into pipes."""
    start = ["-c", program] if program else ["-m", "dsconv"]
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, *start, *map(str, arguments)]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
        preexec_fn=_default_signals,  # noqa: PLW1509 - this process has one thread
    )
    assert "Traceback" not in found.stderr, found.stderr
    return found


def _default_signals() -> None:
    """Reset the signals as for a program started from a terminal. nohup and background jobs ignore them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


Ran = subprocess.CompletedProcess[str]


def test_commands_print_through_the_console_alone() -> None:
    """Text that is printed elsewhere would not be cleaned."""
    for path in CLI.glob("*.py"):
        if path.name in ("console.py", "__init__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("print", "click.echo", "click.secho"), f"{path.name}: {name}"
                assert not name.startswith("sys.stdout"), f"{path.name}: {name}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "rich" not in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"


def test_names_from_files_cannot_steer_the_terminal(model: Path, tmp_path: Path) -> None:
    other = tmp_path / f"other{EVIL}"
    other.mkdir()
    save_file({EVIL: numpy.zeros(3, "float32")}, other / "model.safetensors")
    for arguments, code in (
        (("inspect", model), 0),
        (("merge", model, tmp_path / "out", "--dry-run"), 0),
        (("to-dcp", model, tmp_path / "dcp", "--dry-run"), 0),
        (("verify", model, other), 5),
        (("merge", tmp_path / EVIL), 3),
        (("inspect", other, "--tag", EVIL), 3),
        (("config", tmp_path / EVIL), 3),
        (("estimate", tmp_path / EVIL), 3),
        (("resume", other), 3),
    ):
        found = run(*arguments)
        shown = found.stdout + found.stderr
        assert found.returncode == code, shown
        assert not [char for char in shown if not char.isprintable() and char != "\n"]
        assert HARMLESS in shown or arguments[0] == "config"  # config cuts the path short


def test_json_is_one_object_for_errors_and_usage_too(model: Path, tmp_path: Path) -> None:
    for arguments, code, kind in (
        (("merge", tmp_path / "none"), 3, "CheckpointNotFoundError"),
        (("merge", model, ""), 2, "UsageError"),
        (("merge",), 2, "UsageError"),
        (("merge", model, "--no-such-option"), 2, "UsageError"),
    ):
        found = run(*arguments, "--json")
        assert found.returncode == code
        report = json.loads(found.stdout)
        assert (report["type"], report["exit_code"]) == (kind, code)
        assert report["error"] in found.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_every_encoding_shows_every_name(model: Path, tmp_path: Path, encoding: str) -> None:
    out = tmp_path / encoding
    for arguments in (("merge", model, out, "--no-fsync"), ("inspect", model)):
        command = [sys.executable, "-m", "dsconv", *map(str, arguments)]
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        found = subprocess.run(command, capture_output=True, check=False, env=env)
        assert (found.returncode, b"Traceback" in found.stderr) == (0, False), found.stderr
    if encoding != "utf-8":
        assert b"\\u6a21\\u578b" in found.stdout


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ('"$@" >&-', 0),
        ('"$@" 2>&-', 0),
        ('"$@" <&- >&- 2>&-', 0),
        ('"$@" 2>/dev/full', 0),
        ('"$@" >/dev/full', 3),
        ('"$@" | true', 0),
        ('"$@" 2>&1 | true', 0),
    ],
)
def test_the_model_is_written_whatever_the_streams_are(model: Path, tmp_path: Path, shell: str, code: int) -> None:
    out = tmp_path / "out"
    assert run("merge", model, out, "--no-fsync", shell=shell).returncode == code
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "dsconv.manifest.json", "model.safetensors"]
    assert (out / "model.safetensors").read_bytes()[:1] != b"m"  # nothing that was printed went into the file
    assert run("verify", model, out).returncode == 0


@pytest.mark.parametrize("arguments", [("--help",), ("merge", "--help"), ("--version",), ()])
def test_help_into_a_pipe_that_nobody_reads(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, shell='"$@" | true').returncode == (0 if arguments else 2)


@pytest.mark.parametrize(
    ("number", "module", "code", "word"),
    [
        (signal.SIGINT, "click", 130, "Interrupted"),
        (signal.SIGINT, "dsconv.convert.merge", 130, "Interrupted"),
        (signal.SIGTERM, "click", 143, "Terminated"),
        (signal.SIGHUP, "dsconv.checkpoint", 129, "Terminated"),
    ],
)
def test_a_signal_during_the_imports(
    model: Path, tmp_path: Path, number: signal.Signals, module: str, code: int, word: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"""import os, sys
class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Signal())
"""
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    found = run("merge", model, tmp_path / "out", "--json", env=env)
    assert (found.returncode, found.stderr.count("\n")) == (code, 1)
    assert found.stderr.startswith(word)
    assert json.loads(found.stdout)["exit_code"] == code
    assert not (tmp_path / "out").exists()


BROKEN = """
import sys
from dsconv.cli import main
import dsconv.convert.merge
def merge(*args, **options):
    raise {error}
dsconv.convert.merge.merge = merge
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("TypeError('x\\x1b[2J')", 1, "this is a bug in dsconv: TypeError: x\\x1b[2J ("),
        ("RecursionError('deep')", 1, "this is a bug in dsconv: RecursionError"),
        ("MemoryError()", 3, "not enough memory"),
        ("PermissionError(13, 'Permission denied', '/x')", 3, "/x: Permission denied"),
        ("BrokenPipeError(32, 'Broken pipe')", 3, "Broken pipe"),  # it comes from a connection; stdout is fine
        ("dsconv.errors.UnsafeError('no')", 4, "no"),
        ("dsconv.errors.MismatchError('no')", 5, "no"),
        ("dsconv.errors.RemoteError('https://u:p@h/x?sig=1')", 6, "https://…@h/x?…"),
        ("KeyboardInterrupt()", 130, "Interrupted"),
    ],
)
def test_every_exception_becomes_a_line_and_an_exit_code(
    model: Path, tmp_path: Path, error: str, code: int, says: str
) -> None:
    program = BROKEN.format(error=error)
    found = run("merge", model, tmp_path / "out", program=program, env={"PYTHONIOENCODING": "utf-8"})
    assert (found.returncode, found.stderr.count("\n")) == (code, 1)
    assert says in found.stderr
    assert found.stdout == ""


def test_debug_prints_the_traceback_and_keeps_the_exit_code(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BROKEN.format(error="dsconv.errors.UnsafeError('no')")]
    found = subprocess.run([*command, "merge", str(model), "--debug"], capture_output=True, text=True, check=False)
    assert found.returncode == 4
    assert "Traceback" in found.stderr
    assert found.stderr.endswith("Error: no\n")


def test_a_path_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    model.rename(folder)
    found = run("inspect", folder)
    assert found.returncode == 0
    assert "caf\\xe9" in found.stdout
    assert run("merge", folder, tmp_path / os.fsdecode(b"out\xff"), "--no-fsync").returncode == 0
    assert json.loads(run("inspect", folder, "--json").stdout)["path"] == str(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "model", ""),
        ("merge", "", "out"),
        ("merge", "model", "out", "--tag", ""),
        ("to-universal", ""),
        ("inspect", ""),
        ("push", "", "org/model"),
        ("train", "", "--output-dir", "run", "--steps", "1"),
    ],
)
def test_an_empty_argument_is_a_usage_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    found = run(*arguments, shell=f'cd {tmp_path}; "$@"')
    assert found.returncode == 2
    assert "the value is empty" in found.stderr
    assert not list(tmp_path.iterdir())


def test_sizes_without_a_unit_and_torchs_dtypes(model: Path, tmp_path: Path) -> None:
    found = run("merge", model, tmp_path / "out", "--max-shard-size", "5")
    assert (found.returncode, "5GB" in found.stderr) == (2, True)
    assert run("merge", model, tmp_path / "out", "--dtype", "bfloat16", "--no-fsync").returncode == 0
    assert console.Size().convert("5000000", None, None) == 5_000_000


def test_zero_to_fp32_of_another_checkpoint_says_that_there_are_no_masters(model: Path, tmp_path: Path) -> None:
    found = run("zero-to-fp32", model, tmp_path / "out", "--no-fsync")
    assert found.returncode == 0
    assert "is a safetensors checkpoint, which holds no fp32 masters" in found.stderr
    found = run("zero-to-fp32", model, tmp_path / "out", "--force", "--json", "--no-fsync")
    assert any("no fp32 masters" in warning for warning in json.loads(found.stdout)["warnings"])
    for arguments in (("zero-to-fp32", "--dtype", "fp32"), ("merge",)):
        found = run(arguments[0], model, tmp_path / "out", "--force", "--no-fsync", *arguments[1:])
        assert "masters" not in found.stderr
