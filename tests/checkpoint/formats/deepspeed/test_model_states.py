"""Model states: names without wrappers, missing weights, and fields with wrong values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.errors import DsconvError, MissingShardError, UnsupportedError, UsageError
from tests.fixtures import gloo
from tests.fixtures.realistic import CASES
from tests.trained import Trained, load_safetensors, same

WRAPPED = [name for name, case in CASES.items() if case.options.wrap]
CIRCLE = {"x": "a", "a": "b", "b": "c", "c": "a"}
WRONG: list[tuple[str, Any]] = [
    ("shared_params", CIRCLE), ("shared_params", [1, 2]), ("shared_params", 5), ("shared_params", {"a": 1}),
    ("shared_params", [["a", "b", "c"]]), ("buffer_names", 5), ("buffer_names", [1]), ("param_shapes", 5),
    ("param_shapes", [5]), ("param_shapes", [{"a": 5}]), ("param_shapes", [{"a": (-1,)}]), ("module", 5),
    ("module", {1: torch.zeros(1)}), ("frozen_param_shapes", 5), ("frozen_param_fragments", 5),
    ("dp_world_size", "two"), ("mp_world_size", [1]), ("mp_world_size", -1), ("global_steps", "five"),
    ("ds_version", 5),
    ("universal_checkpoint_info", 5), ("ds_autoep_layers", 5), ("num_experts", 5),
]  # fmt: skip
WRONG_OPTIMIZER: list[tuple[str, Any]] = [
    ("partition_count", "two"), ("partition_count", [0]), ("partition_count", []), ("zero_stage", [2]),
    ("single_partition_of_fp32_groups", 5), ("single_partition_of_fp32_groups", [5]), ("param_slice_mappings", 5),
    ("param_alignment_paddings", 5), ("base_optimizer_state", 5),
    ("base_optimizer_state", {"state": {}, "param_groups": 5}),
    ("base_optimizer_state", {"state": {}, "param_groups": [{"params": 5}]}),
]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Callable[[str], Trained]:
    folders = gloo.ensure("realistic")
    return lambda name: Trained(folders[name])


@pytest.mark.parametrize("name", WRAPPED)
def test_names_are_those_of_the_model_without_wrappers(
    made: Callable[[str], Trained], name: str, tmp_path: Path
) -> None:
    report = dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    made(name).check(load_safetensors(tmp_path / "out"))
    assert not report.warnings
    checkpoint = dsconv.open_checkpoint(made(name).checkpoint)
    frozen = {key for key in made(name).truth if key.startswith(CASES[name].options.frozen or ("nothing",))}
    assert {key for key, entry in checkpoint.items() if entry.role == "frozen"} == frozen
    assert checkpoint.info["removed_prefixes"]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_universal_checkpoint_keeps_the_names_that_the_trainer_looks_for(
    made: Callable[[str], Trained], name: str, tmp_path: Path
) -> None:
    dsconv.to_universal(made(name).checkpoint, tmp_path / "universal", fsync=False)
    folders = {path.parent.name for path in (tmp_path / "universal" / "zero").glob("*/exp_avg.pt")}
    wrappers = {"checkpoint": ["_checkpoint_wrapped_module."], "compile": ["_orig_mod."]}
    # Stage 0 saves the state dict's names, from which activation checkpointing removes its own part.
    expected = wrappers["compile"] if name == "wrapped-z0" else wrappers[CASES[name].options.wrap]
    assert all(all(part in folder for part in expected) for folder in folders if "blocks." in folder)
    found = {key: entry.read() for key, entry in dsconv.open_checkpoint(tmp_path / "universal").items()}
    made(name).check(found)


@pytest.mark.parametrize("name", ["excluded-z2", "excluded-z3"])
def test_missing_frozen_weights_are_reported(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    report = dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False)
    assert [text for text in report.warnings if "frozen are not in the checkpoint" in text]
    trained = {key: value for key, value in made(name).truth.items() if not key.startswith("blocks.0.")}
    found = load_safetensors(tmp_path / "out")
    assert set(found) == set(trained)
    assert all(same(found[key], value) for key, value in trained.items())


def test_tensors_that_no_list_names_are_not_called_frozen(made: Callable[[str], Trained], tmp_path: Path) -> None:
    folder = damaged(made("compiled-z1"), tmp_path, {})
    path = next(folder.glob("*/mp_rank_00_model_states.pt"))
    states = torch.load(path, weights_only=False)
    states["module"] = {f"odd_wrapper.{name}": value for name, value in states["module"].items()}
    torch.save(states, path)
    checkpoint = dsconv.open_checkpoint(folder)
    assert not [entry for entry in checkpoint.values() if entry.role == "frozen"]
    assert [text for text in checkpoint.warnings if "odd_wrapper." in text and "16-bit copy" in text]


def damaged(made: Trained, tmp_path: Path, fields: dict[str, Any], pattern: str = "mp_rank_00_model_states.pt") -> Path:
    """Return a copy of a save dir with other ``fields`` in its model states, or in the files that match ``pattern``."""
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "copy"))
    for path in folder.glob(f"*/{pattern}"):
        states = torch.load(path, weights_only=False)
        states.get("optimizer_state_dict", states).update(fields)
        torch.save(states, path)
    return folder


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_the_wrong_type(made: Callable[[str], Trained], field: str, value: Any, tmp_path: Path) -> None:
    folder = damaged(made("two-z2-bf16"), tmp_path, {field: value})
    with pytest.raises(DsconvError) as caught:
        dsconv.open_checkpoint(folder)
    assert caught.value.exit_code == 3
    assert "mp_rank_00_model_states.pt" in str(caught.value)
    assert field in str(caught.value) or field == "num_experts"


@pytest.mark.parametrize(("field", "value"), WRONG_OPTIMIZER)
def test_a_field_of_an_optimizer_file_of_the_wrong_type(
    made: Callable[[str], Trained], field: str, value: Any, tmp_path: Path
) -> None:
    folder = damaged(made("two-z2-bf16"), tmp_path, {field: value}, "bf16_zero_pp_rank_0_*")
    with pytest.raises(DsconvError) as caught:
        dsconv.to_universal(folder, tmp_path / "out", fsync=False)
    assert caught.value.exit_code == 3
    assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" in str(caught.value)


def test_the_model_s_own_weights_without_optimizer_files(made: Callable[[str], Trained], tmp_path: Path) -> None:
    folder = damaged(made("wrapped-z2"), tmp_path, {})
    for path in folder.glob("*/*optim_states.pt"):
        path.unlink()
    with pytest.raises(MissingShardError, match="--weights 16bit"):
        dsconv.open_checkpoint(folder)
    checkpoint = dsconv.open_checkpoint(folder, weights="16bit")
    module = load_safetensors(made("wrapped-z2").folder / "truth_module.safetensors")
    assert {name: str(entry.dtype) for name, entry in checkpoint.items()} == dict.fromkeys(module, "bfloat16")
    assert all(same(checkpoint[name].read(), value) for name, value in module.items())
    assert {name for name, entry in checkpoint.items() if entry.role == "frozen"} == {
        name for name in module if name.startswith("blocks.0.")
    }
    assert checkpoint.format == "ZeRO-2, 16-bit weights"
    with pytest.raises(UnsupportedError, match="--weights 16bit"):
        dsconv.to_universal(checkpoint, tmp_path / "universal")


def test_zero3_has_no_16_bit_weights_to_take(made: Callable[[str], Trained]) -> None:
    with pytest.raises(UnsupportedError, match="ZeRO-3 keeps no whole 16-bit weights"):
        dsconv.open_checkpoint(made("wrapped-z3").checkpoint, weights="16bit")


def test_other_formats_have_one_set_of_weights(made: Callable[[str], Trained], tmp_path: Path) -> None:
    dsconv.merge(made("compiled-z1").checkpoint, tmp_path / "out", fsync=False)
    with pytest.raises(UsageError, match="DeepSpeed"):
        dsconv.open_checkpoint(tmp_path / "out", weights="16bit")
    with pytest.raises(UsageError, match="expected 'masters' or '16bit'"):
        dsconv.open_checkpoint(tmp_path / "out", weights="32bit")  # type: ignore[arg-type]
