"""Whatever lies in the way of an output, above all links: dsconv touches nothing outside of it and no other files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv.checkpoint.storage.local import kind_of
from dsconv.checkpoint.storage.unfinished import STAGING
from dsconv.convert import marked_folders
from dsconv.convert.staging import open_staging
from dsconv.convert.watch_events import locked_home
from dsconv.engine import checkpoints
from dsconv.engine.checkpoints import State
from dsconv.errors import CheckpointNotFoundError, OutputError
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w3"
CONVERTERS: dict[str, Callable[..., Any]] = {
    "merge": dsconv.merge,
    "to_universal": dsconv.to_universal,
    "to_dcp": dsconv.to_dcp,
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make somebody's folder, which must stay unchanged."""
    (tmp_path / "home" / "inner").mkdir(parents=True)
    for name in ("lock", "moving.json", "started", "thesis.tex", "inner/notes"):
        (tmp_path / "home" / name).write_text("mine")
    return tmp_path / "home"


def state(folder: Path) -> dict[str, tuple[str, int, bytes | str]]:
    """Return the kind, inode and content of everything below a folder."""
    found: dict[str, tuple[str, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        kind = kind_of(path.lstat())
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if kind == "a file" else b""
        found[str(path.relative_to(folder))] = (kind, path.lstat().st_ino, content)
    return found


@pytest.mark.parametrize("name", CONVERTERS)
@pytest.mark.parametrize("force", [False, True])
def test_a_hidden_folder_that_is_a_link(
    name: str, force: bool, home: Path, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STAGING).symlink_to("../home")
    before = state(tmp_path)
    with pytest.raises(OutputError, match=r"\.dsconv-partial is a link, and dsconv keeps a folder of that name there"):
        CONVERTERS[name](trained(CASE).checkpoint, out, force=force)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["merge", "to_universal"])
def test_a_link_in_the_folder_that_is_written_to_by_default(
    name: str, home: Path, copied: Callable[[str], Path]
) -> None:
    """In a download, the hidden folder or even the default output may be a link."""
    save_dir = copied(CASE)
    tag = (save_dir / "latest").read_text().strip()
    out = save_dir / (f"{tag}-fp32" if name == "merge" else f"{tag}_universal")
    out.mkdir()
    (out / STAGING).symlink_to(home)
    before = state(home)
    with pytest.raises(OutputError, match="is a link"):
        CONVERTERS[name](save_dir)
    (out / STAGING).unlink()
    out.rmdir()
    out.symlink_to(home)
    with pytest.raises(OutputError, match=rf"{out.name} is a link, and dsconv writes through none: name the folder"):
        CONVERTERS[name](save_dir)
    assert state(home) == before


def test_nothing_is_cleared_before_the_source_was_opened(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt), open_staging(out, sync=False) as staging:
        staging.write("model.safetensors", b"half")
        kept = shutil.copytree(out, tmp_path / "kept")
        raise KeyboardInterrupt
    shutil.rmtree(out, ignore_errors=True)
    (out / STAGING).mkdir(parents=True)
    inode = (out / STAGING).stat().st_ino
    lock = (kept / STAGING / marked_folders.LOCK).read_text().splitlines()
    lock[0] = f"dsconv made this folder, whose inode is {inode}, and in it:"
    (out / STAGING / marked_folders.LOCK).write_text("\n".join(lock) + "\n")
    (out / STAGING / "model.safetensors").write_bytes(b"half")
    before = state(out)
    with pytest.raises(CheckpointNotFoundError):
        dsconv.merge(tmp_path / "none", out)
    assert state(out) == before
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)  # a replacing run clears what a killed run left
    trained(CASE).check(load_safetensors(out))
    assert not (out / STAGING).exists()


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ({"thesis.tex": "mine"}, "it holds thesis.tex"),
        ({"lock": "mine"}, "it holds lock"),
        ({"lock": "", "thesis.tex": "mine"}, "it holds lock"),
        ({"lock": "dsconv made this folder, whose inode is 1, and in it:\n"}, "it holds lock"),
    ],
)
def test_a_folder_that_dsconv_did_not_make(
    inside: dict[str, str], found: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    for name, text in inside.items():
        (out / STAGING / name).write_text(text)
    before = state(out)
    with pytest.raises(OutputError, match=rf"was not made by dsconv on this disk \({found}\).*: move it away"):
        dsconv.merge(trained(CASE).checkpoint, out, force=True)
    assert state(out) == before


def test_a_lock_with_another_name(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    (tmp_path / "mine").touch()
    (out / STAGING / marked_folders.LOCK).hardlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=r"was not made by dsconv on this disk \(it holds lock\)"):
        dsconv.merge(trained(CASE).checkpoint, out, force=True)
    assert (tmp_path / "mine").read_bytes() == b""


def test_a_killed_runs_folder_that_was_copied_or_used(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_staging(out, sync=False) as staging:
        staging.write("model.safetensors", b"half")
        shutil.copytree(out, tmp_path / "copy")
        (out / STAGING / "notes").write_text("mine")
    assert (out / STAGING / "notes").read_text() == "mine"
    for folder, message in (
        (out, r"\.dsconv-partial/notes was not put there by dsconv"),
        (tmp_path / "copy", "not made"),
    ):
        before = state(folder)
        with pytest.raises(OutputError, match=message):
            dsconv.merge(trained(CASE).checkpoint, folder, force=True)
        assert state(folder) == before
    (out / STAGING / "notes").unlink()
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    assert not (out / STAGING).exists()


def test_links_on_the_way_to_the_output(home: Path, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    before = state(home)
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "dangling").symlink_to("nowhere")
    for out in (tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(
            OutputError, match=rf"{out.name} is a link, .*: name the folder that it leads to, .*/(home|nowh)"
        ):
            dsconv.merge(trained(CASE).checkpoint, out, fsync=False)
    assert state(home) == before
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "link" / "out", fsync=False)  # the user named it
    trained(CASE).check(load_safetensors(home / "out"))


NAMES = ("model.safetensors", "model.safetensors.index.json", "dsconv.manifest.json", "config.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_an_output_name_that_is_not_a_regular_file(
    name: str, kind: str, home: Path, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if kind == "link":
        (out / name).symlink_to("../home/thesis.tex")
    elif kind == "fifo":
        os.mkfifo(out / name)
    else:
        (out / name).mkdir()
        (out / name / "mine").write_text("mine")
    before = state(tmp_path)
    said = {"link": "is a link", "fifo": "is a fifo", "folder": "is a folder"}[kind]
    shards = "5KB" if name.endswith("index.json") else "5GB"
    for force in (False, True):
        with pytest.raises(OutputError, match=rf"{name} {said}"):
            dsconv.merge(
                trained(CASE).checkpoint, out, force=force, max_shard_size=shards, config_from=trained(CASE).checkpoint
            )
        assert state(tmp_path) == before


def test_a_file_with_a_second_name_keeps_its_bytes(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_bytes(b"mine")
    os.link(mine, out / "model.safetensors")
    os.link(mine, out / "dsconv.manifest.json")
    dsconv.merge(trained(CASE).checkpoint, out, fsync=False, force=True)
    assert mine.read_bytes() == b"mine"
    trained(CASE).check(load_safetensors(out))


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_lock_that_is_not_a_file(kind: str, home: Path, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    hidden = tmp_path / "out" / STAGING
    hidden.mkdir(parents=True)
    if kind == "link":
        (hidden / marked_folders.LOCK).symlink_to(home / "thesis.tex")
    else:
        os.mkfifo(hidden / marked_folders.LOCK)
    before = state(tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written to|was not made by dsconv"):
        dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", force=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["extra", "fp32.pt"])
def test_a_link_inside_an_older_output_is_neither_followed_nor_removed(
    name: str, home: Path, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dsconv.to_universal(trained(CASE).checkpoint, out, fsync=False)
    link = next((out / "zero").rglob("fp32.pt")).with_name(name)
    link.unlink(missing_ok=True)
    link.symlink_to(home)
    before = state(tmp_path)
    with pytest.raises(OutputError, match=f"{name} belongs to no universal checkpoint"):
        dsconv.to_universal(trained(CASE).checkpoint, out, fsync=False, force=True)
    assert state(tmp_path) == before


def test_a_pointer_beside_the_output_that_is_a_link(
    home: Path, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    (tmp_path / "latest_universal").symlink_to("home/thesis.tex")
    before = state(home)
    report = dsconv.to_universal(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    assert state(home) == before
    assert (tmp_path / "latest_universal").is_symlink()
    assert any("latest_universal could not be written" in text and "is a link" in text for text in report.warnings)


def test_a_run_that_ends_takes_no_file_of_the_next_one(tmp_path: Path) -> None:
    """The lock is removed last. If another run starts at any step of the clearing, it is refused or gets its own
    folder.
    """
    out = tmp_path / "out"
    real: dict[str, Any] = {name: getattr(os, name) for name in ("unlink", "rmdir")}
    seen: list[str] = []

    def meanwhile(name: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            real[name](path, *args, **kwargs)
            for key, function in real.items():
                setattr(os, key, function)
            try:
                with open_staging(out, sync=False) as other:
                    other.write("model.safetensors", b"whole")
                    seen.append("ran")
                    other.commit(["model.safetensors"], [])
            except OutputError as error:
                seen.append(str(error))
            for key in real:
                setattr(os, key, meanwhile(key))

        return call

    try:
        with open_staging(out, sync=False) as staging:
            for number in range(3):
                staging.write(f"{number}", b"x")
            for name in real:
                setattr(os, name, meanwhile(name))
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    assert any("another dsconv run is writing here" in text for text in seen)
    assert "ran" in seen
    assert (out / "model.safetensors").read_bytes() == b"whole"


def test_a_file_that_cannot_be_marked_ends_the_run(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal count
        if data.startswith(b'"model'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError, match=r"lock: cannot be written: No space left"):
        dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_a_watchers_folder_that_is_a_link(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = state(home)
    (run / ".dsconv-watch").symlink_to(home)
    with pytest.raises(OutputError, match=r"\.dsconv-watch is a link"), locked_home(run, "org/new"):
        pass
    (run / ".dsconv-watch").unlink()
    (run / ".dsconv-watch").mkdir()
    (run / ".dsconv-watch" / "org--new").symlink_to(home)
    with pytest.raises(OutputError, match="org--new is a link"), locked_home(run, "org/new"):
        pass
    (run / ".dsconv-watch" / "org--new").unlink()
    with locked_home(run, "org/new") as found:
        (run / ".dsconv-watch" / "org--new" / "merged").symlink_to(home)
        with pytest.raises(OutputError, match="merged was not put there by dsconv"):
            found.remove_marked("merged")
    assert state(home) == before


def test_the_engine_clears_only_what_it_saved(home: Path, tmp_path: Path) -> None:
    def save(step: int) -> None:
        folder = checkpoints.begin(tmp_path / "run") / checkpoints.tag_of(step)
        folder.mkdir()
        checkpoints.write_state(folder, State(step))
        checkpoints.commit(tmp_path / "run", step, keep=2)

    before = state(home)
    root = tmp_path / "run" / checkpoints.FOLDER
    root.parent.mkdir()
    root.symlink_to(home)
    with pytest.raises(OutputError, match="checkpoints is a link"):
        save(1)
    root.unlink()
    root.mkdir()
    (root / checkpoints.PARTIAL).symlink_to(home)
    with pytest.raises(OutputError, match=r"\.partial is a link"):
        save(1)
    (root / checkpoints.PARTIAL).unlink()
    (root / checkpoints.tag_of(1)).symlink_to(home)
    (root / checkpoints.tag_of(2)).mkdir()
    (root / checkpoints.tag_of(2) / "thesis.tex").write_text("mine")
    for step in (3, 4, 5):
        save(step)
    assert checkpoints.steps(tmp_path / "run") == [1, 2, 4, 5]
    assert (root / checkpoints.tag_of(2) / "thesis.tex").read_text() == "mine"
    with pytest.raises(OutputError, match=r"is no checkpoint of the engine \(no engine.json in it\)"):
        save(2)
    (root / checkpoints.LATEST).unlink()
    (root / checkpoints.LATEST).symlink_to(home / "thesis.tex")
    with pytest.raises(OutputError, match="latest is a link"):
        save(6)
    assert state(home) == before
