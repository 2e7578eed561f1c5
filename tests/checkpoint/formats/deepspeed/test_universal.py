"""Incomplete and mixed universal checkpoints are refused by name. (tests/convert/test_to_universal.py tests that sound
ones are read.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    UnsafeError,
    UnsupportedError,
)
from tests.fixtures import gloo, universal_mp
from tests.trained import load_safetensors, same


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Return a fresh copy of the official tool's output for a case: the folder with ``latest_universal``."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(gloo.ensure("universal")[name] / "official", tmp_path / name))

    return copy


def tag(folder: Path) -> Path:
    return folder / (folder / "latest_universal").read_text()


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    value = torch.load(path, weights_only=False)
    torch.save(edit(value), path)


def rename(old: str, new: str) -> Callable[[Any], Any]:
    """Rename a parameter in the model states."""

    def edit(value: Any) -> Any:
        value["param_shapes"] = [
            {new if k == old else k: v for k, v in group.items()} for group in value["param_shapes"]
        ]
        return value

    return edit


Z2, Z3, FROZEN3 = "llama_groups-z2-bf16-w2", "odd-z3-fp32-w2", "llama_frozen-z3-bf16-w2"
NORM = "model.norm.weight"


def lose(path: str) -> Callable[[Path], None]:
    return lambda folder: (tag(folder) / path).unlink()


def edit(path: str, function: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: change(tag(folder) / path, function)


def second_rank(folder: Path) -> None:
    states = tag(folder) / "mp_rank_00_model_states.pt"
    states.rename(states.with_name("mp_rank_01_model_states.pt"))


def frozen_tp(folder: Path) -> None:
    states = tag(folder) / "mp_rank_00_model_states.pt"
    shutil.copy(states, states.with_name("mp_rank_01_model_states.pt"))


def tensor_parallel(folder: Path) -> None:
    states = tag(folder) / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    states.rename(states.with_name("zero_pp_rank_0_mp_rank_01_model_states.pt"))


def optimizer_too(folder: Path) -> None:
    (tag(folder) / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()


def truncate(folder: Path) -> None:
    path = tag(folder) / f"zero/{NORM}/fp32.pt"
    path.write_bytes(path.read_bytes()[:-30])


def bad_latest(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "latest_universal").write_text(text)

    return write


BAD: dict[str, tuple[str, Callable[[Path], None], type[DsconvError], str]] = {
    "no_weights": (Z2, lose(f"zero/{NORM}/fp32.pt"), MissingShardError, f"{NORM}.*no weights"),
    "no_settings": (Z2, lose("zero/optimizer_state.pt"), MissingShardError, "not finished"),
    "no_model_states": (Z2, lose("mp_rank_00_model_states.pt"), MissingShardError, "expected mp_rank_00"),
    "no_model_states_of_rank_0": (Z2, second_rank, MissingShardError, "found mp_rank_01"),
    "no_model_states_at_stage_3": (
        Z3,
        lose("zero_pp_rank_0_mp_rank_00_model_states.pt"),
        MissingShardError,
        "zero_pp_rank_0",
    ),
    "no_frozen_weights": (
        FROZEN3,
        lose("zero_pp_rank_1_mp_rank_00_model_states.pt"),
        MissingShardError,
        "zero_pp_rank_1",
    ),
    "another_shape": (
        Z2,
        edit(f"zero/{NORM}/fp32.pt", lambda v: {"param": v["param"][:-1].clone()}),
        InconsistentCheckpointError,
        NORM,
    ),
    "another_shape_at_stage_3": (
        Z3,
        edit("zero/seven/fp32.pt", lambda v: v[:-1].clone()),
        InconsistentCheckpointError,
        "seven",
    ),
    "no_tensor": (Z2, edit(f"zero/{NORM}/fp32.pt", lambda v: {"param": 3}), MalformedError, NORM),
    "a_number": (Z2, edit(f"zero/{NORM}/fp32.pt", lambda v: 3), MalformedError, NORM),
    "vocabulary_of_other_width": (
        "odd-z2-fp32-w2-patterns",
        edit("zero/embed.weight/fp32.pt", lambda v: v | {"param": v["param"][:, 1:].clone()}),
        InconsistentCheckpointError,
        "embed.weight",
    ),
    "a_path_as_a_name": (Z2, edit("mp_rank_00_model_states.pt", rename(NORM, "../../evil")), UnsafeError, "evil"),
    "an_absolute_path": (Z2, edit("mp_rank_00_model_states.pt", rename(NORM, "/etc")), UnsafeError, "etc"),
    "stage": (Z2, edit("zero/optimizer_state.pt", lambda v: v | {"zero_stage": 7}), MalformedError, "stage"),
    "settings_of_another_kind": (Z2, edit("zero/optimizer_state.pt", lambda v: [1]), MalformedError, "stage"),
    "frozen_in_two_ranks": ("llama_frozen-z2-bf16-w2", frozen_tp, UnsupportedError, "frozen"),
    "stage_3_and_tensor_parallel": (Z3, tensor_parallel, InconsistentCheckpointError, "mp_world_size"),
    "optimizer_files_too": (Z2, optimizer_too, InconsistentCheckpointError, "both"),
    "latest_names_nothing": (Z2, bad_latest("gone"), CheckpointNotFoundError, "gone"),
    "latest_leaves_the_folder": (Z2, bad_latest("../x"), CheckpointNotFoundError, "no universal checkpoint"),
    "truncated": (Z2, truncate, MalformedError, NORM),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_universal_checkpoints_are_named(kind: str, copied: Callable[[str], Path]) -> None:
    name, damage, error, words = BAD[kind]
    folder = copied(name)
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        dsconv.open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_the_choice_among_several_tags(copied: Callable[[str], Path]) -> None:
    """The source is the save dir, the tag folder, or a tag by name. A plain ``latest`` comes first."""
    folder = copied(Z2)
    name = tag(folder).name
    for checkpoint in (
        dsconv.open_checkpoint(folder),
        dsconv.open_checkpoint(folder / name),
        dsconv.open_checkpoint(folder, tag=name),
    ):
        assert checkpoint.info["tag"] == name
        assert checkpoint.folder == folder
        assert checkpoint.world == {"data_parallel": 2, "model_parallel": 1}
    shutil.copytree(gloo.ensure("universal")[Z2] / "ckpt", folder, dirs_exist_ok=True)
    assert dsconv.open_checkpoint(folder).format == "ZeRO-2"
    assert dsconv.open_checkpoint(folder, tag=name).format == "DeepSpeed universal"
    with pytest.raises(CheckpointNotFoundError, match="global_step2_universal"):
        dsconv.open_checkpoint(folder, tag="other")


def test_weights_that_are_not_the_models_are_a_warning(copied: Callable[[str], Path]) -> None:
    folder = copied(Z2)
    change(tag(folder) / f"zero/{NORM}/fp32.pt", lambda v: v | {"param": v["param"] + 1})
    checkpoint = dsconv.open_checkpoint(folder)
    assert any(NORM in warning for warning in checkpoint.warnings)


def test_a_pickle_that_would_run_code_is_refused(copied: Callable[[str], Path]) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("false",)

    folder = copied(Z2)
    change(tag(folder) / f"zero/{NORM}/fp32.pt", lambda v: v | {"cat_dim": Evil()})
    with pytest.raises(UnsafeError, match="system"):
        dsconv.open_checkpoint(folder)


PARALLEL = [  # they include tied names, two groups of parameters, and three pipeline stages
    "llama-tp2-dp2-z1",
    "qwen-tp2-dp2-z2",
    "llama-tp2-z1-bf16opt",
    "codegen-tp2-z1",
    "pp2-dp2-z1",
    "pp3-z1-bf16opt",
]


@pytest.mark.parametrize("name", PARALLEL)
def test_model_parallel_runs(name: str, tmp_path: Path) -> None:
    """The full shapes come from the universal tensors, and the names from all model-parallel ranks."""
    made = gloo.ensure("universal_mp", [name])[name]
    states = load_safetensors(made / "truth.safetensors")
    truth = {key.removesuffix("/fp32"): tensor for key, tensor in states.items() if key.endswith("/fp32")}
    checkpoint = dsconv.open_checkpoint(made / "official")
    assert set(checkpoint) == set(truth)
    layout = universal_mp.TRAINED[name]
    assert checkpoint.world["model_parallel"] == layout.tp * layout.pp
    dsconv.merge(checkpoint, tmp_path / "merged", fsync=False, verify_output=True)
    merged = load_safetensors(tmp_path / "merged")
    names = {owner: alias for alias, owner in checkpoint.ties.items()}
    for key, tensor in truth.items():
        assert same(merged[key if key in merged else names[key]], tensor), key
    dsconv.to_universal(made / "ckpt", tmp_path / "universal", fsync=False)
    if layout.pp == 1:
        assert dsconv.verify(checkpoint, tmp_path / "universal").equal
    else:  # the official tool leaves out the buffers of a pipeline
        ours = dsconv.open_checkpoint(tmp_path / "universal")
        assert set(ours) > set(truth)
        for key, tensor in truth.items():
            assert same(ours[key].read(), tensor), key
