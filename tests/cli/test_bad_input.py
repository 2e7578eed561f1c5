"""Bad input gives one clear error that names the file and says what to do, an exit code, and no partial output."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv import open_checkpoint
from tests.cli.running import dsconv
from tests.trained import Trained, load_safetensors

ZERO3 = "llama_groups-z3-bf16-w3"
ZERO2 = "llama_groups-z2-bf16-w3"
FROZEN3 = "llama_frozen-z3-bf16-w3"
STAGE0 = "llama_groups-z0-bf16-w2"
OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def optimizer(tag: Path, rank: int) -> Path:
    return tag / OPTIMIZER.format(rank)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Load a file with torch, change its object, and save it again under its name."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def truncate(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def flip(path: Path, record: str) -> None:
    """Flip one bit in the middle of a zip record."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(record))
        info = archive.getinfo(name)
        offset = (
            info.header_offset
            + 30
            + int.from_bytes(path.read_bytes()[info.header_offset + 28 :][:2], "little")
            + len(name)
        )
        middle = offset + info.file_size // 2
    data = bytearray(path.read_bytes())
    data[middle] ^= 0x10
    path.write_bytes(bytes(data))


def flip_weight(save_dir: Path, name: str) -> None:
    """Flip one bit in the first byte of a tensor that a merge reads."""
    extent = open_checkpoint(save_dir)[name].pieces[0].extent
    data = bytearray(extent.record.path.read_bytes())
    data[extent.offset_bytes] ^= 0x10
    extent.record.path.write_bytes(bytes(data))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    other = a.with_name("other")
    a.rename(other)
    b.rename(a)
    other.rename(b)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def add_step(state: Any) -> None:
    inner = state["optimizer_state_dict"]
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
    for row in base["state"].values():
        row["step"] = row["step"] + 1


def longer(state: Any) -> None:
    groups = state["optimizer_state_dict"]["fp32_flat_groups"]
    groups[0] = torch.cat([groups[0], torch.zeros(2)])


def rename_parameter(state: Any) -> None:
    shapes = state["param_shapes"][0]
    shapes["somebody.else"] = shapes.pop(next(iter(shapes)))


def extra_parameter(state: Any) -> None:
    state["param_shapes"][0]["one.too.many"] = torch.Size([5, 5])


Damage = Callable[[Path, Path], None]
# name → (checkpoint, damage to (save dir, tag dir), exit code, what stderr must contain)
CASES: dict[str, tuple[str, Damage, int, list[str]]] = {
    "truncated optimizer file": (
        ZERO3,
        lambda s, t: truncate(optimizer(t, 1), 0.6),
        3,
        [OPTIMIZER.format(1), "truncated"],
    ),
    "empty optimizer file": (ZERO3, lambda s, t: truncate(optimizer(t, 2), 0), 3, [OPTIMIZER.format(2), "empty"]),
    "truncated model states": (
        ZERO2,
        lambda s, t: truncate(t / "mp_rank_00_model_states.pt", 0.5),
        3,
        ["mp_rank_00_model_states.pt"],
    ),
    "missing rank": (
        ZERO3,
        lambda s, t: optimizer(t, 1).unlink(),
        3,
        ["says 3 ranks", "rank 1", OPTIMIZER.format(1), "Copy"],
    ),
    "missing rank 0": (ZERO2, lambda s, t: optimizer(t, 0).unlink(), 3, ["rank 0", OPTIMIZER.format(0)]),
    "missing last rank": (ZERO2, lambda s, t: optimizer(t, 2).unlink(), 3, ["rank 2", OPTIMIZER.format(2)]),
    "missing model states": (
        ZERO2,
        lambda s, t: (t / "mp_rank_00_model_states.pt").unlink(),
        3,
        ["mp_rank_00_model_states.pt"],
    ),
    "missing ZeRO-3 model states": (ZERO3, lambda s, t: (t / MODEL3.format(0)).unlink(), 3, [MODEL3.format(0)]),
    "missing frozen fragments": (FROZEN3, lambda s, t: (t / MODEL3.format(2)).unlink(), 3, [MODEL3.format(2)]),
    "no optimizer files": (
        ZERO2,
        lambda s, t: remove(*(optimizer(t, r) for r in range(3))),
        3,
        ["optim_states.pt", "Copy"],
    ),
    "swapped ranks": (ZERO3, lambda s, t: swap(optimizer(t, 0), optimizer(t, 1)), 3, ["rank 1, not 0", "swapped"]),
    "swapped ranks of stage 2": (ZERO2, lambda s, t: swap(optimizer(t, 1), optimizer(t, 2)), 3, ["rank 2, not 1"]),
    "two saves mixed": (ZERO3, lambda s, t: edit(optimizer(t, 1), add_step), 3, ["step 2", "step 3", "two saves"]),
    "two saves mixed, stage 2": (
        ZERO2,
        lambda s, t: edit(optimizer(t, 1), add_step),
        3,
        ["step 2", "step 3", "two saves"],
    ),
    "ranks of unequal length": (ZERO3, lambda s, t: edit(optimizer(t, 1), longer), 3, ["elements", "equal shares"]),
    "parameters of another model": (
        ZERO3,
        lambda s, t: edit(t / MODEL3.format(0), extra_parameter),
        3,
        ["need", "not from one save"],
    ),
    "a parameter that no rank lists": (
        ZERO2,
        lambda s, t: edit(t / "mp_rank_00_model_states.pt", rename_parameter),
        3,
        ["which the model states do not list"],
    ),
    "flipped bit in the masters": (
        ZERO3,
        lambda s, t: flip_weight(s, "model.layers.0.mlp.up_proj.weight"),
        3,
        ["CRC-32", OPTIMIZER.format(0), "damaged"],
    ),
    "flipped bit in the masters of stage 2": (
        ZERO2,
        lambda s, t: flip_weight(s, "model.layers.1.mlp.up_proj.weight"),
        3,
        ["CRC-32", "optim_states.pt", "damaged"],
    ),
    "flipped bit in a frozen weight": (
        FROZEN3,
        lambda s, t: flip_weight(s, "model.layers.0.mlp.up_proj.weight"),
        3,
        ["CRC-32", MODEL3.format(0), "damaged"],
    ),
    "flipped bit in stage 0": (
        STAGE0,
        lambda s, t: flip_weight(s, "model.norm.weight"),
        3,
        ["CRC-32", "mp_rank_00_model_states.pt", "data/"],
    ),
    "flipped bit in the pickle": (ZERO3, lambda s, t: flip(optimizer(t, 0), "data.pkl"), 3, ["data.pkl", "CRC-32"]),
    "text in place of a file": (
        ZERO3,
        lambda s, t: put(optimizer(t, 0), b"moved to s3"),
        3,
        [OPTIMIZER.format(0), "not a torch.save file"],
    ),
    "bare pickle": (ZERO3, lambda s, t: put(optimizer(t, 0), pickle.dumps({"a": 1})), 3, [OPTIMIZER.format(0)]),
    "other content": (
        ZERO3,
        lambda s, t: torch.save({"a": 1}, optimizer(t, 0)),
        3,
        [OPTIMIZER.format(0), "optimizer_state_dict"],
    ),
    "hostile pickle": (
        ZERO3,
        lambda s, t: edit(optimizer(t, 1), lambda state: state.update(x=Evil())),
        4,
        [OPTIMIZER.format(1), "system", "refused", "nothing was run"],
    ),
    "hostile pickle in model states": (
        ZERO2,
        lambda s, t: edit(t / "mp_rank_00_model_states.pt", lambda state: state.update(x=Evil())),
        4,
        ["mp_rank_00_model_states.pt", "system", "refused"],
    ),
    "latest names nothing": (
        ZERO3,
        lambda s, t: put(s / "latest", b"global_step9"),
        3,
        ["global_step9", "--tag", "global_step2"],
    ),
    "latest leaves the folder": (ZERO3, lambda s, t: put(s / "latest", b"../../etc"), 3, ["'../../etc'", "latest"]),
    "latest is not text": (ZERO3, lambda s, t: put(s / "latest", b"\xff\xfe\x00"), 3, ["latest", "not text"]),
    "empty folder": (ZERO3, lambda s, t: shutil.rmtree(t), 3, ["holds no checkpoint"]),
    "a directory in place of a file": (
        ZERO3,
        lambda s, t: replace_by_directory(optimizer(t, 0)),
        3,
        [OPTIMIZER.format(0)],
    ),
    "dangling link": (ZERO3, lambda s, t: replace_by_link(optimizer(t, 0)), 3, [OPTIMIZER.format(0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_checkpoint(name: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    which, damage, code, words = CASES[name]
    save_dir = copied(which)
    damage(save_dir, next(path for path in save_dir.iterdir() if path.is_dir()))
    out = tmp_path / "out"
    result = dsconv("zero-to-fp32", save_dir, out, cwd=tmp_path)
    assert result.code == code, result.err
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err
    assert not result.out
    assert not out.exists()
    assert not (tmp_path / "canary").exists()


def test_no_such_path(tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", tmp_path / "nowhere", tmp_path / "out")
    assert (result.code, result.err) == (3, f"Error: {tmp_path / 'nowhere'}: no such file or folder\n")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    result = dsconv("zero-to-fp32", tmp_path, tmp_path / "out")
    assert result.code == 3
    assert "expected a DeepSpeed checkpoint" in result.err


def test_unreadable_file(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Root can read everything, so a test that runs as root drops its privileges."""
    save_dir = copied(ZERO3)
    for path in (save_dir, *save_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    optimizer(save_dir / "global_step2", 1).chmod(0)
    program = "\n".join([
        "import os, dsconv.convert.merge as merge, dsconv.checkpoint.formats.deepspeed.reader",
        "import dsconv.checkpoint.formats.deepspeed.zero  # now: the interpreter's own files may be root's alone",
        "os.geteuid() or (os.setgroups([]), os.setuid(65534))",
        f"merge.open_checkpoint({str(save_dir)!r})",
    ])  # fmt: skip
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (
        f"MalformedError: {optimizer(save_dir / 'global_step2', 1)}: cannot be read: Permission denied" in result.stderr
    )


def test_unknown_tag_lists_the_others(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "out", "--tag", "global_step7")
    assert result.code == 3
    assert "no checkpoint of tag 'global_step7'; choose one with --tag, or give its folder: global_step2" in result.err


def test_output_exists(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert dsconv("zero-to-fp32", trained(ZERO3).checkpoint, out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = dsconv("zero-to-fp32", trained(ZERO2).checkpoint, out)
    assert result.code == 3
    assert f"{out} already holds a model (model.safetensors); give --force" in result.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert dsconv("zero-to-fp32", trained(ZERO2).checkpoint, out, "--force").code == 0


def test_output_is_a_file(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "out", "--force")
    assert result.code == 3
    assert "is a file" in result.err
    assert (tmp_path / "out").read_text() == "mine"


def test_output_below_a_file(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "file" / "out")
    assert result.code == 3
    assert str(tmp_path / "file" / "out") in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int4"], "int4"),
        (["--max-shard-size", "big"], "'big' is not a size"),
        (["--max-shard-size", "0"], "at least 1 byte"),
        (["--workers", "0"], "workers"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage(options: list[str], words: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "out", *options)
    assert result.code == 2
    assert words in result.err
    assert not (tmp_path / "out").exists()


def test_errors_as_json(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(ZERO3)
    optimizer(save_dir / "global_step2", 1).unlink()
    result = dsconv("zero-to-fp32", save_dir, tmp_path / "out", "--json")
    assert result.code == 3
    assert result.json["type"] == "MissingShardError"
    assert result.json["exit_code"] == 3
    assert OPTIMIZER.format(1) in result.json["error"]


def test_config_from_without_a_config(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "out", "--config-from", tmp_path)
    assert result.code == 3
    assert "--config-from" in result.err
    assert not (tmp_path / "out").exists()


def test_adapter_of_a_model_without_one(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained(ZERO3).checkpoint, tmp_path / "out", "--adapter")
    assert result.code == 3
    assert "no tensor belongs to a PEFT adapter" in result.err


def test_stale_ranks_of_a_larger_world_are_left_aside(
    copied: Callable[[str], Path], trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    save_dir = copied("llama_tied-z2-bf16-w2")
    for rank in (2, 3):
        shutil.copy(
            optimizer(trained("llama_tied-z2-bf16-w4").checkpoint / "global_step2", rank), save_dir / "global_step2"
        )
    result = dsconv("zero-to-fp32", save_dir, tmp_path / "out")
    assert result.code == 0
    assert "ignored 2 optimizer files of rank 2 and above" in result.err
    trained("llama_tied-z2-bf16-w2").check(load_safetensors(tmp_path / "out"))


def test_masters_swapped_to_nvme_are_refused_by_name(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained("wide-z3-bf16-w2-nvme_swapped").checkpoint, tmp_path / "out")
    assert result.code == 3
    assert "offloaded to NVMe" in result.err
    assert "Resume the run with offload_optimizer to cpu" in result.err
    assert not (tmp_path / "out").exists()
