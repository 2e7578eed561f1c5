"""Pipeline checkpoints of real training are merged bit for bit, and damaged ones are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.checkpoint.formats.deepspeed.unread import refuse_unread
from dsconv.checkpoint.pickles.values import Instance
from dsconv.errors import DsconvError, InconsistentCheckpointError, MissingShardError, UnsupportedError
from tests.fixtures import gloo
from tests.fixtures.pipeline import CASES, Options
from tests.trained import Trained, load_safetensors

REFUSED = {"pp2-z1-unsynced", "pp2-tp2-z1-noinfo"}


@pytest.fixture(scope="module")
def made() -> Callable[[str], Trained]:
    folders = gloo.ensure("pipeline")
    return lambda name: Trained(folders[name])


@pytest.fixture
def damaged(made: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """Return ``damaged(name)``, which gives the tag folder of a fresh copy."""
    return lambda name: Path(shutil.copytree(made(name).checkpoint, tmp_path / "copy")) / "global_step2"


def global_name(name: str, options: Options) -> str:
    """Return a tied layer's name. Without masters under global names, nothing gives its key, so it has the layer's
    number.
    """
    # With more there are the trainer's patterns.
    nameless = options.stage == 0 and options.dtype != "bf16" and options.tp == 1
    return (
        name.replace("0.word", "tied_modules.embed.word").replace("0.place", "tied_modules.embed.place")
        if nameless
        else name
    )


@pytest.mark.parametrize("name", [n for n in CASES if n not in REFUSED])
def test_merge_is_bit_exact(name: str, made: Callable[[str], Trained], tmp_path: Path) -> None:
    trained, options = made(name), CASES[name].options
    report = dsconv.merge(trained.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    trained.check({global_name(n, options): t for n, t in load_safetensors(tmp_path / "out").items()})
    checkpoint = dsconv.open_checkpoint(trained.checkpoint)
    assert checkpoint.world == {
        "data_parallel": options.dp,
        "model_parallel": options.pp * options.tp,
        "pipeline_parallel": options.pp,
        "tensor_parallel": options.tp,
    }
    assert checkpoint.step == 2
    assert {n for n, e in checkpoint.items() if e.role == "buffer"} == {
        f"{i}.{b}" for i in (1, 3, 5) for b in ("mask", "count", "table")
    }
    frozen = {n for n, e in checkpoint.items() if e.role == "frozen"}
    # fp32 without ZeRO does not record what was frozen.
    assert frozen == ({"1.down.weight", "1.norm.bias"} if options.frozen and options.stage else set())
    if options.synced:
        assert not report.warnings
    else:
        assert ["'tied_modules.embed.place.weight' differs" in w for w in report.warnings] == [True, True]


def error(tag: Path, kind: type[DsconvError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        dsconv.open_checkpoint(tag)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def change_layer(tag: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = next(path for path in sorted(tag.glob("layer_*.pt")) if "layer_01" in path.name)
    held = torch.load(path, weights_only=False)
    change(held)
    torch.save(held, path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": torch.ones(2)}, "is a dict that holds tensors, which would be lost"),
        ([torch.ones(2), [torch.ones(3)]], "is a list that holds tensors, which would be lost"),
        (torch.ones(2).to_sparse(), "a kind of tensor that dsconv does not read"),
    ],
    ids=["dict", "list", "sparse"],
)
def test_weights_that_are_no_plain_tensors_are_refused(value: Any, words: str, damaged: Callable[[str], Path]) -> None:
    tag = damaged("pp2-z1-bf16opt")
    change_layer(tag, lambda held: held.update({"adapter.scale": value}))
    error(tag, UnsupportedError, "layer_01-model", words)


def test_a_dtensor_in_a_deepspeed_file_is_refused() -> None:
    dtensor = Instance("torch.distributed.tensor.DTensor", (), {})
    for value in (dtensor, {"a": [dtensor]}):
        with pytest.raises(UnsupportedError, match=r"'1\.weight' is a"):
            refuse_unread(Path("layer_01-model_states.pt"), "1.weight", value)


def test_what_is_no_weight_in_a_layer_is_named(damaged: Callable[[str], Path]) -> None:
    tag = damaged("pp2-z1-bf16opt")
    before = set(dsconv.open_checkpoint(tag))
    extra = {"l._extra_state": {"scale": torch.ones(2)}, "l.name": "linear", "l.nothing": None}
    change_layer(tag, lambda held: held.update(extra))
    checkpoint = dsconv.open_checkpoint(tag)
    assert set(checkpoint) == before
    (warning,) = (text for text in checkpoint.warnings if "left out" in text)
    assert "left out 2 entries without a tensor: 'l._extra_state', 'l.name'" in warning


def test_a_tied_copy_that_differs_between_stages(made: Callable[[str], Trained]) -> None:
    """Real training gives this: the last stage's copy of the tied module has an embedding that is not synced."""
    error(
        made("pp2-z1-unsynced").checkpoint,
        InconsistentCheckpointError,
        "'tied_modules.embed.place.weight'",
        "mp_rank_00",
        "mp_rank_01",
    )


def test_tensor_parallel_stages_without_rules(made: Callable[[str], Trained]) -> None:
    error(
        made("pp2-tp2-z1-noinfo").checkpoint,
        UnsupportedError,
        "universal_checkpoint_info",
        "'tied_modules.embed.word.weight'",
    )


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        (
            "pp2-dp2-z1-bf16",
            "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt",
            ["bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"],
        ),
        (
            "pp2-tp2-z1",
            "bf16_zero_pp_rank_0_mp_rank_02_optim_states.pt",
            ["mp_rank_02_model_states.pt", "optim_states.pt"],
        ),
        ("pp2-tp2-z1", "*mp_rank_03*", ["mp_rank_03", "4 model-parallel ranks"]),
        ("pp2-z1-fp32", "*mp_rank_01*", ["mp_rank_01", "2 model-parallel ranks"]),
        ("pp2-z1-bf16", "layer_03-model_states.pt", ["layer_03-", "'3."]),
        ("pp2-tp2-z1", "layer_03-model_01-model_states.pt", ["layer_03-model_01-model_states.pt"]),
        ("pp2-z0-bf16", "layer_01-model_states.pt", ["'1.", "no file beside it"]),
        ("pp2-z0-fp32", "layer_01-model_states.pt", ["layer_01-", "'1."]),
        ("pp2-z0-fp32", "mp_rank_01_model_states.pt", ["mp_rank_01"]),
    ],
)
def test_a_file_is_missing(name: str, lost: str, words: list[str], damaged: Callable[[str], Path]) -> None:
    tag = damaged(name)
    for path in list(tag.glob(lost)):
        path.unlink()
    error(tag, MissingShardError, *words)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("pp2-z1-bf16", "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        (
            "pp2-z1-bf16",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt",
        ),
        ("pp2-z1-bf16", "layer_01-model_states.pt", "layer_03-model_states.pt"),
        ("pp2-tp2-z1", "layer_01-model_00-model_states.pt", "layer_01-model_01-model_states.pt"),
    ],
)
def test_swapped_files(name: str, one: str, other: str, damaged: Callable[[str], Path]) -> None:
    tag = damaged(name)
    (tag / one).rename(tag / "aside")
    (tag / other).rename(tag / one)
    (tag / "aside").rename(tag / other)
    error(tag, InconsistentCheckpointError, "was written as")


def test_swapped_layers_without_their_own_names(damaged: Callable[[str], Path]) -> None:
    """The files were written through a stream, so only the masters show that the weights beside them are not theirs."""
    tag = damaged("pp2-z1-bf16")
    states = {n: torch.load(tag / f"layer_{n:02d}-model_states.pt", weights_only=False) for n in (1, 3)}
    for n, state in ((1, states[3]), (3, states[1])):
        with (tag / f"layer_{n:02d}-model_states.pt").open("wb") as stream:
            torch.save(state, stream)
    warnings = dsconv.open_checkpoint(tag).warnings
    assert [w.split(" between ")[1].split(" ")[0] for w in warnings] == [
        "layer_01-model_states.pt",
        "layer_03-model_states.pt",
    ]


def test_a_stage_of_another_step(damaged: Callable[[str], Path]) -> None:
    tag = damaged("pp2-z1-bf16")
    state = torch.load(tag / "mp_rank_01_model_states.pt", weights_only=False) | {"global_steps": 7}
    torch.save(state, tag / "mp_rank_01_model_states.pt")
    error(tag, InconsistentCheckpointError, "step 2", "step 7")


def test_stages_of_two_runs(damaged: Callable[[str], Path], made: Callable[[str], Trained]) -> None:
    """One file comes from a run with more data-parallel ranks and has the same name."""
    tag = damaged("pp2-z1-bf16")
    for path in made("pp2-dp2-z1-bf16").checkpoint.glob("global_step2/*mp_rank_01*"):
        shutil.copy(path, tag)
    error(tag, InconsistentCheckpointError, "data-parallel world 1", "data-parallel world 2")


def test_a_tied_layer_saved_twice_is_one_tensor(damaged: Callable[[str], Path]) -> None:
    """Two layers that run the tied module's forward have a file each, and the second must be a copy of the first."""
    tag = damaged("pp2-z1-bf16")
    state = torch.load(tag / "layer_00-model_states.pt", weights_only=False)
    torch.save(state, tag / "layer_06-model_states.pt")
    checkpoint = dsconv.open_checkpoint(tag)
    assert "6.word.weight" not in checkpoint
    assert not checkpoint.warnings
    state["word.weight"] = state["word.weight"] + 1
    torch.save(state, tag / "layer_06-model_states.pt")
    # The layer's weights no longer match the tied module's masters, so it is a separate layer.
    assert "6.word.weight" in dsconv.open_checkpoint(tag)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.options.stage == 1 and n not in REFUSED][:3])
def test_the_model_s_own_weights(made: Callable[[str], Trained], name: str) -> None:
    """``weights="16bit"`` takes the weights of the layer files, which equal the cast masters."""
    masters = dsconv.open_checkpoint(made(name).checkpoint)
    own = dsconv.open_checkpoint(made(name).checkpoint, weights="16bit")
    assert set(own) == set(masters)
    for key, entry in own.items():
        assert torch.equal(masters[key].read().to(entry.read().dtype), entry.read()), key
