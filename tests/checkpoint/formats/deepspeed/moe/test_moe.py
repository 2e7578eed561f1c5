"""Expert-parallel checkpoints, native and AutoEP, are merged bit for bit under the model's own names, and damage is
named.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.errors import DsconvError, InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from tests.fixtures import gloo
from tests.fixtures.moe import CASES
from tests.trained import Trained, load_safetensors, same

LOST = "blocks.expert_block1."
WHOLE = [name for name in CASES if not name.endswith(("-trap", "-folded"))]
AUTOEP_FP32 = [
    name for name in WHOLE if CASES[name].options.model and "-fp32-" in name and not name.endswith("-pattern")
]
RESIDUAL = {f"{layer}.{kind}" for layer in ("mlp.fc1", "mlp.fc2", "coefficient") for kind in ("weight", "bias")} | {
    "mlp.seen"
}
FIRST_RANK_ONLY = {"ranks": [{"rank": 0, "experts": [0, 1, 2, 3]}]}
GROUPS = "ds_zero_partition_groups"


@pytest.fixture(scope="session")
def made() -> Callable[[str], Trained]:
    folders = gloo.ensure("moe")
    return lambda name: Trained(folders[name])


@pytest.fixture
def damaged(made: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """Return ``damaged(name)``, which gives the tag folder of a fresh copy, for tests that damage it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made(name).folder / "ckpt", tmp_path / name / "ckpt")) / "global_step2"

    return copy


def check(trained: Trained, merged: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Check like Trained.check. Without ZeRO, MoE checkpoints hold tied weights twice and do not say that they are
    tied.
    """
    if "-z0-" in trained.folder.name:
        for alias in [alias for alias in trained.tied if alias in merged]:
            assert same(merged.pop(alias), trained.truth[alias].to(dtype or trained.truth[alias].dtype)), alias
    trained.check(merged, dtype)


@pytest.mark.parametrize("name", WHOLE)
def test_merge_is_bit_exact(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    report = dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    check(made(name), load_safetensors(tmp_path / "out"))
    wanted = 1 if name in ("qwen2_moe-z2-fp32-w4-ep2", "mixtral-z2-fp32-w2-pattern") else 0
    assert len(report.warnings) == wanted, report.warnings


@pytest.mark.parametrize(
    "name", ["z2-bf16-w4-mixed", "mixtral-z0-bf16-w4-ep2", "qwen2_moe-z3-bf16-w4-ep2", "z1-fp16-w2-ep2"]
)
def test_cast_masters_equal_the_weights(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    low = load_safetensors(made(name).folder / "truth_module.safetensors")
    dsconv.merge(made(name).checkpoint, tmp_path / "out", dtype="fp16" if "fp16" in name else "bf16", fsync=False)
    for tensor, value in load_safetensors(tmp_path / "out").items():
        wanted = low[tensor].to(dtype) if low[tensor].is_floating_point() else low[tensor]
        assert same(value, wanted), tensor


@pytest.mark.parametrize("name", ["qwen2_moe-z3-bf16-w4-ep2", "mixtral-z2-bf16-w4-ep2", "z2-bf16-w4-mixed"])
def test_tensors_and_slices_are_read(made: Callable[[str], Trained], name: str) -> None:
    checkpoint = dsconv.open_checkpoint(made(name).checkpoint)
    for key, entry in checkpoint.items():
        truth = made(name).truth[key]
        assert same(entry.read(), truth), key
        if truth.ndim and len(truth) > 2:
            assert same(entry.read(slice(1, 3)), truth[1:3]), key


def test_the_description_of_a_checkpoint(made: Callable[[str], Trained]) -> None:
    mixed = dsconv.open_checkpoint(made("z2-bf16-w4-mixed").checkpoint)
    assert (mixed.format, mixed.step, mixed.info["experts"]) == ("ZeRO-2, MoE", 2, [4, 6, 3])
    assert mixed.world == {"data_parallel": 4, "model_parallel": 1, "expert_parallel": 4}
    assert len(mixed.sources) == 1 + 4 + 13
    frozen = dsconv.open_checkpoint(made("z2-bf16-w4-ep4").checkpoint)
    experts = "blocks.block1.deepspeed_moe.experts.deepspeed_experts.7."
    assert {rest: frozen[experts + rest].role for rest in ("fc1.bias", "fc2.bias", "seen")} == {
        "fc1.bias": "parameter", "fc2.bias": "frozen", "seen": "buffer",
    }  # fmt: skip
    assert (str(frozen[experts + "fc1.bias"].dtype), str(frozen[experts + "fc2.bias"].dtype)) == ("float32", "bfloat16")
    autoep = dsconv.open_checkpoint(made("mixtral-z3-fp32-w2-ep2").checkpoint)
    assert (autoep.format, autoep.world["expert_parallel"]) == ("ZeRO-3, AutoEP", 2)
    half = dsconv.open_checkpoint(made("mixtral-z2-bf16-w4-ep2").checkpoint)
    names = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    assert [(half[name].role, str(half[name].dtype)) for name in names] == [
        ("frozen", "bfloat16"),
        ("parameter", "float32"),
    ]
    optimizer = dsconv.open_checkpoint(made("z1-bf16opt-w4-ep2").checkpoint)
    assert (optimizer.format, made("z1-bf16opt-w4-ep2").facts["optimizer"]) == (
        "ZeRO-1 (BF16_Optimizer), MoE",
        "BF16_Optimizer",
    )


@pytest.mark.parametrize("name", AUTOEP_FP32)
def test_transformers_loads_it_and_computes_the_same_loss(
    made: Callable[[str], Trained], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from tests.fixtures import moe

    job = CASES[name].options
    dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False)
    if not (tmp_path / "out" / "config.json").exists():
        moe.hf_config(job.model).save_pretrained(tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    batch = next(moe.batches(job, torch.float32, 1000))
    with torch.no_grad():
        loss = float(model.eval()(**batch).loss)
    assert loss == pytest.approx(made(name).facts["loss"], abs=2e-6)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("z0-fp32-w2-trap", RESIDUAL),
        ("z0-bf16-w2-trap", RESIDUAL),
        ("z1-bf16-w2-trap", {"mlp.fc2.bias", "mlp.seen"}),
        ("z2-fp32-w2-trap", {"mlp.seen"}),
    ],
)
def test_tensors_that_deepspeed_did_not_save_are_reported(
    made: Callable[[str], Trained], name: str, lost: set[str], tmp_path: Path
) -> None:
    """Parameters of the residual branch are recovered from their masters, though the 16-bit files lack them."""
    report = dsconv.merge(made(name).checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    merged = load_safetensors(tmp_path / "out")
    assert set(made(name).truth) - set(merged) == {LOST + rest for rest in lost}
    assert all(same(tensor, made(name).truth[key]) for key, tensor in merged.items())
    assert any("blocks.expert_block1.mlp.seen" in warning for warning in report.warnings)
    if len(lost) > 1:
        assert any("use_residual" in warning for warning in report.warnings)
    if "bf16" in name and len(lost) > 2:
        assert any("6 fp32 masters" in warning for warning in report.warnings)


def test_opening_imports_no_torch(made: Callable[[str], Trained]) -> None:
    code = (
        "import sys, dsconv; [dsconv.open_checkpoint(path) for path in sys.argv[1:]]; "
        "sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    paths = [
        str(made(name).checkpoint) for name in ("z1-bf16-w4-ep2", "mixtral-z0-bf16-w4-ep2", "qwen2_moe-z3-bf16-w4-ep2")
    ]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


# Damage
# ----------------------------------------------------------------------------------------------------------------


def expert(layer: int, number: int) -> str:
    return f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"


def optimizer(rank: int, prefix: str = "") -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Save the file again with ``change``. torch names the zip's root after the file, as DeepSpeed does."""
    torch.save(change(torch.load(path, weights_only=False)), path)


def refused(tag: Path, kind: type[DsconvError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        dsconv.open_checkpoint(tag.parent)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_expert_file(damaged: Callable[[str], Path]) -> None:
    for name in ("z2-bf16-w4-ep4", "z0-fp32-w2-ep2", "mixtral-z2-bf16-w4-ep2"):
        tag = damaged(name)
        (tag / expert(1, 2)).unlink()
        refused(tag, MissingShardError, expert(1, 2))


def test_all_expert_files_missing(damaged: Callable[[str], Path]) -> None:
    for name in ("z0-fp32-w2-ep2", "z1-fp32-w2-ep1", "z2-fp32-w2-ep2"):
        tag = damaged(name)
        for path in tag.glob("layer_*"):
            path.unlink()
        refused(tag, MissingShardError, "layer_0_expert_0_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("name", ["z1-fp32-w2-ep1", "z2-bf16-w4-ep4", "z1-bf16opt-w4-ep2", "mixtral-z1-bf16-w2-ep2"])
def test_an_expert_file_of_another_step(
    made: Callable[[str], Trained], damaged: Callable[[str], Path], name: str
) -> None:
    tag = damaged(name)
    shutil.copy(made(name).folder / "earlier" / "global_step1" / expert(1, 1), tag / expert(1, 1))
    refused(tag, InconsistentCheckpointError, expert(1, 1), "optim_states.pt", "another save")


def test_optimizer_files_of_another_step(made: Callable[[str], Trained], damaged: Callable[[str], Path]) -> None:
    tag = damaged("z2-fp32-w2-ep2")
    shutil.copy(made("z2-fp32-w2-ep2").folder / "earlier" / "global_step1" / optimizer(1), tag / optimizer(1))
    refused(tag, InconsistentCheckpointError, "optimizer step", optimizer(1))


def test_an_expert_that_appears_twice(damaged: Callable[[str], Path]) -> None:
    tag = damaged("z2-fp32-w2-ep2")
    shutil.copy(tag / expert(0, 0), tag / expert(0, 1))
    refused(tag, InconsistentCheckpointError, expert(0, 1), "was written as")
    edit(tag / expert(0, 1), lambda state: state)
    refused(tag, InconsistentCheckpointError, expert(0, 1), "appear twice")
    tag = damaged("z0-fp32-w2-ep2")
    for number in range(4):
        shutil.copy(tag / expert(0, number), tag / expert(1, number))
        edit(tag / expert(1, number), lambda state: state)
    refused(tag, InconsistentCheckpointError, expert(1, 0), "another layer's")


def test_a_file_without_experts(damaged: Callable[[str], Path]) -> None:
    tag = damaged("z0-fp32-w2-ep2")
    edit(tag / expert(0, 0), lambda state: {"weight": torch.zeros(2)})
    refused(tag, MalformedError, expert(0, 0))


def test_expert_files_left_over_from_more_experts(
    made: Callable[[str], Trained], damaged: Callable[[str], Path]
) -> None:
    tag = damaged("z1-fp32-w2-ep1")
    shutil.copy(tag / expert(0, 2), tag / expert(0, 3))
    checkpoint = dsconv.open_checkpoint(tag.parent)
    assert len(checkpoint) == len(made("z1-fp32-w2-ep1").truth)
    assert len(checkpoint.warnings) == 1
    assert expert(0, 3) in checkpoint.warnings[0]


def test_a_missing_optimizer_file(damaged: Callable[[str], Path]) -> None:
    for name, path in (
        ("z2-fp32-w2-ep2", optimizer(1)),
        ("mixtral-z3-fp32-w2-ep2", optimizer(0)),
        ("z0-bf16-w4-ep2", "expp_rank_0_mp_rank_00_optim_states.pt"),
        ("z0-bf16-w4-ep2", "expp_rank_1_mp_rank_00_optim_states.pt"),
        ("mixtral-z0-bf16-w4-ep2", "expp_rank_1_mp_rank_00_optim_states.pt"),
    ):
        tag = damaged(name)
        (tag / path).unlink()
        refused(tag, MissingShardError, path)
        shutil.rmtree(tag.parent)
    tag = damaged("z0-bf16-w4-ep2")
    for found in tag.glob("expp_*"):
        found.unlink()
    refused(tag, MissingShardError, "expp_rank_0_mp_rank_00_optim_states.pt")


def test_missing_model_states(damaged: Callable[[str], Path]) -> None:
    tag = damaged("z2-fp32-w2-ep2")
    (tag / "mp_rank_00_model_states.pt").unlink()
    refused(tag, MissingShardError, "mp_rank_00_model_states.pt")
    tag = damaged("mixtral-z3-fp32-w2-ep2")
    (tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refused(tag, MissingShardError, "zero_pp_rank_1_mp_rank_00_model_states.pt")


@pytest.mark.parametrize(("name", "prefix"), [("z2-fp32-w2-ep2", ""), ("mixtral-z2-bf16-w4-ep2", "bf16_")])
def test_optimizer_files_of_ranks_swapped(damaged: Callable[[str], Path], name: str, prefix: str) -> None:
    """This also holds for files that were saved again under the other name, which hides the renaming."""
    tag = damaged(name)
    first, second = (torch.load(tag / optimizer(rank, prefix), weights_only=False) for rank in (0, 1))
    torch.save(second, tag / optimizer(0, prefix))
    torch.save(first, tag / optimizer(1, prefix))
    refused(tag, InconsistentCheckpointError)


def test_the_order_of_ranks_is_proven(damaged: Callable[[str], Path]) -> None:
    """Without the option in the config, neighbouring ranks would seem to hold different experts, but the files show the
    opposite.
    """

    def forget(state: Any) -> Any:
        del state["ds_config"]["use_data_before_expert_parallelism"]
        return state

    tag = damaged("z2-fp32-w4-ep2-data_first")
    edit(tag / "mp_rank_00_model_states.pt", forget)
    refused(tag, InconsistentCheckpointError, "optim_states.pt", "differs")


@pytest.mark.parametrize("counts", [[2, 1], [2, 3], [1, 2]])
def test_partition_counts_that_do_not_fit(damaged: Callable[[str], Path], counts: list[int]) -> None:
    tag = damaged("z2-fp32-w2-ep2")
    for rank in (0, 1):
        edit(
            tag / optimizer(rank),
            lambda s: {**s, "optimizer_state_dict": {**s["optimizer_state_dict"], "partition_count": counts}},
        )
    if counts == [2, 1]:  # the original value
        assert dsconv.open_checkpoint(tag.parent)
    else:
        refused(tag, DsconvError, "zero_pp_rank_")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 4}, "number their experts"),
        ({"num_experts": [4]}, "layer_1_expert"),
        ({"num_experts": [6, 6]}, expert(0, 4)),
        ({"num_experts": [4, 5]}, "of 5 experts"),
        ({"param_shapes": []}, "parameter groups"),
    ],
)
def test_model_states_that_do_not_fit(damaged: Callable[[str], Path], change: dict[str, Any], words: str) -> None:
    tag = damaged("z2-fp32-w2-ep2")
    edit(tag / "mp_rank_00_model_states.pt", lambda state: {**state, **change})
    if change == {"num_experts": [4, 5]}:
        refused(tag, InconsistentCheckpointError, "has 5 experts over 2")
    elif change == {"num_experts": [4]}:
        refused(tag, InconsistentCheckpointError)
    else:
        refused(tag, DsconvError, words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 5),
        ("ep_size", 3),
        ("ep_size", 10**15),
        ("module_path", None),
        ("expert_placement", FIRST_RANK_ONLY),
    ],
)
def test_autoep_layers_that_do_not_fit(damaged: Callable[[str], Path], key: str, value: Any) -> None:
    def change(state: Any) -> Any:
        state["ds_autoep_layers"][0][key] = value
        return state

    tag = damaged("mixtral-z2-bf16-w4-ep2")
    edit(tag / "mp_rank_00_model_states.pt", change)
    refused(tag, MalformedError, "ds_autoep_layers")


def test_autoep_placement_other_than_in_order(made: Callable[[str], Trained], damaged: Callable[[str], Path]) -> None:
    """The descriptor may claim another packing order of a rank's experts, but the expert files show the real one."""

    def change(state: Any) -> Any:
        state["ds_autoep_layers"][0]["expert_placement"]["ranks"][0]["experts"] = [1, 0]
        return state

    tag = damaged("mixtral-z2-bf16-w4-ep2")
    edit(tag / "mp_rank_00_model_states.pt", change)
    refused(tag, InconsistentCheckpointError, "differs")
    for rank in range(2):
        tag = damaged("mixtral-z3-fp32-w2-ep2") if not rank else tag
        edit(tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", change)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    truth = made("mixtral-z3-fp32-w2-ep2").truth[name]
    assert same(dsconv.open_checkpoint(tag.parent)[name].read(), truth[[1, 0, 2, 3]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:1], "sub-groups"),
        (lambda rows: [{**row, "partition_ranks": [7]} for row in rows], GROUPS),
        (lambda rows: [rows[0], {**rows[1], "partition_ranks": [1, 0], "partition_count": 2}], "those say otherwise"),
        (lambda rows: [{**rows[0], "partition_ranks": [0], "partition_count": 1}, rows[1]], "elements of sub-group 0"),
    ],
)
def test_zero3_partition_groups_that_do_not_fit(
    damaged: Callable[[str], Path], change: Callable[[Any], Any], words: str
) -> None:
    def edited(state: Any) -> Any:
        state["optimizer_state_dict"][GROUPS] = change(state["optimizer_state_dict"][GROUPS])
        return state

    tag = damaged("mixtral-z3-fp32-w2-ep2")
    edit(tag / optimizer(0), edited)
    refused(tag, DsconvError, words)


def test_zero3_model_states_of_ranks_swapped(damaged: Callable[[str], Path]) -> None:
    tag = damaged("qwen2_moe-z3-bf16-w4-ep2")
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
    first, second = (torch.load(tag / name, weights_only=False) for name in names)
    torch.save(second, tag / names[0])
    torch.save(first, tag / names[1])
    refused(tag, InconsistentCheckpointError, "expert-parallel ranks")


def test_autoep_folded_with_tensor_parallelism_is_refused_by_name() -> None:
    name = "mixtral-z2-fp32-w4-folded"
    refused(
        gloo.ensure("moe", [name])[name] / "ckpt" / "global_step2",
        UnsupportedError,
        "AutoEP folded with tensor parallelism",
    )


def test_names_of_autoep_are_kept_where_the_models_are_not_known(made: Callable[[str], Trained]) -> None:
    checkpoint = dsconv.open_checkpoint(made("mixtral-z2-fp32-w2-pattern").checkpoint)
    assert "model.layers.1.mlp.experts.w3" in checkpoint
    assert "moe_layer_pattern" in checkpoint.warnings[0]
    assert "config.json" in dsconv.open_checkpoint(made("qwen2_moe-z2-fp32-w4-ep2").checkpoint).warnings[0]


@pytest.mark.parametrize("name", ["mixtral-z1-bf16-w2-ep2", "mixtral-z3-fp32-w2-ep2"])
def test_the_official_universal_checkpoint_of_autoep(made: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    """DeepSpeed's own tool writes all experts as one tensor, under AutoEP's names."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(made(name).checkpoint / "global_step2")]
    command += ["--output_folder", str(tmp_path / "universal")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    checkpoint = dsconv.open_checkpoint(tmp_path / "universal")
    assert checkpoint.format == "DeepSpeed universal"
    check(made(name), {key: entry.read() for key, entry in checkpoint.items()})


def check_own_weights(folder: Path) -> dsconv.Checkpoint:
    """Return the checkpoint of the model's own weights, after comparing them with the masters, cast."""
    masters, own = dsconv.open_checkpoint(folder), dsconv.open_checkpoint(folder, weights="16bit")
    for name, entry in own.items():
        assert torch.equal(masters[name].read().to(entry.read().dtype), entry.read()), name
    return own


@pytest.mark.parametrize("name", ["z2-bf16-w4-ep4", "mixtral-z1-bf16-w2-ep2", "z0-bf16-w4-ep2", "z1-bf16-w2-trap"])
def test_the_model_s_own_weights(made: Callable[[str], Trained], name: str) -> None:
    own = check_own_weights(made(name).checkpoint)
    lost = set(dsconv.open_checkpoint(made(name).checkpoint)) - set(own)
    said = [text for text in own.warnings if "are only in the optimizer files" in text]
    assert bool(lost) == bool(said) == (name == "z1-bf16-w2-trap")
