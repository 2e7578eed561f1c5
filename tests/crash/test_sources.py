"""Sources that change, fail or vanish while they are read; signals; and a second run into the same output."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv.checkpoint.storage import unfinished
from dsconv.convert import marked_folders
from dsconv.errors import DsconvError
from tests.cli.running import held_writes
from tests.crash.jobs import contents
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w3"
LAST = "*zero_pp_rank_2_*optim_states.pt"


@pytest.fixture
def plain(trained: Callable[[str], Trained], tmp_path: Path) -> Path:
    """Make safetensors shards, which have no checksums."""
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "plain", max_shard_size="12KB", fsync=False)
    assert (tmp_path / "plain" / "model-00002-of-00002.safetensors").is_file()
    return tmp_path / "plain"


def when_half_is_copied(happen: Callable[[], object]) -> Callable[[str, int, int], None]:
    """Return a ``progress`` callback that runs an action once the first files have been read."""
    waiting = [happen]

    def progress(phase: str, done: int, total: int) -> None:
        if waiting:
            waiting.pop()()

    return progress


def merged_meanwhile(source: Path, out: Path, happen: Callable[[], object]) -> None:
    dsconv.merge(source, out, fsync=False, workers=1, progress=when_half_is_copied(happen))


def test_a_file_that_is_cut_vanishes_or_is_written_to(
    trained: Callable[[str], Trained], copied: Any, tmp_path: Path
) -> None:
    save_dir = copied(CASE)
    (victim,) = save_dir.rglob(LAST)
    kept = victim.read_bytes()

    def damaged() -> None:
        data = bytearray(kept)
        at = dsconv.open_checkpoint(save_dir)["model.norm.weight"].pieces[-1].extent.offset_bytes
        data[at] ^= 1
        victim.write_bytes(data)

    for happen, error in (
        (
            lambda: os.truncate(victim, len(kept) // 3),
            rf"{victim.name}: truncated: expected \d+ bytes at offset \d+, found",
        ),
        (victim.unlink, f"{victim.name}: no such file"),
        (damaged, rf"{victim.name}: record .* fails its CRC-32 .* or written to while it was read"),
    ):
        with pytest.raises(DsconvError, match=error):
            merged_meanwhile(save_dir, tmp_path / "out", happen)
        assert not (tmp_path / "out").exists()
        victim.write_bytes(kept)
    # The bytes that were read match their checksums, so the output is right.
    merged_meanwhile(save_dir, tmp_path / "out", victim.touch)
    trained(CASE).check(load_safetensors(tmp_path / "out"))


def test_a_file_without_checksums_that_is_written_to(
    trained: Callable[[str], Trained], plain: Path, tmp_path: Path
) -> None:
    """Only the file's size, time and inode reveal the change, so even a touch counts."""
    victim = plain / "model-00002-of-00002.safetensors"

    def put_another_there() -> None:
        shutil.copy(victim, plain / "new")
        (plain / "new").replace(victim)

    for convert in (dsconv.merge, dsconv.to_dcp):
        for happen in (victim.touch, put_another_there):
            with pytest.raises(DsconvError, match=f"{victim.name}: it was written to while it was read: run again"):
                convert(plain, tmp_path / "out", fsync=False, workers=1, progress=when_half_is_copied(happen))
            assert not (tmp_path / "out").exists()
    opened = dsconv.open_checkpoint(plain)
    victim.touch()
    with pytest.raises(DsconvError, match="it was written to while it was read"):
        dsconv.merge(opened, tmp_path / "out", fsync=False)
    dsconv.merge(plain, tmp_path / "out", fsync=False)
    trained(CASE).check(load_safetensors(tmp_path / "out"))


@pytest.mark.parametrize("convert", [dsconv.merge, dsconv.to_dcp, dsconv.to_universal])
def test_the_error_is_the_sources_own(convert: Callable[..., Any], copied: Any, tmp_path: Path) -> None:
    """A vanished file raises an OSError, as a failing disk does, and must not be reported as an error of the output."""
    save_dir = copied(CASE)
    (victim,) = save_dir.rglob(LAST)
    checkpoint = dsconv.open_checkpoint(save_dir)
    if convert is dsconv.to_universal:
        assert checkpoint.training is not None
        training = checkpoint.training()
        checkpoint.training = lambda: training
    victim.unlink()
    with pytest.raises(DsconvError, match=rf"{victim.name}: no such file") as caught:
        convert(checkpoint, tmp_path / "out", fsync=False)
    assert "writing the output" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_read(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = dsconv.open_checkpoint(trained(CASE).checkpoint)
    real, count = os.preadv, 0

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal count
        count += Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith("optim_states.pt")
        if count >= 3:  # two threads read
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(
        DsconvError, match=r"optim_states\.pt: cannot be read: \d+ bytes at offset \d+ failed: Input/output error"
    ):
        dsconv.merge(checkpoint, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_reads_and_writes_that_do_less_than_asked(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[: max(1, len(data) // 3)], at))
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    trained(CASE).check(load_safetensors(tmp_path / "out"))


@contextlib.contextmanager
def interrupted_all_the_time() -> Iterator[list[int]]:
    """Send a signal with a handler every 200 µs, which interrupts system calls (EINTR)."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_signals_that_interrupt_calls(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    with interrupted_all_the_time() as seen:
        dsconv.merge(trained(CASE).checkpoint, tmp_path / "out")
    assert len(seen) > 10
    trained(CASE).check(load_safetensors(tmp_path / "out"))


@pytest.mark.parametrize("command", ["merge", "to-universal", "to-dcp"])
def test_the_second_of_two_processes_at_one_output_refuses(
    command: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source, out = trained(CASE).checkpoint, tmp_path / "home" / "out"
    arguments = [command, str(source), str(out), "--no-fsync", "--quiet"]
    alone = tmp_path / "alone" / "out"
    release = tmp_path / "release"
    first = subprocess.Popen([*held_writes(release), *arguments], stderr=subprocess.PIPE, text=True)
    while not (out / unfinished.STAGING / marked_folders.LOCK).exists():
        time.sleep(0.005)
        assert first.poll() is None
    time.sleep(0.05)
    for force in ([], ["--force"]):
        second = subprocess.run(
            [sys.executable, "-m", "dsconv", *arguments, *force], capture_output=True, text=True, check=False
        )
        assert (second.returncode, first.poll()) == (3, None), second.stderr
        assert "another dsconv run is writing here; wait for it or choose another folder" in second.stderr
    release.touch()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    third = subprocess.run([sys.executable, "-m", "dsconv", *arguments], capture_output=True, text=True, check=False)
    assert (third.returncode, "already holds" in third.stderr) == (3, True)
    subprocess.run(
        [sys.executable, "-m", "dsconv", command, str(source), str(alone), "--no-fsync", "--quiet"], check=True
    )
    assert contents(out) == contents(alone)
