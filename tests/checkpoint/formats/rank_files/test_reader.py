"""One file per rank, as verl, accelerate, FSDP1, FSDP2, TP and plain scripts save it: sound sets are merged bit for
bit, and bad ones are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dsconv
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    SeveralModelsError,
    UnsupportedError,
)
from tests.fixtures import gloo
from tests.fixtures.rankfiles import CASES
from tests.trained import Trained, load_safetensors, same

REFUSED = {"partial-w4", "fsdp1-flat-w3", "own-buffers-w3"}
MERGED = {
    "verl-fsdp2-w4": ("global_step_7", "verl rank files", 4),
    "verl-hsdp-w4": ("global_step_7/actor", "verl rank files", 4),
    "verl-fsdp1-mesh-w4": ("global_step_7/actor", "verl rank files", 4),
    "fsdp2-tp-w4": ("", "rank files", 4),
    "hsdp-tp-w4": ("", "rank files", 4),
    "tp-under-ddp-w4": ("", "rank files", 4),
    "everything-w4": ("", "rank files", 4),
    "pipeline-w4": ("", "rank files", 4),
    "fsdp1-sharded-w3": ("", "rank files", 3),
    "accelerate-fsdp2-w3": ("checkpoint-4", "accelerate rank files", 3),
    "accelerate-fsdp1-w3": ("checkpoint-4", "accelerate rank files", 3),
    "verl-one-w1": ("global_step_7/actor", "verl rank files", 1),
    "plain-one-w1": ("", "rank files", 1),
    "fsdp2-tp-uneven-w6": ("", "rank files", 6),
}
Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return gloo.ensure("rankfiles")


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Copy:
    """Return the folder of a copy, which a test may damage."""

    def copy(name: str) -> Path:
        where = MERGED[name][0] if name in MERGED else ""
        shutil.copytree(made[name], tmp_path / name)
        return tmp_path / name / where

    return copy


def test_every_case_is_merged_or_refused() -> None:
    assert set(MERGED) | REFUSED | {"placements-w4"} == set(CASES)


@pytest.mark.parametrize("name", MERGED)
def test_merge_is_bit_exact(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    where, kind, world = MERGED[name]
    trained = Trained(made[name])
    path = made[name] / where / ("pytorch_model_fsdp_1_rank2.bin" if name.startswith("accelerate") else "")
    report = dsconv.merge(path, tmp_path / "out", fsync=False, verify_output=True)
    merged = load_safetensors(tmp_path / "out")
    if name == "verl-fsdp2-w4":  # the weights are tied, in the file too
        assert report.ties == {"head.weight": "embed.weight"}
        merged["head.weight"] = merged["embed.weight"]
    trained.check(merged)
    assert report.format == kind
    assert report.step == (7 if "verl" in name else trained.facts["step"])
    checkpoint = dsconv.open_checkpoint(path)
    assert checkpoint.world == {"ranks": world}
    for key, expected in trained.truth.items():
        assert same(checkpoint[key].read(), expected), key
    assert (report.sidecars == ["config.json"]) == ("verl" in name)
    assert not report.warnings


def test_a_shard_is_read_once_whatever_the_block(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsconv.checkpoint.transfer import copy as copying

    monkeypatch.setattr(copying, "BLOCK_BYTES", 48)
    for name in ("everything-w4", "fsdp2-tp-w4"):
        dsconv.merge(made[name], tmp_path / name, fsync=False)
        Trained(made[name]).check(load_safetensors(tmp_path / name))


def test_replicated_tensors_are_not_laid_end_to_end(made: dict[str, Path]) -> None:
    """verl's merger concatenates everything that is not a DTensor: four copies of ``steps`` give twenty elements."""
    checkpoint = dsconv.open_checkpoint(made["verl-fsdp2-w4"] / "global_step_7")
    assert checkpoint["steps"].shape == (5,)
    assert checkpoint["scale"].shape == ()
    assert torch.equal(checkpoint["steps"].read(), torch.arange(5))
    assert len(checkpoint["steps"].pieces) == 1


def test_one_copy_of_a_replica_is_read(made: dict[str, Path]) -> None:
    checkpoint = dsconv.open_checkpoint(made["verl-hsdp-w4"] / "global_step_7")
    assert [piece.extent.record.path.name for piece in checkpoint["up.weight"].pieces] == [
        "model_world_size_4_rank_0.pt",
        "model_world_size_4_rank_1.pt",
    ]


def test_uneven_shares_keep_padding_in_their_storage_and_none_in_the_output(made: dict[str, Path]) -> None:
    checkpoint = dsconv.open_checkpoint(made["verl-fsdp2-w4"] / "global_step_7")
    pieces = checkpoint["embed.weight"].pieces  # 13 rows: 4 + 4 + 4 + 1
    assert [piece.numel for piece in pieces] == [24, 24, 24, 6]
    assert pieces[-1].extent.record.nbytes == 24 * 4


def refused(path: Path, kind: type[DsconvError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        dsconv.open_checkpoint(path)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 700


def test_placements_and_layouts_without_a_region_are_refused_by_name(made: dict[str, Path]) -> None:
    refused(made["partial-w4"], UnsupportedError, "rank_0.pt", "'g'", "Partial")
    refused(
        made["fsdp1-flat-w3"], UnsupportedError, "pytorch_model_fsdp_rank0.bin", "_flat_param", "SHARDED_STATE_DICT"
    )


def test_plain_tensors_that_differ_are_refused_by_name(made: dict[str, Path]) -> None:
    refused(
        made["own-buffers-w3"], InconsistentCheckpointError, "rank_1.pt", "'1.running_mean'", "rank_0.pt", "BatchNorm"
    )


@pytest.mark.parametrize(
    ("name", "lost", "example"),
    [
        ("verl-fsdp2-w4", "actor/model_world_size_4_rank_2.pt", "model_world_size_4_rank_2.pt"),
        ("fsdp2-tp-w4", "model_rank_0.pt", "model_rank_0.pt"),
        ("fsdp1-sharded-w3", "ckpt_rank_2.pt", "ckpt_rank_2.pt"),
        ("verl-one-w1", "model_world_size_1_rank_0.pt", ""),
    ],
)
def test_a_missing_rank_is_named(name: str, lost: str, example: str, copied: Copy) -> None:
    folder = copied(name)
    (folder / lost).unlink()
    if example:
        refused(folder, MissingShardError, "the files of rank", "are missing", example)
    else:
        refused(folder, CheckpointNotFoundError, str(folder))


@pytest.mark.parametrize("name", ["fsdp2-tp-w4", "fsdp1-sharded-w3"])
def test_swapped_files_are_named(name: str, copied: Copy) -> None:
    folder = copied(name)
    one, two = sorted(folder.glob("*_rank_[12].pt"))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    refused(folder, InconsistentCheckpointError, one.name, "was written by rank 2, but its name says rank 1")


def test_a_file_of_another_world_is_named(copied: Copy) -> None:
    one, four = copied("plain-one-w1"), copied("fsdp2-tp-w4")
    shutil.copy(four / "model_rank_1.pt", one / "rank_1.pt")
    refused(
        one,
        InconsistentCheckpointError,
        "rank_1.pt",
        "mesh [2] of ranks [1, 3]",
        "rank_0.bin on a mesh [1] of ranks [0]",
    )
    three = copied("fsdp1-sharded-w3")
    shutil.copy(four / "model_rank_3.pt", three / "ckpt_rank_3.pt")
    refused(three, InconsistentCheckpointError, "ckpt_rank_3.pt", "ckpt_rank_0.pt on a group of 3 ranks", "another run")
    stages = copied("pipeline-w4")
    shutil.copy(one / "rank_0.bin", stages / "rank_2.bin")
    refused(stages, InconsistentCheckpointError, "rank_2.pt", "rank_2.bin", "both claim rank 2")
    (stages / "rank_2.pt").unlink()
    refused(stages, InconsistentCheckpointError, "rank_2.bin", "was written by rank 0")


def test_a_plain_file_too_many_is_named(copied: Copy) -> None:
    folder = copied("fsdp2-tp-w4")
    torch.save({"scale": torch.tensor(3.5)}, folder / "model_rank_4.pt")
    refused(folder, InconsistentCheckpointError, "model_rank_4.pt", "4 ranks", "left over")


def test_verl_folders_of_two_saves(copied: Copy) -> None:
    """fsdp_config.json tells which save was the last."""
    folder = copied("verl-hsdp-w4")
    for rank in range(2):
        shutil.copy(folder / f"model_world_size_4_rank_{rank}.pt", folder / f"model_world_size_2_rank_{rank}.pt")
    checkpoint = dsconv.open_checkpoint(folder)
    assert checkpoint.info["files"] == "model_world_size_4"
    assert "model_world_size_2" in checkpoint.warnings[0]
    (folder / "fsdp_config.json").write_text("{")
    refused(folder, InconsistentCheckpointError, "2 saves", "model_world_size_2, model_world_size_4", "name a file")
    assert dsconv.open_checkpoint(folder / "model_world_size_4_rank_3.pt").world == {"ranks": 4}
    refused(
        folder / "model_world_size_2_rank_1.pt",
        InconsistentCheckpointError,
        "model_world_size_2_rank_0.pt",
        "its name says 2 ranks",
    )


def resave(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def test_files_that_disagree_are_named(copied: Copy) -> None:
    folder = copied("tp-under-ddp-w4")
    shutil.copy(copied("fsdp2-tp-w4") / "model_rank_1.pt", folder / "model-rank-1.pt")
    refused(folder, InconsistentCheckpointError, "model-rank-1.pt")
    folder = copied("verl-one-w1")
    for rank in (0, 1):
        shutil.copy(folder / "model_world_size_1_rank_0.pt", folder / f"copy_rank_{rank}.pt")
    (folder / "model_world_size_1_rank_0.pt").unlink()
    resave(folder / "copy_rank_1.pt", lambda state: state.update({"scale": torch.tensor([3.5])}))
    refused(
        folder,
        InconsistentCheckpointError,
        "copy_rank_1.pt",
        "'scale' is a plain float32 [1]",
        "copy_rank_0.pt a plain float32 []",
    )


def test_a_tensor_that_one_rank_lacks_is_named(copied: Copy) -> None:
    folder = copied("everything-w4")
    shutil.copy(folder / "save_rank_2.pt", folder / "kept")
    torch.save({"model": {"plain": torch.arange(7)}}, folder / "save_rank_2.pt")
    refused(folder, MissingShardError, "save_rank_2.pt", "lacks 'rows'", "mesh [2, 2] of ranks [0, 1, 2, 3]")


def test_a_file_chooses_one_of_several_models(made: dict[str, Path]) -> None:
    folder = made["accelerate-fsdp1-w3"] / "checkpoint-4"
    refused(
        folder,
        InconsistentCheckpointError,
        "pytorch_model_fsdp_0, pytorch_model_fsdp_1",
        "pytorch_model_fsdp_0_rank0.bin",
    )
    assert dsconv.open_checkpoint(folder / "pytorch_model_fsdp_0_rank1.bin").step == 4


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"lr": 0.1}}])
def test_files_without_tensors_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "rank_0.pt")
    refused(tmp_path, MalformedError, "rank_0.pt")


def test_the_model_in_a_training_state(tmp_path: Path) -> None:
    weight = torch.randn(3)
    torch.save(
        {"rng": torch.get_rng_state(), "optimizer": {"m": weight}, "state_dict": {"w": weight}}, tmp_path / "rank_0.pt"
    )
    checkpoint = dsconv.open_checkpoint(tmp_path)
    assert list(checkpoint) == ["w"]
    assert same(checkpoint["w"].read(), weight)
    assert checkpoint.info["left_out"] == {"optimizer": 1, "rng": 1}
    assert "left out 'optimizer'" in checkpoint.warnings[0]
    torch.save({"rng": torch.get_rng_state(), "net": {"w": weight}}, tmp_path / "rank_0.pt")
    assert same(dsconv.open_checkpoint(tmp_path)["w"].read(), weight)
    torch.save({"net": {"w": weight}, "ema": {"w": -weight}}, tmp_path / "rank_0.pt")
    refused(tmp_path, SeveralModelsError, "rank_0.pt", "'net' (1 tensor), 'ema' (1 tensor)", "--item 'net'")
    assert same(dsconv.open_checkpoint(tmp_path, item="ema")["w"].read(), -weight)


def test_verl_s_actor_and_critic_are_two_models(copied: Copy, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "global_step_3"
    shutil.copytree(copied("verl-one-w1"), folder / "actor")
    assert dsconv.open_checkpoint(folder).step == 3
    shutil.copytree(folder / "actor", folder / "critic")
    refused(folder, SeveralModelsError, "'actor'", "'critic'", "--item")
    assert dsconv.open_checkpoint(folder, item="critic").sources[0].parent.name == "critic"
    with pytest.raises(CheckpointNotFoundError, match="no model is called 'ref'; it holds actor, critic"):
        dsconv.open_checkpoint(folder, item="ref")


def test_a_single_file_may_have_a_number_in_its_name(tmp_path: Path) -> None:
    """lora_rank_16.pt is not the 17th file of a set."""
    weight = torch.randn(3, 2)
    torch.save({"a.lora_A.weight": weight}, tmp_path / "lora_rank_16.pt")
    found = dsconv.open_checkpoint(tmp_path / "lora_rank_16.pt")
    assert found.format == "PyTorch state dict"
    assert same(found["a.lora_A.weight"].read(), weight)
    assert "lora_rank_16.pt was read alone" in found.warnings[0]


def test_other_files_are_not_taken_for_models(tmp_path: Path) -> None:
    for name in (
        "optim_world_size_2_rank_0.pt",
        "extra_state_world_size_2_rank_0.pt",
        "optimizer_0_rank0.bin",
        "crank_0.pt",
        "rank_x.pt",
        "rng_state_rank_0.pt",
        "rank_0.json",
    ):
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, CheckpointNotFoundError, str(tmp_path))


def test_a_damaged_replica_is_found_without_reading_it(copied: Copy) -> None:
    """A copy that is never read is compared by its CRC-32. If its bytes are rotten but the CRC-32 agrees, nothing is
    lost.
    """
    folder = copied("verl-one-w1")
    for rank in (0, 1):
        shutil.copy(folder / "model_world_size_1_rank_0.pt", folder / f"m_rank_{rank}.pt")
    (folder / "model_world_size_1_rank_0.pt").unlink()
    resave(folder / "m_rank_1.pt", lambda state: state["steps"].add_(1))  # type: ignore[attr-defined]
    refused(folder, InconsistentCheckpointError, "m_rank_1.pt", "'steps' differs from the copy in m_rank_0.pt")


def test_copies_that_are_stored_differently_are_compared_by_their_bytes(tmp_path: Path) -> None:
    values = torch.randn(6, 4)
    padded = torch.zeros(9, 4)
    padded[:6] = values
    padded[6:] = 7.0
    torch.save({"w": values, "t": values.t()}, tmp_path / "rank_0.pt")
    torch.save({"w": padded[:6], "t": values.t().contiguous()}, tmp_path / "rank_1.pt")
    other = padded.clone()
    other[6:] = 8.0
    torch.save({"w": other[:6], "t": values.t()}, tmp_path / "rank_2.pt")
    checkpoint = dsconv.open_checkpoint(tmp_path)
    assert same(checkpoint["w"].read(), values)
    assert same(checkpoint["t"].read(), values.t())
    other[0, 0] = 9.0
    torch.save({"w": other[:6], "t": values.t()}, tmp_path / "rank_2.pt")
    refused(tmp_path, InconsistentCheckpointError, "rank_2.pt", "'w' differs")


def test_files_without_checksums_load_with_a_warning(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        for rank in (0, 1):
            torch.save({"w": torch.arange(5)}, tmp_path / f"rank_{rank}.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint = dsconv.open_checkpoint(tmp_path)
    assert "differing copies on the ranks" in checkpoint.warnings[0]


def test_inspect_names_the_format(made: dict[str, Path]) -> None:
    from tests.cli.running import dsconv as command

    ran = command("inspect", made["verl-hsdp-w4"] / "global_step_7", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["format"] == "verl rank files"
    assert json.loads(ran.out)["world"] == {"ranks": 4}
