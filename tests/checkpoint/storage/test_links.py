"""Which files may be read: links that leave the checkpoint, special files, sizes, and files that change."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from dsconv import merge, open_checkpoint
from dsconv.checkpoint.storage.local import open_for_reading, read_small
from dsconv.checkpoint.storage.roots import PathRoot
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, MissingShardError, UnsafeError
from tests.cli.running import dsconv
from tests.trained import Trained, load_safetensors, same

FULL = torch.arange(12, dtype=torch.float32).view(3, 4)
ZERO3 = "llama_frozen-z3-bf16-w3"
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text(SECRET)
    return tmp_path / "home" / "key"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": FULL}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def moved_away(path: Path, home: Path) -> Path:
    """Move a file elsewhere and put a link in its place."""
    home.mkdir(exist_ok=True)
    target = Path(shutil.move(path, home / path.name))
    path.symlink_to(target)
    return target


def linked_weights(folder: Path, home: Path) -> Path:
    return moved_away(model(folder) / "model.safetensors", home)


def linked_shard(folder: Path, home: Path) -> Path:
    folder.mkdir()
    save_file({"w": FULL}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    return moved_away(folder / "a.safetensors", home)


def linked_index(folder: Path, home: Path) -> Path:
    linked_shard(folder, home)
    shutil.move(home / "a.safetensors", folder / "a.safetensors")
    return moved_away(folder / "model.safetensors.index.json", home)


def linked_bin(folder: Path, home: Path) -> Path:
    folder.mkdir()
    torch.save({"w": FULL}, folder / "pytorch_model.bin")
    return moved_away(folder / "pytorch_model.bin", home)


def linked_twice(folder: Path, home: Path) -> Path:
    """Make a link to a link, the first of which stays in the folder."""
    linked_weights(folder, home)
    (folder / "model.safetensors").rename(folder / "hidden")
    (folder / "model.safetensors").symlink_to("hidden")
    return home / "model.safetensors"


WEIGHTS: dict[str, Callable[[Path, Path], Path]] = {
    "weights": linked_weights,
    "a shard": linked_shard,
    "the index": linked_index,
    "a state dict": linked_bin,
    "a link to a link": linked_twice,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_link_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name](tmp_path / "ckpt", tmp_path / "home")
    with pytest.raises(UnsafeError, match=r"a link that leaves the checkpoint, to .*; .* give --follow-links") as error:
        open_checkpoint(tmp_path / "ckpt")
    assert str(target) in str(error.value)
    found = open_checkpoint(tmp_path / "ckpt", follow_links=True)
    assert same(found["w"].read(), FULL)


def test_every_command_takes_follow_links(tmp_path: Path) -> None:
    linked_weights(tmp_path / "ckpt", tmp_path / "home")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").symlink_to(tmp_path / "ckpt" / "config.json")
    for command, *arguments in (
        ("inspect", "ckpt"),
        ("merge", "ckpt", "merged"),
        ("merge", "ckpt", "other", "--config-from", "config"),
        ("verify", "ckpt", "merged"),
        ("to-dcp", "ckpt", "dcp"),
    ):
        refused = dsconv(command, *arguments, cwd=tmp_path)
        assert refused.code == 4, refused.err
        assert "a link that leaves the checkpoint" in refused.err
        followed = dsconv(command, *arguments, "--follow-links", cwd=tmp_path)
        assert followed.code == 0, followed.err
    assert same(load_safetensors(tmp_path / "other")["w"], FULL)
    assert (tmp_path / "other" / "config.json").is_file()
    linked_weights(tmp_path / "own", tmp_path / "home")
    assert dsconv("to-universal", "own", "universal", cwd=tmp_path).code == 4
    assert "safetensors" in dsconv("to-universal", "own", "universal", "--follow-links", cwd=tmp_path).err


def test_files_of_deepspeed_and_dcp_follow_the_same_rule(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(ZERO3)
    torch.distributed.checkpoint.save({"w": FULL}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    tag = (save_dir / "latest").read_text()
    for folder, name in (
        (save_dir, "latest"),
        (save_dir, f"{tag}/zero_pp_rank_1_mp_rank_00_model_states.pt"),
        (save_dir, f"{tag}/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        (tmp_path / "dcp", ".metadata"),
        (tmp_path / "dcp", "__0_0.distcp"),
    ):
        kept = moved_away(folder / name, tmp_path / "home")
        with pytest.raises(UnsafeError, match=f"{Path(name).name}: a link that leaves the checkpoint"):
            merge(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (folder / name).unlink()
        kept.rename(folder / name)
    shutil.move(save_dir / tag, tmp_path / "home" / tag)
    (save_dir / tag).symlink_to(tmp_path / "home" / tag)
    with pytest.raises(UnsafeError, match="a link that leaves the checkpoint"):
        open_checkpoint(save_dir)
    assert len(open_checkpoint(save_dir, follow_links=True)) > 1


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json", "tokenizer_config.json", "modeling_own.py"])
def test_files_beside_the_weights_follow_the_same_rule(name: str, secret: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "ckpt")
    if name.endswith(".py"):
        (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../home/key")
    with pytest.raises(UnsafeError, match=f"{name}: a link that leaves the checkpoint"):
        merge(folder, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_a_configuration_in_a_parent_folder_follows_the_same_rule(secret: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "run" / "step-5")
    (folder / "config.json").unlink()
    (tmp_path / "run" / "config.json").symlink_to(secret)
    (tmp_path / "by-link").symlink_to(folder)
    for named in (folder, tmp_path / "by-link"):
        with pytest.raises(UnsafeError, match=r"run/config\.json: a link that leaves the checkpoint"):
            merge(named, tmp_path / "out", fsync=False)
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "real.json").write_text("{}")
    (tmp_path / "run" / "config.json").symlink_to("real.json")
    assert merge(folder, tmp_path / "out", fsync=False).sidecars == ["config.json"]


def test_a_loader_reads_no_configuration_through_a_link(secret: Path, tmp_path: Path) -> None:
    from dsconv.loaders.models import config_folder, read_config

    folder = model(tmp_path / "ckpt")
    checkpoint = open_checkpoint(folder)
    assert read_config(checkpoint, config_folder(checkpoint)).model_type == "bert"
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(UnsafeError, match=r"config\.json: a link that leaves the checkpoint"):
        read_config(checkpoint, config_folder(checkpoint))


def test_links_that_the_user_names_and_links_inside_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "real")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "named").symlink_to("real")
    (tmp_path / "named.safetensors").symlink_to("real/weights")
    for path in (folder, tmp_path / "named", tmp_path / "named.safetensors", tmp_path / "named" / "model.safetensors"):
        assert same(open_checkpoint(path)["w"].read(), FULL)
    monkeypatch.chdir(folder)
    assert same(open_checkpoint(".")["w"].read(), FULL)
    monkeypatch.chdir(tmp_path / "named")
    assert same(open_checkpoint("../named")["w"].read(), FULL)


def test_a_snapshot_of_the_cache_reaches_its_own_blobs_only(secret: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = model(repo / "snapshots" / "0123abc")
    (repo / "blobs").mkdir()
    for name, blob in (("model.safetensors", "b1"), ("config.json", "b2")):
        (snapshot / name).rename(repo / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/../blobs/b2")
    for path in (snapshot, snapshot / "model.safetensors"):
        merge(path, tmp_path / "out", fsync=False, force=True)
        assert same(load_safetensors(tmp_path / "out")["w"], FULL)
        assert (tmp_path / "out" / "config.json").is_file()
    (snapshot / "tokenizer.model").symlink_to(secret)
    with pytest.raises(UnsafeError, match=r"tokenizer\.model: a link that leaves the checkpoint"):
        merge(snapshot, tmp_path / "other", fsync=False)
    (snapshot / "tokenizer.model").unlink()
    shutil.move(repo / "blobs", tmp_path / "home" / "blobs")
    (repo / "blobs").symlink_to(tmp_path / "home" / "blobs")
    with pytest.raises(UnsafeError, match="a link that leaves the checkpoint"):
        merge(snapshot, tmp_path / "other", fsync=False)


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def as_folder(path: Path) -> None:
    path.mkdir()


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [as_pipe, as_socket, as_folder, as_device])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """None of these hangs or is taken for weights. Beside real weights they are ignored."""
    folder = model(tmp_path / "ckpt")
    (folder / name).unlink(missing_ok=True)
    monkeypatch.chdir(folder)  # a socket's path is short
    make(Path(name))
    try:
        found = open_checkpoint(folder, follow_links=True)
    except DsconvError:
        assert name == "model.safetensors"
    else:
        assert name != "model.safetensors"
        assert same(found["w"].read(), FULL)
        if name != "config.json":
            assert "config.json" in merge(found, tmp_path / "out", fsync=False).sidecars
        else:
            with pytest.raises(MalformedError, match=r"config\.json: it is a (fifo|device or socket|folder)"):
                merge(found, tmp_path / "out", fsync=False)
            assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointNotFoundError, match="not a regular file"):
        open_for_reading(folder / name)
    with pytest.raises(DsconvError):
        open_for_reading(PathRoot(folder).path / name)


def test_a_shard_that_is_not_a_file_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    os.mkfifo(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    with pytest.raises(MissingShardError):
        open_checkpoint(folder)


def test_small_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * 100)
    assert read_small(path, 100) == b"x" * 100
    with pytest.raises(MalformedError, match=r"config\.json: has 100 bytes; a file of its kind has at most 99"):
        read_small(path, 99)
    os.truncate(path, 3 << 30)  # sparse
    with pytest.raises(MalformedError, match="has 3221225472 bytes"):
        (PathRoot(tmp_path).path / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_configuration_of_gigabytes_is_refused(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "run" / "ckpt")
    shutil.copy(folder / "config.json", folder.parent)  # it would be taken in its place
    (folder / name).touch()
    os.truncate(folder / name, 3 << 30)
    with pytest.raises(MalformedError, match=rf"{name}: it has 3,221,225,472 bytes.*--config-from"):
        merge(folder, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()
    assert merge(folder, tmp_path / "out", config_from=folder.parent, fsync=False).sidecars == ["config.json"]


def test_what_is_not_copied_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = model(tmp_path / "ckpt")
    os.mkfifo(folder / "tokenizer.json")
    (folder / "vocab.txt").symlink_to("nowhere")
    (folder / "tokenizer.model").touch()
    os.truncate(folder / "tokenizer.model", 300_000_000)  # sparse
    (folder / "tokenizer").mkdir()  # of a pipeline of several models: not a file that from_pretrained looks for here
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    os.mkfifo(folder / "modeling_x.py")
    report = merge(folder, tmp_path / "out", fsync=False)
    assert report.sidecars == ["config.json"]
    assert report.sidecars_left_out == {
        "modeling_x.py": "it is a fifo",
        "tokenizer.json": "it is a fifo",
        "tokenizer.model": "it has 300,000,000 bytes, and no file of its kind over 209,715,200",
        "vocab.txt": "it is a link that leads nowhere",
    }
    for name, why in report.sidecars_left_out.items():
        assert f"'{name}' beside the checkpoint is not copied: {why}" in report.warnings
    shown = dsconv("merge", str(folder), str(tmp_path / "again"), "--no-fsync")
    left_out = ", without 'modeling_x.py', 'tokenizer.json', 'tokenizer.model', 'vocab.txt' (the warning says why)"
    assert shown.out.splitlines()[-2].endswith(left_out)  # before why it was not checked whether it loads
    shown = dsconv("merge", str(folder), str(tmp_path / "again"), "--no-fsync", "--force", "--json")
    assert shown.json["sidecars_left_out"] == report.sidecars_left_out


def test_a_shard_that_is_replaced_while_others_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconv.checkpoint.formats.huggingface import safetensors

    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in ("a", "b"):
        save_file({name: FULL}, folder / f"{name}.safetensors")
    save_file({"a": -FULL}, tmp_path / "next")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    read_file = safetensors.read_file_and_metadata

    def replacing(path: Path) -> Any:
        found = read_file(path)
        if path.name == "a.safetensors" and (tmp_path / "next").exists():
            (tmp_path / "next").replace(folder / "a.safetensors")
        return found

    monkeypatch.setattr(safetensors, "read_file_and_metadata", replacing)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(MalformedError, match=r"a\.safetensors: it was written to while it was read"):
        checkpoint["a"].read()
    assert same(checkpoint["b"].read(), FULL)
    with pytest.raises(MalformedError, match=r"a\.safetensors: it was written to while it was read"):
        merge(checkpoint, tmp_path / "out", fsync=False)
    assert same(open_checkpoint(folder)["a"].read(), -FULL)


def test_a_trained_checkpoint_by_a_link(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(trained(ZERO3).checkpoint)
    merge(tmp_path / "named", tmp_path / "out", fsync=False)
    trained(ZERO3).check(load_safetensors(tmp_path / "out"))
