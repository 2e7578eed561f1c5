"""``to-universal`` from AutoTP and pipeline checkpoints, compared with the truth, with the official tool, and with
engines in other layouts that load it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv.errors import DsconvError, InconsistentCheckpointError, MissingShardError, UnsupportedError
from tests.convert.test_to_universal import edited, equal, files, load, official
from tests.fixtures import autotp, gloo, universal_mp
from tests.fixtures.universal_mp_resume import Resume, run
from tests.trained import load_safetensors, same

NAMES = list(universal_mp.TRAINED)

# For each source, the tensor-, pipeline- and data-parallel degrees and stages that load it. With True the engine also
# trains on, as the original did.
PLANS: dict[str, list[tuple[int, int, int, int, bool]]] = {
    "llama-tp2-dp2-z1": [
        (2, 1, 1, 1, False),
        (2, 1, 2, 1, True),
        (1, 1, 2, 1, False),
        (4, 1, 1, 1, False),
        (3, 1, 1, 2, False),
        (2, 1, 2, 3, False),
        (1, 1, 2, 3, False),
    ],
    "qwen-tp2-dp2-z2": [(2, 1, 2, 2, True), (1, 1, 2, 2, False), (3, 1, 1, 1, False), (2, 1, 2, 3, False)],
    "fused-tp2-dp2-z1": [(2, 1, 1, 1, False), (1, 1, 2, 1, False), (3, 1, 1, 2, False), (4, 1, 1, 1, False)],
    "fused-tp3-z2": [(2, 1, 1, 2, False), (3, 1, 1, 2, True), (1, 1, 2, 2, False), (4, 1, 1, 2, False)],
    "llama-tp4-z1": [(2, 1, 2, 1, False), (1, 1, 1, 1, False), (4, 1, 1, 1, True)],
    "llama-tp2-z1-bf16opt": [(2, 1, 2, 1, False), (2, 1, 1, 1, True), (1, 1, 2, 1, False), (3, 1, 1, 1, False)],
    "llama-tp2-z2-frozen": [(2, 1, 2, 2, False), (1, 1, 2, 2, False)],
    "codegen-tp2-z1": [(2, 1, 2, 1, False), (1, 1, 2, 1, False), (4, 1, 1, 1, False)],
    "llama-tp2-dp2-z3": [
        (2, 1, 1, 3, False),
        (4, 1, 1, 3, False),
        (2, 1, 2, 3, True),
        (1, 1, 2, 3, False),
        (2, 1, 2, 1, False),
        (1, 1, 3, 2, False),
    ],
    "fused-tp2-z3": [
        (2, 1, 1, 3, True),
        (3, 1, 1, 3, False),
        (2, 1, 2, 3, False),
        (1, 1, 2, 3, False),
        (3, 1, 1, 1, False),
    ],
    "pp2-dp2-z1": [(1, 2, 2, 1, True), (1, 2, 1, 1, False), (1, 1, 2, 1, False), (1, 3, 1, 1, False)],
    "pp2-z1-fp16": [(1, 2, 1, 1, True), (1, 1, 2, 1, False)],
    "pp2-z1-frozen": [(1, 2, 2, 1, False), (1, 1, 1, 1, False)],
    "pp3-z1-bf16opt": [(1, 3, 1, 1, True), (1, 2, 2, 1, False), (1, 1, 2, 1, False)],
    "pp2-tp2-z1": [
        (2, 2, 1, 1, True),
        (2, 1, 2, 1, False),
        (1, 1, 2, 1, False),
        (1, 2, 1, 1, False),
        (4, 1, 1, 1, False),
    ],
    "pp1-tp2-dp2-z1": [(2, 1, 1, 1, False), (1, 2, 1, 1, False), (2, 2, 1, 1, False)],
    "pp2-tp2-z1-unsynced": [(2, 2, 1, 1, False), (1, 1, 1, 1, False)],
}
RESUMES = [Resume(source, "", *plan) for source, plans in PLANS.items() for plan in plans]
# DeepSpeed's loader cuts evenly by the trainer's patterns (0.19.8, universal_checkpoint.py), and 10 rows of 2 parts
# cannot be divided by 4.
REFUSED_BY_DEEPSPEED = {"pp2-tp2-z1-to-tp4-pp1-dp1-z1": r"zero/\d\.gate_up\.weight/.*full param numel 120"}


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return gloo.ensure("universal_mp")


@pytest.fixture(scope="module")
def converted(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return the universal tag folder that dsconv makes of each case."""
    root = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        dsconv.to_universal(made[name] / "ckpt", root / name / "universal", fsync=False, verify_output=True)
    yield {name: root / name / "universal" for name in NAMES}
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def resumed(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("resumed")
    yield run([Resume(**{**vars(resume), "path": str(converted[resume.source].parent)}) for resume in RESUMES], root)
    shutil.rmtree(root)


@pytest.mark.parametrize("name", NAMES)
def test_every_state_is_the_truth(name: str, made: dict[str, Path], converted: dict[str, Path]) -> None:
    out, truth = converted[name] / "zero", load_safetensors(made[name] / "truth.safetensors")
    steps = json.loads((made[name] / "facts.json").read_text())["steps"]
    for key, tensor in truth.items():
        value = load(out / f"{key}.pt")["param"]
        assert same(value.reshape(tensor.shape), tensor), key
        assert [float(load((out / key).parent / "step.pt"))] == steps, key
    moments = {f"{path.parent.name}/{path.stem}" for path in out.glob("*/exp_avg*.pt")}
    assert moments == {key for key in truth if not key.endswith("/fp32")}


def test_where_the_official_tool_fails(made: dict[str, Path]) -> None:
    """The tool fails for ranks without elements and for patterns of frozen weights (0.19.8). This test notices when
    that changes.
    """
    failed = {name for name in NAMES if json.loads((made[name] / "facts.json").read_text())["official"]}
    assert failed == {"llama-tp4-z1", "llama-tp2-z2-frozen"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama-tp4-z1", "llama-tp2-z2-frozen")])
def test_it_writes_what_the_official_tool_writes(name: str, made: dict[str, Path], converted: dict[str, Path]) -> None:
    theirs, ours = official(made[name]), converted[name]
    layout = universal_mp.TRAINED[name]
    extra = files(ours) - files(theirs)
    assert not files(theirs) - files(ours)
    other = "mp_rank_{:02d}_model_states.pt" if layout.stage == 3 else "zero_pp_rank_0_mp_rank_{:02d}_model_states.pt"
    expected = {"latest_universal", *(other.format(mp) for mp in range(layout.tp * layout.pp))}
    # Buffers and frozen weights of a pipeline are in layer files, which the official tool ignores.
    known = {
        path
        for path in extra
        if re.search(r"\d\.(mask|count|table)/|/1\.(down\.weight|norm\.bias)/", path) and layout.model == "pipeline"
    }
    assert {path for path in extra - known if not (layout.stage == 3 and path.endswith("/step.pt"))} == expected
    for path in sorted(files(theirs)):
        if path.endswith("model_states.pt"):
            assert (theirs / path).read_bytes() == (ours / path).read_bytes()
            continue
        want, found = load(theirs / path), load(ours / path)
        # DeepSpeed's file holds rank 0's partitions, which no loader reads.
        if path == "zero/optimizer_state.pt" and layout.stage == 3:
            nested = [of.pop("optimizer_state_dict") for of in (want, found)]
            assert equal(nested[0]["param_groups"], nested[1]["param_groups"])
            assert equal(nested[0]["state"][0]["step"], nested[1]["state"][0]["step"])
        if path == "zero/optimizer_state.pt":
            assert all(equal(want[key], found[key]) for key in want if key != "fp32_flat_groups")
        # For a tied name, DeepSpeed writes only rank 0's shard.
        elif path == "zero/lm_head.weight/fp32.pt" and name.startswith("qwen"):
            assert same(want["param"], found["param"][: len(want["param"])])
        else:
            assert equal(want, found), path


@pytest.mark.parametrize("resume", RESUMES, ids=lambda resume: resume.name)
def test_an_engine_over_other_ranks_has_every_bit(
    resume: Resume, made: dict[str, Path], resumed: dict[str, Path]
) -> None:
    origin, found = made[resume.source], resumed[resume.name]
    failure = (found / "failed.txt").read_text() if (found / "failed.txt").exists() else None
    if resume.name in REFUSED_BY_DEEPSPEED:
        assert failure is not None
        assert re.search(REFUSED_BY_DEEPSPEED[resume.name], failure), failure
        return
    assert failure is None, failure
    for truth, loaded in [("truth", "states"), ("after", "after")][: 1 + resume.goes_on]:
        expected, states = (
            load_safetensors(origin / f"{truth}.safetensors"),
            load_safetensors(found / f"{loaded}.safetensors"),
        )
        assert set(states) == set(expected)
        for name, tensor in expected.items():
            assert same(states[name], tensor), f"{name} ({loaded})"
    before, now = (json.loads((folder / "facts.json").read_text()) for folder in (origin, found))
    assert now["path"] is not None
    assert now["epoch"] == 3
    for fact in ("steps", "groups", "global_steps", "loss_scale"):
        assert now[fact] == before[fact], fact


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_back_as_a_source(name: str, made: dict[str, Path], converted: dict[str, Path]) -> None:
    plain = dsconv.open_checkpoint(made[name] / "ckpt")
    if name.endswith("frozen") and name.startswith("llama"):
        with pytest.raises(UnsupportedError, match="frozen weights such as"):
            dsconv.open_checkpoint(converted[name])
        return
    back = dsconv.open_checkpoint(converted[name])
    assert set(back) == set(plain)
    assert back.step == plain.step
    for key, entry in back.items():
        assert entry.role == plain[key].role
        assert same(entry.read(), plain[key].read().to(entry.read().dtype)), key
        assert entry.dtype == plain[key].dtype or (name.startswith("pp") and entry.role != "parameter")
    copies = [warning for warning in back.warnings if "fp32 copies" in warning]
    assert len(copies) == name.startswith("pp")


def test_stage_3_over_tensor_parallel_ranks_is_read_whole_or_refused(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    lacking = Path(shutil.copytree(converted["llama-tp2-dp2-z3"], tmp_path / "lacking"))
    (lacking / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(MissingShardError, match=r"no zero_pp_rank_0_mp_rank_00_model_states\.pt"):
        dsconv.open_checkpoint(lacking)
    name = "llama-tp2-z3-frozen"
    dsconv.to_universal(
        gloo.ensure("autotp", [name])[name] / "ckpt", tmp_path / "frozen", fsync=False, verify_output=True
    )
    with pytest.raises(
        UnsupportedError, match=r"frozen weights such as .model\.embed_tokens\.weight. in 2 model-parallel ranks"
    ):
        dsconv.open_checkpoint(tmp_path / "frozen")


def test_the_official_tools_pipelines_lack_buffers(made: dict[str, Path]) -> None:
    checkpoint = dsconv.open_checkpoint(official(made["pp2-dp2-z1"]))
    assert any("'1.count' were in the pipeline's layer files" in warning for warning in checkpoint.warnings)
    assert "1.count" not in checkpoint


def test_a_plan_instead_of_patterns(made: dict[str, Path], tmp_path: Path) -> None:
    """For a trainer without universal_checkpoint_info, config.json decides and gives the same as the patterns would."""
    source = edited(
        made["llama-tp2-dp2-z1"] / "ckpt",
        tmp_path / "ckpt",
        "mp_rank_*",
        lambda value: value.pop("universal_checkpoint_info"),
    )
    model: Any = autotp.build(autotp.Options("llama", 2, 1))
    model.config.save_pretrained(source)
    dsconv.to_universal(source, tmp_path / "out", fsync=False, verify_output=True)
    for key, tensor in load_safetensors(made["llama-tp2-dp2-z1"] / "truth.safetensors").items():
        value = load(tmp_path / "out" / "zero" / f"{key}.pt")
        assert same(value["param"], tensor), key
        cut = 1 if re.search("o_proj|down_proj", key) else 0 if re.search("_proj|lm_head", key) else None
        assert value.get("cat_dim") == cut, key


# What cannot be converted --------------------------------------------------------------------------------------------


def _state(value: Any) -> Any:
    return value["optimizer_state_dict"]["base_optimizer_state"]["state"]


def _other_moment(value: Any) -> None:
    """Change the moments of everything on the rank, so also of tensors that should be equal on all ranks."""
    for state in _state(value).values():
        state["exp_avg"] = state["exp_avg"] + 1


def _no_moment(value: Any) -> None:
    for state in _state(value).values():
        del state["exp_avg_sq"]


def _later(value: Any) -> None:
    """Change the step of the second group. The first group's step is compared when the checkpoint is opened."""
    _state(value)[1]["step"] = _state(value)[1]["step"] + 1


def _wide(value: Any) -> None:
    for state in _state(value).values():
        state["exp_avg"] = state["exp_avg"].double()


BAD: dict[str, tuple[str, str, Callable[[Any], None], type[DsconvError], str]] = {
    "copies_differ": (
        "llama-tp2-z1-bf16opt",
        "*mp_rank_01_optim*",
        _other_moment,
        InconsistentCheckpointError,
        "optimizer's 'exp_avg' of 'model.*should be the same.*differs between rank 0",
    ),
    "missing_on_a_rank": (
        "fused-tp3-z2",
        "*mp_rank_02_optim*",
        _no_moment,
        InconsistentCheckpointError,
        "no 'exp_avg_sq' of 'scale' on model-parallel rank 2",
    ),
    "another_step": (
        "llama-tp2-z1-bf16opt",
        "*mp_rank_01_optim*",
        _later,
        InconsistentCheckpointError,
        "step of 'model.* differs",
    ),
    "another_dtype": (
        "fused-tp3-z2",
        "*mp_rank_01_optim*",
        _wide,
        InconsistentCheckpointError,
        "'exp_avg' of 'scale' has another dtype",
    ),
    "tied_stages_differ": (
        "pp2-z1-fp16",
        "*mp_rank_01_optim*",
        _other_moment,
        InconsistentCheckpointError,
        "'exp_avg' of tied parameter 'tied_modules.embed.*differs between pipeline stages",
    ),
    "tied_stage_lacks_it": (
        "pp3-z1-bf16opt",
        "*mp_rank_02_optim*",
        _no_moment,
        InconsistentCheckpointError,
        "'exp_avg_sq' of tied parameter",
    ),
    "stages_of_other_steps": (
        "pp2-z1-fp16",
        "*mp_rank_01_optim*",
        _later,
        InconsistentCheckpointError,
        "step of tied parameter 'tied_modules.embed",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_optimizer_states_are_named(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    name, pattern, edit, error, words = BAD[kind]
    source = edited(made[name] / "ckpt", tmp_path / "ckpt", pattern, edit)
    with pytest.raises(error, match=words) as caught:
        dsconv.to_universal(source, tmp_path / "out")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_hyperparameters_of_the_first_rank(made: dict[str, Path], tmp_path: Path) -> None:
    def slower(value: Any) -> None:
        value["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 0.5

    source = edited(made["pp2-z1-frozen"] / "ckpt", tmp_path / "ckpt", "*mp_rank_01_optim*", slower)
    report = dsconv.to_universal(source, tmp_path / "out", fsync=False)
    assert any("hyperparameters" in warning for warning in report.warnings)
    assert load(tmp_path / "out" / "zero" / "optimizer_state.pt")["param_groups"][0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("maker", "name", "words"),
    [
        ("moe", "z1-fp32-w2-ep1", "experts have optimizer states of their own"),
        ("moe", "mixtral-z3-fp32-w2-ep2", "experts have optimizer states of their own"),
        ("pipeline", "pp2-z0-fp32", "without ZeRO .stage 0., where the stages of a pipeline"),
        ("pipeline", "pp2-z0-fp16", "without ZeRO .stage 0., where the stages of a pipeline"),
    ],
)
def test_what_is_refused_says_why(maker: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=words):
        dsconv.to_universal(gloo.ensure(maker, [name])[name] / "ckpt", tmp_path / "out")


def test_torch_is_still_not_needed(made: dict[str, Path], tmp_path: Path) -> None:
    from tests.cli.running import dsconv as command

    ran = command("to-universal", made["llama-tp4-z1"] / "ckpt", tmp_path / "out", python=("-X", "importtime"))
    assert ran.code == 0
    assert " torch" not in {line.rsplit("|", 1)[-1] for line in ran.err.splitlines()}
