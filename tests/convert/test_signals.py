"""Signals while something is pushed or watched: what is on the Hub is whole or absent, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsconv import merge
from tests.servers.hubwriting import Fault, Shell, WritableHub, contents
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w2"
SECONDS = 60  # for a loaded machine
MOMENTS = {
    "SIGTERM while files are sent": (signal.SIGTERM, "/lfs/verify/", 143),
    "SIGHUP before the files are sent": (signal.SIGHUP, "/preupload/", 129),
    "Ctrl-C while the commit is made": (signal.SIGINT, "/commit/", 130),
}
SAID = {143: "Terminated", 129: "Terminated", 130: "Interrupted"}


def heard() -> None:
    """Let a process hear the signals that a background job and nohup ignore, which it would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(hub: WritableHub, home: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start dsconv with a folder of its own for temporary files."""
    (home / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, **Shell(hub, home).environment, "TMPDIR": str(home / "tmp"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dsconv", *map(str, arguments)], env=environment, cwd=home, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heard,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int) -> None:
    """Wait for a process that a signal ends, and check its code and its one sentence."""
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (code, ""), err
    assert err == f"{SAID[code]}. Every output is complete or absent.\n"


@pytest.mark.parametrize("name", MOMENTS)
def test_a_push_that_a_signal_ends(
    name: str, hub: WritableHub, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    number, request, code = MOMENTS[name]
    folder = tmp_path / "model"
    merge(trained(CASE).checkpoint, folder, max_shard_size="8KB", fsync=False)
    before = contents(folder)
    process = start(hub, tmp_path, "push", folder, "org/new", "--quiet")
    hub.faults = [Fault(request, lambda: process.send_signal(number))]
    ended(process, code)
    assert hub.faults[0].times == 0
    assert contents(folder) == before
    assert list((tmp_path / "tmp").iterdir()) == []
    there = set(contents(hub.head("org/new"))) - {".gitattributes"}
    assert there in (set(), {*before, "README.md"})
    again = start(hub, tmp_path, "push", folder, "org/new", "--quiet")
    assert again.wait(SECONDS) == 0
    pushed = contents(hub.head("org/new"))
    assert {name: pushed[name] for name in before} == before


def test_a_watcher_that_a_signal_ends_while_it_pushes(
    hub: WritableHub, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained(CASE).checkpoint, tmp_path / "run"))
    home = run / ".dsconv-watch" / "org--new"
    watching = ("watch", run, "--push-to-hub", "org/new", "--interval", "0.1")
    process = start(hub, tmp_path, *watching)
    hub.faults = [Fault("/lfs/verify/", lambda: process.send_signal(signal.SIGTERM))]
    ended(process, 143)
    assert list((tmp_path / "tmp").iterdir()) == []
    copies = {path.name for path in home.iterdir()} - {"lock", "state.json"}
    assert len(copies) == 1  # what was merged waits for the next watcher
    assert start(hub, tmp_path, *watching, "--once", "--quiet").wait(SECONDS) == 0
    assert {path.name for path in home.iterdir()} == {"lock", "state.json"}
    trained(CASE).check(load_safetensors(hub.head("org/new")))
