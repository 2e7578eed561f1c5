"""The moment in which a new output replaces an older one. Whatever ends the run there, one of the two stays whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.checkpoint.storage import unfinished
from dsconv.convert import staging, writing
from dsconv.errors import OutputError
from tests.crash.jobs import contents
from tests.trained import Trained, load_safetensors

CASE, OLDER = "llama_tied-z3-bf16-w3", "llama_tied-z3-fp32-w1"


@pytest.fixture
def older(trained: Callable[[str], Trained], tmp_path: Path) -> Path:
    """Make a folder that holds another model."""
    dsconv.merge(trained(OLDER).checkpoint, tmp_path / "out", fsync=False)
    return tmp_path / "out"


@pytest.fixture
def undisturbed(trained: Callable[[str], Trained], tmp_path: Path) -> dict[str, bytes]:
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "undisturbed", fsync=False)
    return contents(tmp_path / "undisturbed")


def once(error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``real`` so that its first call raises ``error``."""
    waiting = [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if waiting:
            raise waiting.pop()
        return real(*args, **kwargs)

    return call


def always(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def killed(work: Callable[[], object], at: str) -> None:
    """Run ``work`` in its own process, which is killed at its first call of ``Staging.<at>``."""
    pid = os.fork()
    if pid == 0:
        setattr(staging.Staging, at, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_an_interrupt_or_an_error_in_passing_costs_nothing(
    older: Path, undisturbed: dict[str, bytes], trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", once(KeyboardInterrupt(), staging.Staging.finish))
        with pytest.raises(KeyboardInterrupt):
            dsconv.merge(trained(CASE).checkpoint, older, force=True)
    assert contents(older) == undisturbed
    assert not (older / unfinished.STAGING).exists()
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", once(OSError(errno.EIO, "Input/output error"), staging.Staging.finish))
        dsconv.merge(trained(CASE).checkpoint, older, force=True)
    assert contents(older) == undisturbed


def test_a_disk_that_refuses_to_the_end_keeps_the_output_for_the_next_run(
    older: Path, undisturbed: dict[str, bytes], trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", always(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(
            OutputError,
            match=r"Read-only file system. They are whole, in .*, and the next run into this folder puts them",
        ):
            dsconv.merge(trained(CASE).checkpoint, older, force=True)
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(trained(OLDER).checkpoint, older)
    assert contents(older) == undisturbed
    assert not (older / unfinished.STAGING).exists()


def test_a_model_that_is_merged_into_itself_survives_a_kill(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    killed(lambda: dsconv.merge(out, out, dtype="bf16", force=True), "finish")
    assert not (out / "model.safetensors").exists()
    report = dsconv.merge(out, out, dtype="bf16", force=True)
    assert report.tensors == len(load_safetensors(out))
    trained(CASE).check(load_safetensors(out), torch.bfloat16)


def test_files_that_another_has_put_there_since_are_not_touched(
    older: Path, undisturbed: dict[str, bytes], trained: Callable[[str], Trained]
) -> None:
    killed(lambda: dsconv.merge(trained(CASE).checkpoint, older, force=True), "finish")
    (older / "model.safetensors").write_bytes(b"mine")
    for force in (False, True):
        with pytest.raises(
            OutputError, match=r"already holds a model|since then model\.safetensors was put there by another"
        ):
            dsconv.merge(trained(CASE).checkpoint, older, force=force)
        assert (older / "model.safetensors").read_bytes() == b"mine"
    (older / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(trained(CASE).checkpoint, older)
    assert contents(older) == undisturbed


def test_a_folder_where_a_file_would_go_is_named(older: Path, trained: Callable[[str], Trained]) -> None:
    (older / "config.json").unlink()
    (older / "config.json").mkdir()
    (older / "config.json" / "mine").write_text("mine")
    before = contents(older)
    with pytest.raises(OutputError, match=r"config\.json is a folder, and the output has a file of that name"):
        dsconv.merge(trained(CASE).checkpoint, older, force=True)
    assert contents(older) == before


def test_an_output_that_came_while_this_run_waited_is_not_replaced(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", staging.open_staging

    def meanwhile(target: Path, sync: bool) -> Any:
        monkeypatch.setattr(writing, "open_staging", real)
        dsconv.merge(trained(OLDER).checkpoint, out, max_shard_size="5KB", fsync=False)
        return real(target, sync)

    monkeypatch.setattr(writing, "open_staging", meanwhile)
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(trained(CASE).checkpoint, out)
    trained(OLDER).check(load_safetensors(out))


@pytest.mark.parametrize(
    "moving",
    [
        '["../mine", "x"]',
        '{"gone": {}, "names": {"../mine": [1]}, "there": {}}',
        '{"gone": {"x": ["a"]}, "names": {}, "there": {}}',
        "[]",
        '{"gone": {"mine": [1, 2, 3]}, "names": {"x": [1, 2, 3]}, "there": {}}',
    ],
)
def test_a_list_of_moves_from_elsewhere_takes_nothing_away(
    moving: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    hidden = out / unfinished.STAGING
    hidden.mkdir(parents=True)
    for path in (mine, out / "mine", hidden / unfinished.STARTED, hidden / "x"):
        path.write_text("mine")
    (hidden / unfinished.MOVING).write_text(moving)
    assert json.loads(moving) is not None
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"\.dsconv-partial was not made by dsconv on this disk \(it holds moving"):
        dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in hidden.iterdir()) == [unfinished.MOVING, unfinished.STARTED, "x"]
    shutil.rmtree(hidden)
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    assert (mine.read_text(), (out / "mine").read_text(), hidden.exists()) == ("mine", "mine", False)
    shutil.rmtree(out)
