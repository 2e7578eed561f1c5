"""Whole or absent: after an interrupt, on a full disk or beside another run, the output is a whole model or nothing.
Kills are in tests/crash.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv.checkpoint.storage import unfinished
from dsconv.convert import folders, marked_folders, staging
from dsconv.errors import OutputError
from tests.cli.running import slow_writes
from tests.trained import Trained

CASE = "llama_tied-z3-bf16-w3"
SHARD = "5KB"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_removes_its_files(
    number: int, code: int, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*slow_writes(0.2), "zero-to-fp32", str(trained(CASE).checkpoint), str(out), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / unfinished.STAGING).exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not out.exists()


def test_two_runs_on_one_output(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging.open_staging(out, sync=False):
        with pytest.raises(OutputError, match="another dsconv run is writing here"):
            dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
        assert (out / unfinished.STAGING).is_dir()
    assert not out.exists()


def test_a_removed_lock_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for another one to end must not take the lock of a folder that no longer exists."""
    with folders.Folder.open(tmp_path) as parent:
        first = marked_folders.open_marked(parent, "hidden")
        assert first is not None
        with first:
            assert marked_folders.open_marked(parent, "hidden") is None
            real = os.open

            def slow(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
                descriptor = real(path, flags, *args, **kwargs)
                if path == marked_folders.LOCK and (tmp_path / "hidden" / marked_folders.LOCK).exists():
                    first.end()
                return descriptor

            monkeypatch.setattr(os, "open", slow)
            assert marked_folders.open_marked(parent, "hidden") is None
            monkeypatch.undo()
        again = marked_folders.open_marked(parent, "hidden")
        assert again is not None
        again.end()
        again.close()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_found_before_writing(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and the disk has 1,000 free"):
        dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_it_is_written_to(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """A limit on the size of files makes a write fail in the middle of the run."""
    out = tmp_path / "out"
    program = f"import dsconv; dsconv.merge({str(trained(CASE).checkpoint)!r}, {str(out)!r})"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    result = subprocess.run(
        [sys.executable, "-B", "-c", program], capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert "OutputError" in result.stderr.splitlines()[-1]
    assert "File too large" in result.stderr
    assert not out.exists()


def test_a_real_disk_that_is_too_small(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """The disk is a tmpfs of one page, if this process may mount one. The free space is checked before anything is
    written.
    """
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        return  # not root, or in a sandbox; the two tests above cover the same code
    try:
        with pytest.raises(OutputError, match="the disk has 8,192 free"):
            dsconv.merge(trained(CASE).checkpoint, small / "out")
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_source_that_shrinks_during_the_run(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    checkpoint = dsconv.open_checkpoint(save_dir)
    victim = next(save_dir.rglob("bf16_zero_pp_rank_1_*"))
    os.truncate(victim, victim.stat().st_size // 3)
    with pytest.raises(dsconv.DsconvError, match=rf"{victim.name}: truncated"):
        dsconv.merge(checkpoint, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_files_of_others_in_the_output_folder_stay(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False, max_shard_size=SHARD, force=True)
    assert (out / "notes.md").read_text() == "mine"
    assert not (out / "model.safetensors").exists()  # left by the run before
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
