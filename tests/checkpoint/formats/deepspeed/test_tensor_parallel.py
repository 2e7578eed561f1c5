"""AutoTP checkpoints of real training are merged bit for bit, and damaged ones are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.checkpoint.formats.deepspeed.model_states import read_module_states
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.errors import DsconvError, InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from tests.fixtures import gloo
from tests.fixtures.autotp import CASES
from tests.fixtures.gloo import DATA
from tests.trained import Trained, load_safetensors, same


@pytest.fixture(scope="module")
def made() -> Callable[[str], Trained]:
    folders = gloo.ensure("autotp")
    return lambda name: Trained(folders[name])


@pytest.fixture
def damaged(made: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """Return ``damaged(name)``, which gives the tag folder of a fresh copy."""

    def copy(name: str) -> Path:
        return (
            Path(shutil.copytree(made(name).checkpoint, tmp_path / "copy")) / f"global_step{CASES[name].options.steps}"
        )

    return copy


@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_exact(name: str, made: Callable[[str], Trained], tmp_path: Path) -> None:
    trained, options = made(name), CASES[name].options
    report = dsconv.merge(trained.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    trained.check(load_safetensors(tmp_path / "out"))
    assert not report.warnings
    checkpoint = dsconv.open_checkpoint(trained.checkpoint)
    assert checkpoint.world == {
        "data_parallel": CASES[name].world // options.tp,
        "model_parallel": options.tp,
        "tensor_parallel": options.tp,
    }
    assert checkpoint.step == trained.facts["step"]
    assert checkpoint.format.startswith(f"ZeRO-{options.stage}" if options.stage else "DeepSpeed stage 0")
    assert {n for n, entry in checkpoint.items() if entry.role == "buffer"} == set(trained.facts["buffers"])
    assert set(checkpoint.ties) == set(trained.tied)


@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith(("llama-tp3", "fused-tp3", "qwen-tp3", "phi3", "gpt_neox", "fused-tp4"))]
)
def test_patterns_alone_say_what_the_maps_say(name: str, made: Callable[[str], Trained]) -> None:
    """AutoTP writes both. Megatron and older releases write only the patterns."""
    tag = next(made(name).checkpoint.glob("global_step*"))
    files = [tag / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(CASES[name].options.tp)]
    if not files[0].exists():
        files = [tag / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt" for rank in range(CASES[name].options.tp)]
    states = [read_module_states(path) for path in files]
    info = states[0].raw["universal_checkpoint_info"]
    both = UniversalInfo(info, files[0])
    patterns = UniversalInfo({key: value for key, value in info.items() if key != "affine_map"}, files[0])
    shapes = [
        {n: s for group in [*state.param_shapes, state.frozen_shapes] for n, s in group.items()} for state in states
    ]
    shapes = [s or {n: t.shape for n, t in state.module.items()} for s, state in zip(shapes, states, strict=True)]
    names = [n for n in shapes[0] if all(n in other for other in shapes) and n not in states[0].buffer_names]
    assert len(names) > 8
    for parameter in names:
        held = [other[parameter] for other in shapes]
        assert patterns.join(parameter, held) == both.join(parameter, held), parameter


def test_a_slice_of_a_tensor_reads_the_same(made: Callable[[str], Trained]) -> None:
    trained = made("fused-tp3-z3")
    checkpoint = dsconv.open_checkpoint(trained.checkpoint)
    for name, expected in trained.truth.items():
        if expected.ndim and len(expected) > 2:
            assert same(checkpoint[name].read(slice(1, len(expected) - 1)), expected[1:-1].clone()), name


def error(tag: Path, kind: type[DsconvError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        dsconv.open_checkpoint(tag)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


@pytest.mark.parametrize("name", ["llama-tp2-dp2-z1", "llama-tp2-dp2-z3"])
def test_an_optimizer_file_of_one_mp_and_dp_is_missing(name: str, damaged: Callable[[str], Path]) -> None:
    tag = damaged(name)
    (tag / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    error(tag, MissingShardError, "2 ranks", "rank 1", "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt")


@pytest.mark.parametrize("name", ["llama-tp2-dp2-z1", "llama-tp2-dp2-z3"])
def test_all_optimizer_files_of_one_mp_rank_are_missing(name: str, damaged: Callable[[str], Path]) -> None:
    tag = damaged(name)
    for path in tag.glob("*_mp_rank_01_optim_states.pt"):
        path.unlink()
    error(tag, MissingShardError, "optim_states.pt")


@pytest.mark.parametrize("name", ["llama-tp2-z0-bf16", "llama-tp2-dp2-z1", "llama-tp2-dp2-z3", "llama-tp3-z2"])
@pytest.mark.parametrize("mp", [0, 1])
def test_a_whole_mp_rank_is_missing(name: str, mp: int, damaged: Callable[[str], Path]) -> None:
    tag = damaged(name)
    for path in tag.glob(f"*mp_rank_{mp:02d}_*.pt"):
        path.unlink()
    error(
        tag,
        MissingShardError,
        "mp_world_size",
        f"mp_rank_{mp:02d}" if CASES[name].options.tp > 2 or mp == 0 else "mp_rank_01",
    )


def test_model_states_of_one_mp_rank_are_missing(damaged: Callable[[str], Path]) -> None:
    tag = damaged("llama-tp2-dp2-z1")
    (tag / "mp_rank_01_model_states.pt").unlink()
    error(tag, MissingShardError, "mp_rank_01_model_states.pt")


def swap(tag: Path, pattern: str) -> None:
    """Swap rank 0's and rank 1's files of a pattern that has ``{}`` for the rank."""
    for path in sorted(tag.glob(pattern.format("00"))):
        other = path.with_name(path.name.replace("mp_rank_00", "mp_rank_01"))
        path.rename(tag / "aside")
        other.rename(path)
        (tag / "aside").rename(other)


@pytest.mark.parametrize("pattern", ["mp_rank_{}_model_states.pt", "*mp_rank_{}_optim_states.pt", "*mp_rank_{}_*.pt"])
def test_swapped_mp_ranks(pattern: str, damaged: Callable[[str], Path]) -> None:
    tag = damaged("llama-tp2-dp2-z1")
    swap(tag, pattern)
    error(tag, InconsistentCheckpointError, "was written as", "mp_rank_0")


def resave(path: Path, **changes: object) -> None:
    """Save a file again with changed top-level keys and another root name, as if written through a stream."""
    state = torch.load(path, map_location="cpu", weights_only=False) | changes
    with path.open("wb") as stream:
        torch.save(state, stream)


def test_swapped_ranks_without_the_files_own_names(damaged: Callable[[str], Path]) -> None:
    """Files that were written through a stream do not hold their own name, but uneven shards reveal the swap."""
    tag = damaged("llama-tp3-z1")
    for path in tag.glob("*mp_rank_0*.pt"):
        resave(path)
    dsconv.open_checkpoint(tag)
    for path in sorted(tag.glob("*mp_rank_00*")):
        other = path.with_name(path.name.replace("mp_rank_00", "mp_rank_02"))
        path.rename(tag / "aside")
        other.rename(path)
        (tag / "aside").rename(other)
    error(tag, InconsistentCheckpointError, "ranks were swapped", "has shape")


def test_files_of_another_step(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    tag = damaged("llama-tp2-dp2-z1")
    resave(tag / "mp_rank_01_model_states.pt", global_steps=7)
    error(tag, InconsistentCheckpointError, "step 2", "step 7", "mp_rank_01_model_states.pt")


def test_optimizer_files_of_another_step(damaged: Callable[[str], Path]) -> None:
    tag = damaged("llama-tp2-dp2-z1")
    for path in tag.glob("*mp_rank_01_optim_states.pt"):
        state = torch.load(path, map_location="cpu", weights_only=False)
        for row in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            row["step"] = torch.tensor(9.0) if torch.is_tensor(row["step"]) else 9
        torch.save(state, path)
    error(tag, InconsistentCheckpointError, "step 2", "step 9", "mp_rank_01_optim_states.pt")


def test_another_zero_stage_on_one_rank(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    tag = damaged("llama-tp2-z1-bf16")
    for path in made("llama-tp2-z2-bf16").checkpoint.glob("global_step2/*mp_rank_01*.pt"):
        shutil.copy(path, tag)
    error(tag, InconsistentCheckpointError, "ZeRO-1", "ZeRO-2")


def test_more_files_than_the_world(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    """Left-over files of a larger world are ignored. A renamed file of this world is an error."""
    tag = damaged("llama-tp2-z1-bf16")
    for path in made("llama-tp3-z1").checkpoint.glob("global_step2/*mp_rank_02*.pt"):
        shutil.copy(path, tag)
    checkpoint = dsconv.open_checkpoint(tag)
    assert "left over from an older save" in checkpoint.warnings[0]
    made("llama-tp2-z1-bf16").check({name: entry.read() for name, entry in checkpoint.items()})
    shutil.copy(tag / "mp_rank_01_model_states.pt", tag / "mp_rank_02_model_states.pt")
    error(tag, InconsistentCheckpointError, "mp_rank_02_model_states.pt", "says 2 model-parallel ranks")


def bump(path: Path, name: str) -> None:
    """Change one element of a tensor in ``module``, as drift in training would."""
    state = torch.load(path, map_location="cpu", weights_only=False)
    state["module"][name].view(-1)[3] += 1
    torch.save(state, path)


def test_a_replicated_tensor_differs(damaged: Callable[[str], Path]) -> None:
    tag = damaged("llama-tp2-z0-fp32")
    bump(tag / "mp_rank_01_model_states.pt", "model.norm.weight")
    error(tag, InconsistentCheckpointError, "'model.norm.weight'", "mp_rank_00", "mp_rank_01", "drifted apart")


def test_a_replicated_master_differs(damaged: Callable[[str], Path]) -> None:
    """In a partition the record's checksum covers all parameters, so the bytes themselves are compared."""
    tag = damaged("llama-tp2-dp2-z2")
    path = tag / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    state = torch.load(path, map_location="cpu", weights_only=False)
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()[5] += 1e-3
    torch.save(state, path)
    error(tag, InconsistentCheckpointError, "'model.embed_tokens.weight'", "mp_rank_01_optim_states.pt")


def test_a_buffer_differs(damaged: Callable[[str], Path]) -> None:
    tag = damaged("fused-tp2-z1")
    bump(tag / "mp_rank_01_model_states.pt", "table")
    error(tag, InconsistentCheckpointError, "'table'")


def with_info(tag: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in tag.glob("mp_rank_*_model_states.pt"):
        info = torch.load(path, map_location="cpu", weights_only=False)["universal_checkpoint_info"]
        change(info)
        resave(path, universal_checkpoint_info=info)


NORM = r"^model\.norm\.weight$"


def test_averaged_parameters(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    """Equal copies are their own average. Different ones are refused, since no file holds the average."""
    tag = damaged("llama-tp2-z0-fp32")

    def change(info: dict[str, Any]) -> None:
        info["tp_replicated_parameter_patterns"].remove(NORM)
        info["parameter_to_average_patterns"] = [NORM]
        del info["affine_map"]["params"][NORM]

    with_info(tag, change)
    made("llama-tp2-z0-fp32").check({name: entry.read() for name, entry in dsconv.open_checkpoint(tag).items()})
    bump(tag / "mp_rank_01_model_states.pt", "model.norm.weight")
    error(tag, UnsupportedError, "'model.norm.weight'", "average")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            lambda i: (
                i.pop("autotp_unsupported_parameter_patterns"),
                i.pop("affine_map"),
                i.update(original_vocab_size="67"),
            ),
            MalformedError,
            "original_vocab_size",
        ),
        (
            lambda i: i["affine_map"]["params"][r"^lm_head\.weight$"]["ranks"][1]["pieces"][0]["source"].__setitem__(
                1, 24
            ),
            MalformedError,
            "lm_head.weight",
        ),
        (
            lambda i: i["affine_map"]["params"][r"^lm_head\.weight$"]["ranks"].pop(1),
            MalformedError,
            "not one of 2 ranks",
        ),
        (lambda i: i.update(tp_replicated_parameter_patterns=3), MalformedError, "tp_replicated_parameter_patterns"),
        (lambda i: i["affine_map"].update(version=2), UnsupportedError, "version 2"),
        (
            lambda i: i["affine_map"]["params"].update({r"^lm_head\.weight$": {"logical_shape": [3]}}),
            MalformedError,
            "lm_head.weight",
        ),
        (
            lambda i: i["affine_map"]["params"][r"^lm_head\.weight$"]["ranks"][1]["pieces"][0].update(scale=0.5),
            UnsupportedError,
            "scaled",
        ),
        (
            lambda i: i["affine_map"]["params"][r"^lm_head\.weight$"]["ranks"][1]["pieces"][0]["source"].__setitem__(
                0, 24
            ),
            InconsistentCheckpointError,
            "lm_head.weight",
        ),
        (
            lambda i: (
                i["affine_map"]["params"].pop(r"^lm_head\.weight$"),
                i["autotp_unsupported_parameter_patterns"].update({r"^lm_head\.weight$": "blocks interleave"}),
            ),
            UnsupportedError,
            "blocks interleave",
        ),
        (lambda i: i.update(parameter_to_average_patterns=[r"(a+)+$"]), UnsupportedError, "(a+)+$"),
        (
            lambda i: i.update(parameter_with_sub_params=[{"patterns": ["a"]}]),
            MalformedError,
            "parameter_with_sub_params",
        ),
    ],
    ids=[
        "type of size",
        "strides",
        "ranks",
        "list",
        "version",
        "map",
        "scale",
        "overlap",
        "unsupported",
        "regex",
        "sub-params",
    ],
)
def test_metadata_that_cannot_be_followed(
    change: Callable[[dict[str, Any]], None], kind: type[DsconvError], words: str, damaged: Callable[[str], Path]
) -> None:
    tag = damaged("llama-tp2-z0-fp32")
    with_info(tag, change)
    error(tag, kind, words)


def test_one_mp_rank_alone_is_not_a_model(damaged: Callable[[str], Path]) -> None:
    """Half a model must not be taken for a whole one."""
    tag = damaged("llama-tp2-z3-bf16")
    for path in tag.glob("*mp_rank_01*"):
        path.unlink()
    error(tag, MissingShardError, "2 model-parallel ranks", "mp_rank_01")


def test_without_rules_the_config_tells(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    """Releases before 0.18.9 save no rules. config.json and the model's plan join three ranks with uneven and empty
    shards.
    """
    for name in ("llama-tp3-z1", "llama-tp3-z3", "qwen-tp2-dp2-z3", "llama-tp2-z0-bf16"):
        tag = damaged(name)
        for path in tag.glob("*model_states.pt"):
            resave(path, universal_checkpoint_info=None)
        made(name).check({n: entry.read() for n, entry in dsconv.open_checkpoint(tag).items()})
        (tag.parent / "config.json").unlink()
        error(tag, UnsupportedError, "universal_checkpoint_info", "config.json", "'model.embed_tokens.weight'")
        shutil.rmtree(tag.parent)


def test_without_rules_fused_projections_are_refused(damaged: Callable[[str], Path]) -> None:
    tag = damaged("phi3-tp2-z1")
    for path in tag.glob("*model_states.pt"):
        resave(path, universal_checkpoint_info=None)
    error(tag, UnsupportedError, "qkv_proj", "any order", "config.json")


OLD = sorted(path.parent for path in (DATA / "old_tensor_parallel").glob("*/*/truth.json"))


@pytest.mark.parametrize("folder", OLD, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_old_releases_save_no_rules(folder: Path, tmp_path: Path) -> None:
    trained = Trained(folder)
    report = dsconv.merge(trained.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    trained.check(load_safetensors(tmp_path / "out"))
    assert not report.warnings
    assert len(OLD) == 4


def test_a_model_that_is_not_cut_beside_leftovers_of_one_that_was(
    copied: Callable[[str], Path], trained: Callable[[str], Trained], made: Callable[[str], Trained]
) -> None:
    tag = copied("llama_tied-z1-bf16-w2") / "global_step2"
    for path in made("llama-tp2-z1-bf16").checkpoint.glob("global_step2/*mp_rank_01*"):
        shutil.copy(path, tag)
    checkpoint = dsconv.open_checkpoint(tag)
    assert "left over from an older save" in checkpoint.warnings[0]
    trained("llama_tied-z1-bf16-w2").check({name: entry.read() for name, entry in checkpoint.items()})


def test_a_world_too_large_to_be_listed(damaged: Callable[[str], Path]) -> None:
    tag = damaged("llama-tp2-z0-bf16")
    resave(tag / "mp_rank_00_model_states.pt", mp_world_size=1 << 60)
    error(tag, MissingShardError, "missing all files of rank 2, 3, 4")


@pytest.mark.parametrize("name", ["fused-tp2-z1", "bigcode-tp2-z2", "fused-tp2-z0"])
def test_the_model_s_own_weights(made: Callable[[str], Trained], name: str) -> None:
    """``weights="16bit"`` joins the shards of the model states, which equal the cast masters."""
    masters = dsconv.open_checkpoint(made(name).checkpoint)
    own = dsconv.open_checkpoint(made(name).checkpoint, weights="16bit")
    assert set(own) == set(masters)
    for key, entry in own.items():
        assert torch.equal(masters[key].read().to(entry.read().dtype), entry.read()), key
