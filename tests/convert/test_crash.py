"""Whole or absent: killed, interrupted, out of space or beside another run, the output is a model or is nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dsconv
from dsconv.convert import staging
from dsconv.errors import OutputError
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w3"
SHARD = "5KB"
# Kill this process at the n-th system call that changes the output: SIGKILL, as a machine that dies or an OOM killer does.
KILL_AT = """
import os, signal, sys, pathlib
left = int(sys.argv[1])
def count(function):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted
for name in ("open", "truncate", "pwrite", "fsync", "fdatasync", "replace", "rename", "unlink", "mkdir", "rmdir"):
    setattr(os, name, count(getattr(os, name)))
import dsconv
dsconv.merge(sys.argv[2], sys.argv[3], max_shard_size=sys.argv[4], workers=1, force=sys.argv[5] == "force")
print(left)
"""


def merge_and_die(at: int, source: Path, out: Path, force: bool = False) -> subprocess.CompletedProcess[str]:
    arguments = [str(at), str(source), str(out), SHARD, "force" if force else "no"]
    return subprocess.run([sys.executable, "-c", KILL_AT, *arguments], capture_output=True, text=True, check=False)


def looks_like_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_anywhere_it_is_whole_or_absent_and_the_next_run_completes_it(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(CASE)
    whole = tmp_path / "whole"
    far = 100_000
    done = merge_and_die(far, made.checkpoint, whole)
    assert done.returncode == 0, done.stderr
    calls = far - int(done.stdout)
    assert calls > 40
    expected = contents(whole)
    survived = 0
    # Every call near the end, where files are moved into place, and every fourth before.
    for at in [*range(1, calls - 30, 4), *range(calls - 30, calls + 1)]:
        out = tmp_path / str(at)
        assert merge_and_die(at, made.checkpoint, out).returncode == -signal.SIGKILL
        if looks_like_a_model(out):
            made.check(load_safetensors(out))
            survived += 1
        else:
            dsconv.merge(made.checkpoint, out, max_shard_size=SHARD, workers=1, fsync=False)
            assert contents(out) == expected
    assert 0 < survived < 10  # only once the index is in place


def test_killed_while_replacing_a_model(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """The old model is there until the new one is complete; in between, while files move, nothing looks like a model."""
    made, old = trained(CASE), trained("llama_tied-z3-fp32-w1")
    far = 100_000
    dsconv.merge(old.checkpoint, tmp_path / "count", fsync=False)
    calls = far - int(merge_and_die(far, made.checkpoint, tmp_path / "count", force=True).stdout)
    seen = set()
    for at in range(calls - 45, calls + 1, 2):
        out = tmp_path / str(at)
        dsconv.merge(old.checkpoint, out, fsync=False)
        merge_and_die(at, made.checkpoint, out, force=True)
        if (out / "model.safetensors").is_file():
            old.check(load_safetensors(out / "model.safetensors"))
            seen.add("old")
            with pytest.raises(OutputError, match="already holds a model"):
                dsconv.merge(made.checkpoint, out, fsync=False)
        elif looks_like_a_model(out):
            made.check(load_safetensors(out))
            seen.add("new")
        else:
            dsconv.merge(made.checkpoint, out, fsync=False)
            made.check(load_safetensors(out))
            seen.add("neither")
    assert seen == {"old", "new", "neither"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_takes_its_files_away(number: int, code: int, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = """
    import os, sys, time
    real = os.pwrite
    def pwrite(*args):
        time.sleep(0.2)
        return real(*args)
    os.pwrite = pwrite
    from dsconv.cli import main
    main(sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(slow), "zero-to-fp32", str(trained(CASE).checkpoint), str(out), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / staging.STAGING).exists():
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
        assert (out / staging.STAGING).is_dir()
    assert not out.exists()


def test_a_lock_that_was_taken_away_is_no_lock(tmp_path: Path) -> None:
    """A run that waits at the door of one that ends must not take the lock of a folder that is gone."""
    path = tmp_path / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        path.unlink()
        path.touch()
        assert not staging._locked(descriptor, path)
    finally:
        os.close(descriptor)


def test_a_full_disk_is_found_before_writing(trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and the disk has 1,000 free"):
        dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_it_is_written_to(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """A limit on the size of files makes the system refuse a write in the middle of the run."""
    out = tmp_path / "out"
    program = f"import dsconv; dsconv.merge({str(trained(CASE).checkpoint)!r}, {str(out)!r})"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    result = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert "OutputError" in result.stderr.splitlines()[-1]
    assert "File too large" in result.stderr
    assert not out.exists()


def test_a_real_disk_that_is_too_small(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """A tmpfs of one page, where this process may mount one; the space is counted before anything is written."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True, check=False).returncode:
        return  # not root, or a sandbox: the two tests above cover the same code
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
    assert not (out / "model.safetensors").exists()  # of the run before
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
