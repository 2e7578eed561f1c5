"""Shards of DCP's HuggingFaceStorageWriter are merged bit for bit, even where torch's consolidation loses tensors."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

import dsconv
from dsconv.errors import DsconvError, InconsistentCheckpointError, MalformedError, MissingShardError
from tests.fixtures.dcp import CASES
from tests.fixtures.gloo import ensure
from tests.trained import Trained, load_safetensors, same

FOLDERS = [name for name in CASES if name.startswith("hf")]


@functools.cache
def made(name: str) -> Trained:
    return Trained(ensure("dcp")[name])


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made(name).checkpoint, tmp_path / "broken"))


@pytest.mark.parametrize("name", FOLDERS)
def test_merge_is_bit_exact(name: str, tmp_path: Path) -> None:
    case = made(name)
    report = dsconv.merge(case.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    case.check(load_safetensors(tmp_path / "out"))
    assert report.format == "DCP (safetensors)"
    checkpoint = dsconv.open_checkpoint(case.checkpoint)
    assert checkpoint.world == {"ranks": CASES[name].world}
    has_config = (case.checkpoint / "config.json").exists()
    assert [w.split(":")[0].endswith("no config.json names a size to compare") for w in report.warnings] == (
        [] if has_config else [True]
    )


@pytest.mark.parametrize("name", ["hf_transformers-w4", "hf_consolidated-w3"])
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(same(model.state_dict()[tensor], expected) for tensor, expected in made(name).truth.items())


# What torch's own consolidation does with the same files --------------------------------------------------------------


def consolidated(shards: Path, out: Path) -> dict[str, torch.Tensor]:
    names = {name: 1 for file in shards.glob("shard-*") for name in load_safetensors(file)}
    out.mkdir()
    consolidate_safetensors_files(str(shards), str(out), names)
    return load_safetensors(out)


def save_whole(state: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "value", [torch.tensor(2.5), torch.tensor(7), torch.tensor([True, False]), torch.arange(5, dtype=torch.int16)]
)
def test_tensors_that_torch_loses(value: torch.Tensor, tmp_path: Path) -> None:
    """torch 2.13 writes 0.0 for a tensor without dimensions, and fails on integers and bools."""
    shards = save_whole({"value": value, "w": torch.randn(3)}, tmp_path / "shards")
    if value.is_floating_point():
        assert not same(consolidated(shards, tmp_path / "theirs")["value"], value)
    else:
        with pytest.raises(TypeError):
            consolidated(shards, tmp_path / "theirs")
    assert same(dsconv.open_checkpoint(shards)["value"].read(), value)


def test_a_missing_shard_is_not_zeros(broken: Callable[[str], Path], tmp_path: Path) -> None:
    """The middle rank's shard is missing. torch 2.13 leaves zeros in its rows; dsconv raises an error."""
    folder = broken("hf_transformers-w4")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    theirs = consolidated(folder, tmp_path / "theirs")["lm_head.weight"]
    assert theirs.shape == (61, 24)
    assert not theirs[16:32].any()
    with pytest.raises(InconsistentCheckpointError, match=r"tensor '.*' in .*shard-0000.*: a hole"):
        dsconv.open_checkpoint(folder)


# A lost last shard looks like a smaller model -------------------------------------------------------------------------


def test_a_lost_last_shard_is_seen_against_config_json(broken: Callable[[str], Path]) -> None:
    folder = broken("hf_transformers-w4")
    (folder / "shard-00004-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(
        MissingShardError,
        match=r"ends at \[\d+(, \d+)?\], and .*config.json says \[\d+(, \d+)?\]: the last rank's shards",
    ):
        dsconv.open_checkpoint(folder)
    (folder / "config.json").unlink()
    assert "a lost last shard would not be noticed" in dsconv.open_checkpoint(folder).warnings[0]


def test_a_lost_last_shard_is_seen_against_an_index(broken: Callable[[str], Path]) -> None:
    folder = broken("hf_consolidated-w3")
    (folder / "config.json").unlink()
    (folder / "sharded" / "shard-00003-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(MissingShardError, match=r"the shards hold \d+ bytes of weights, .*index.json says \d+"):
        dsconv.open_checkpoint(folder)


def test_the_shards_are_read_and_not_what_torch_made_of_them(broken: Callable[[str], Path]) -> None:
    folder = broken("hf_consolidated-w3")
    checkpoint = dsconv.open_checkpoint(folder)
    assert checkpoint.info == {"read": "sharded/"}
    assert {path.parent.name for path in checkpoint.sources} == {"sharded"}
    for path in folder.glob("model*"):
        path.unlink()
    assert len(dsconv.open_checkpoint(folder)) == len(checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        b"{",
        b"[]",
        b'{"vocab_size": "many"}',
        b'{"vocab_size": 99, "hidden_size": 24, "text_config": {"hidden_size": 3}}',
    ],
)
def test_a_config_without_useful_sizes(config: bytes, broken: Callable[[str], Path]) -> None:
    folder = broken("hf_transformers-w4")
    (folder / "config.json").write_bytes(config)
    assert "a lost last shard would not be noticed" in dsconv.open_checkpoint(folder).warnings[0]


def test_padded_embeddings_are_accepted(broken: Callable[[str], Path]) -> None:
    folder = broken("hf_transformers-w4")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 60}
    (folder / "config.json").write_text(json.dumps(config))
    assert not dsconv.open_checkpoint(folder).warnings


# Broken ---------------------------------------------------------------------------------------------------------------


def again(file: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    """Save a shard again with other metadata or tensors."""
    with safe_open(file, framework="pt") as old:
        about = dict(old.metadata())
        state = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
    save_file(state | tensors, file, metadata=about if metadata is None else metadata)


SHARD = "shard-00002-model-00001-of-00002.safetensors"


def no_info(folder: Path) -> None:
    again(folder / SHARD, {"format": "pt"})


def bad_info(folder: Path) -> None:
    again(folder / SHARD, {"DCP_SHARDING_INFO": "{"})


def bad_offsets(folder: Path) -> None:
    with safe_open(folder / SHARD, framework="pt") as old:
        info = json.loads(old.metadata()["DCP_SHARDING_INFO"])
    info[min(info)]["saved_offsets"] = [-1]
    again(folder / SHARD, {"DCP_SHARDING_INFO": json.dumps(info)})


def unplaced(folder: Path) -> None:
    again(folder / SHARD, extra=torch.zeros(3))


def other_dtype(folder: Path) -> None:
    with safe_open(folder / SHARD, framework="pt") as old:
        name = next(name for name in old.keys() if "weight" in name)  # noqa: SIM118
        value = old.get_tensor(name)
    again(folder / SHARD, **{name: value.double()})


def no_part(folder: Path) -> None:
    for path in folder.glob("*-model-00002-of-*"):
        path.unlink()


def two_saves(folder: Path) -> None:
    (folder / SHARD).rename(folder / SHARD.replace("of-00002", "of-00003"))


def twice(folder: Path) -> None:
    shutil.copyfile(folder / SHARD, folder / SHARD.replace("00002-model", "00004-model"))


def truncated(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-4])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (no_info, MalformedError, "no DCP_SHARDING_INFO in its metadata"),
        (bad_info, MalformedError, "DCP_SHARDING_INFO is not JSON"),
        (bad_offsets, MalformedError, r"DCP_SHARDING_INFO places .* at \[-1\]"),
        (unplaced, MalformedError, "DCP_SHARDING_INFO places 'extra' of .* at None"),
        (other_dtype, InconsistentCheckpointError, r"shards from two saves"),
        (no_part, MissingShardError, "part 00002 of the model has no shard"),
        (two_saves, InconsistentCheckpointError, "shards of models in 2 and in 3 parts"),
        (twice, InconsistentCheckpointError, "an overlap"),
        (truncated, MalformedError, "truncated"),
    ],
)
def test_bad_shards_are_refused(
    change: Callable[[Path], None], error: type[DsconvError], words: str, broken: Callable[[str], Path]
) -> None:
    folder = broken("hf-w3")
    change(folder)
    with pytest.raises(error, match=f"{folder}.*{words}"):
        dsconv.open_checkpoint(folder)
