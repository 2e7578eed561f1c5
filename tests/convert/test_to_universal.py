"""``to-universal`` writes every state exactly, and the same files as the official tool where that works."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.convert.staging import open_staging
from dsconv.errors import (
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    OutputError,
    UnsafeError,
    UnsupportedError,
)
from tests.cli.running import dsconv as command
from tests.fixtures import gloo, universal
from tests.fixtures.gloo import DATA
from tests.fixtures.universal import PATTERNS
from tests.trained import Trained, load_safetensors, raw, same

OLD = DATA / "old_releases"
NAMES = list(universal.CASES)


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return gloo.ensure("universal")


@pytest.fixture(scope="module")
def converted(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return the universal tag folder that dsconv makes of a case, once per session."""
    root = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        if not (root / name).exists():
            dsconv.to_universal(made[name] / "ckpt", root / name / "universal", fsync=False)
        return root / name / "universal"

    yield convert
    shutil.rmtree(root)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def official(folder: Path) -> Path:
    return next(iter((folder / "official").glob("global_step*_universal")))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [name for name in NAMES if "patterns" not in name])
def test_every_state_is_the_truth(name: str, made: dict[str, Path], converted: Callable[[str], Path]) -> None:
    out, facts = converted(name), json.loads((made[name] / "facts.json").read_text())
    truth = load_safetensors(made[name] / "truth.safetensors")
    for key, tensor in truth.items():
        value = load(out / "zero" / f"{key}.pt")["param"]
        assert same(value.reshape(tensor.shape), tensor), key
        assert list(value.shape) == (list(tensor.shape) or [1]), key
        step = out / "zero" / key.rsplit("/", 1)[0] / "step.pt"
        assert ([float(load(step))] if step.exists() else []) == facts["steps"]
    found = {f"{path.parent.name}/{path.stem}" for path in (out / "zero").glob("*/*.pt") if path.stem != "step"}
    assert {key for key in found if not key.endswith("/fp32")} == {key for key in truth if not key.endswith("/fp32")}
    assert (out / "latest_universal").read_text() == "."
    assert (out.parent / "latest_universal").read_text() == "universal"


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__module__.startswith("deepspeed") and not isinstance(a, int):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return bool(a == b)


COMPARED = [name for name in NAMES if not name.endswith(("roundrobin", "elastic", "lion", "adagrad", "sgd", "momentum"))
            and "-z0-" not in name and name not in ("odd-z2-fp32-w2", "odd-z1-bf16-w3")]  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_it_writes_what_the_official_tool_writes(
    name: str, made: dict[str, Path], converted: Callable[[str], Path]
) -> None:
    theirs, ours = official(made[name]), converted(name)
    stage = universal.CASES[name].options.stage
    extra = files(ours) - files(theirs)
    assert not files(theirs) - files(ours)
    model = "mp_rank_00_model_states.pt" if stage == 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    allowed = {"latest_universal", model}  # the second name, under which other stages look for the model states
    assert {path for path in extra if not path.endswith("/step.pt" if stage == 3 else "/max_exp_avg_sq.pt")} == allowed
    for path in sorted(files(theirs)):
        if path.endswith("model_states.pt"):
            assert (theirs / path).read_bytes() == (ours / path).read_bytes()
            continue
        expected, found = load(theirs / path), load(ours / path)
        if path == "zero/optimizer_state.pt":
            # These are rank 0's, whole; no loader reads them.
            flat = {"fp32_flat_groups", "optimizer_state_dict"} if stage == 3 else set()
            for key in set(expected) - flat:
                assert equal(expected[key], found[key]), key
            if stage == 3:
                assert equal(
                    expected["optimizer_state_dict"]["param_groups"], found["optimizer_state_dict"]["param_groups"]
                )
                assert equal(
                    expected["optimizer_state_dict"]["state"][0]["step"],
                    found["optimizer_state_dict"]["state"][0]["step"],
                )
        elif stage == 3:
            assert same(expected, found["param"].flatten()), path
        else:
            assert equal(expected, found), path


def test_the_official_tool_fails_or_errs_where_dsconv_does_not(
    made: dict[str, Path], converted: Callable[[str], Path]
) -> None:
    """COMPARED leaves these cases out. This test notices when the tool changes."""
    failed = {name for name in NAMES if json.loads((made[name] / "facts.json").read_text())["official"]}
    assert failed == set(NAMES) - set(COMPARED) - {"llama_groups-z2-bf16-w2-roundrobin"}
    name = "llama_groups-z2-bf16-w2-roundrobin"
    truth = load_safetensors(made[name] / "truth.safetensors")
    wrong = [
        key
        for key, tensor in truth.items()
        if not same(load(official(made[name]) / "zero" / f"{key}.pt")["param"], tensor)
    ]
    assert wrong, "param_slice_mappings were wrong under round_robin_gradients in 0.19.8"


def test_patterns_decide_the_keys(converted: Callable[[str], Path]) -> None:
    zero = converted("odd-z2-fp32-w2-patterns") / "zero"
    assert load(zero / "embed.weight" / "fp32.pt")["param"].shape == (PATTERNS["original_vocab_size"], 7)
    assert load(zero / "embed.weight" / "exp_avg.pt")["vocab_tensor"] is True
    assert set(load(zero / "one" / "fp32.pt")) == {"param"}
    assert load(zero / "twin.weight" / "fp32.pt")["cat_dim"] == 1
    assert load(zero / "pair.weight" / "fp32.pt")["param_n_sub_params"] == 2
    assert load(zero / "cube" / "fp32.pt")["sub_param_shape"].shape == ((1, 2), -1)


@pytest.mark.parametrize("name", NAMES)
def test_both_tools_output_is_read_as_a_source(
    name: str, made: dict[str, Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    truth = {
        k.removesuffix("/fp32"): v
        for k, v in load_safetensors(made[name] / "truth.safetensors").items()
        if k.endswith("/fp32")
    }
    facts = json.loads((made[name] / "facts.json").read_text())
    sources = [converted(name)]
    if facts["official"] is None and "roundrobin" not in name:
        sources.append(official(made[name]).parent)
    plain = dsconv.open_checkpoint(made[name] / "ckpt")
    for number, source in enumerate(sources):
        checkpoint = dsconv.open_checkpoint(source)
        assert checkpoint.format == "DeepSpeed universal"
        assert checkpoint.step == facts["global_steps"]
        assert list(checkpoint) == list(plain)
        assert checkpoint.ties == plain.ties
        for key, entry in checkpoint.items():
            expected = truth[key] if key in truth else plain[key].read()
            if "patterns" in name and key == "embed.weight":
                expected = expected[: PATTERNS["original_vocab_size"]]
            assert same(entry.read(), expected), key
            if name != "odd-z0-fp32-w2":  # without masters the source does not record what was frozen
                assert entry.role == plain[key].role
        report = dsconv.merge(source, tmp_path / str(number), fsync=False, verify_output=True)
        assert report.tensors == len(plain)
        if "patterns" not in name:
            assert dsconv.verify(made[name] / "ckpt", source).equal


@pytest.mark.parametrize(
    "name",
    [
        "llama_tied-z1-bf16-w2-trainer",
        "llama_tied-z3-bf16-w2-trainer",
        "llama_lora-z2-bf16-w3",
        "llama_groups-z3-bf16-w4-hpz",
        "odd-z2-bf16-w2-client",
        "llama_tied-z2-bf16-w2-cpuadam",
        "llama_groups-z2-bf16-w2-bf16master",
    ],
)
def test_other_checkpoints_convert_and_verify(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(name)
    report = dsconv.to_universal(made.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    assert report.verified
    assert report.states == ["fp32", "exp_avg", "exp_avg_sq"]
    merged = {key: entry.read() for key, entry in dsconv.open_checkpoint(tmp_path / "out").items()}
    made.check(merged)


@pytest.mark.parametrize("release", ["0.10.3", "0.14.5", "0.18.9"])
def test_old_releases_get_the_form_that_they_read(release: str, tmp_path: Path) -> None:
    """Before 0.19.4, stage 3 reads only bare flat tensors. Stages 1 and 2 have always read dicts."""
    for source in sorted(path for path in (OLD / release).iterdir() if path.name.startswith("zero")):
        dsconv.to_universal(source, tmp_path / source.name, fsync=False, verify_output=True)
        value = load(next((tmp_path / source.name / "zero").glob("*/exp_avg.pt")))
        assert isinstance(value, torch.Tensor) == source.name.startswith("zero3")
        assert dsconv.verify(source, tmp_path / source.name).equal


# The command and its output ------------------------------------------------------------------------------------------


def test_command(made: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(made["llama_frozen-z2-bf16-w2"] / "ckpt", tmp_path / "ckpt"))
    planned = command("to-universal", source, "--dry-run")
    assert planned.code == 0
    assert "/exp_avg_sq.pt " in planned.out
    assert "more rows; --json lists all of them" in planned.out
    assert not (source / "global_step2_universal").exists()
    ran = command("to-universal", source, "--json", "--verify", "--workers", "1")
    assert ran.code == 0, ran.err
    report = ran.json
    out = source / "global_step2_universal"
    assert report["output"] == str(out)
    assert report["verified"] is True
    # Not counted: the second name of the model states, and latest_universal.
    assert report["files"] == len(files(out)) - 2
    written = [path for path in files(out) if "_rank_0_" not in path and path != "latest_universal"]
    assert report["nbytes"] == sum((out / path).stat().st_size for path in written)
    assert (source / "latest_universal").read_text() == out.name
    assert not list(source.glob(".*"))
    assert dsconv.open_checkpoint(source).format == "ZeRO-2"  # latest takes precedence over latest_universal
    assert dsconv.open_checkpoint(source, tag=out.name).format == "DeepSpeed universal"
    again = command("to-universal", source)
    assert again.code == 3
    assert "--force" in again.err
    assert command("to-universal", source, "--force", "--quiet", "--exclude-frozen").out == ""
    kept = {path.name for path in (out / "zero").iterdir()}
    assert "model.layers.0.input_layernorm.weight" not in kept
    assert "model.layers.1.input_layernorm.weight" in kept
    assert dsconv.verify(source, out).equal
    ran = command("to-universal", source, tmp_path / "elsewhere", "--no-fsync")
    assert "2 parameters" not in ran.out
    assert "each with fp32, exp_avg, exp_avg_sq" in ran.out
    assert (tmp_path / "latest_universal").read_text() == "elsewhere"


def test_torch_is_not_imported_for_a_copy(made: dict[str, Path], tmp_path: Path) -> None:
    ran = command(
        "to-universal", made["llama_frozen-z3-bf16-w2"] / "ckpt", tmp_path / "out", python=("-X", "importtime")
    )
    assert ran.code == 0
    assert " torch" not in {line.rsplit("|", 1)[-1] for line in ran.err.splitlines()}


def test_each_source_byte_is_read_once(made: dict[str, Path], tmp_path: Path) -> None:
    source = made["mixtral-z3-bf16-w3"] / "ckpt" / "global_step2"
    report = dsconv.to_universal(source, tmp_path / "out", fsync=False, workers=3)
    optimizer = sum(path.stat().st_size for path in source.glob("*optim_states.pt"))
    model = sum(path.stat().st_size for path in source.glob("*model_states.pt"))
    assert report.bytes_read <= optimizer + model


def test_frozen_weights_are_read_twice_at_most(made: dict[str, Path], tmp_path: Path) -> None:
    """They are read once with the model states, and once to be cast, which also checks their CRC-32s."""
    source = made["llama_frozen-z2-bf16-w2"] / "ckpt"
    report = dsconv.to_universal(source, tmp_path / "out", fsync=False)
    frozen = sum(entry.nbytes for entry in dsconv.open_checkpoint(source).values() if entry.role != "parameter")
    assert report.bytes_read <= sum(path.stat().st_size for path in source.glob("*/*.pt")) + frozen
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    piece = dsconv.open_checkpoint(damaged)["model.embed_tokens.weight"].pieces[0]
    with open(piece.extent.record.path, "r+b") as file:
        file.seek(piece.extent.offset_bytes)
        file.write(b"\xff")
    with pytest.raises(MalformedError, match="fails its CRC-32"):
        dsconv.to_universal(damaged, tmp_path / "other")


def test_a_sources_damage_is_found_and_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "ckpt"))
    training = dsconv.open_checkpoint(source).training
    assert training is not None
    piece = training().states["model.norm.weight"]["exp_avg_sq"].pieces[0]
    with open(piece.extent.record.path, "r+b") as file:
        file.seek(piece.extent.offset_bytes)
        file.write(b"\xff")
    with pytest.raises(MalformedError, match="fails its CRC-32"):
        dsconv.to_universal(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "latest_universal").exists()


def test_what_a_killed_run_left_is_cleared(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        with open_staging(out, sync=False) as staging:
            staging.create("zero/w/fp32.pt", 8, True, False).begin(b"")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (out / ".dsconv-partial" / "zero" / "w" / "fp32.pt").is_file()
    dsconv.to_universal(made["llama_groups-z2-bf16-w2"] / "ckpt", out, fsync=False)
    assert not (out / "zero" / "w").exists()
    assert not (out / ".dsconv-partial").exists()
    dsconv.open_checkpoint(out)


def test_a_file_system_without_hard_links(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    dsconv.to_universal(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "out")
    first, second = (tmp_path / "out" / f"{prefix}mp_rank_00_model_states.pt" for prefix in ("", "zero_pp_rank_0_"))
    assert first.read_bytes() == second.read_bytes()


def test_a_parent_that_cannot_be_written_is_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "latest_universal").mkdir()
    report = dsconv.to_universal(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "out")
    assert any("could not be written" in warning for warning in report.warnings)
    assert not list(tmp_path.glob(".latest*"))


# Sources that cannot be converted ------------------------------------------------------------------------------------


def edited(source: Path, folder: Path, pattern: str, edit: Callable[[Any], None]) -> Path:
    """Return a copy of a checkpoint in which ``edit`` has changed the object of each matching file."""
    copy = Path(shutil.copytree(source, folder))
    for path in copy.glob(f"*/{pattern}"):
        value = load(path)
        edit(value)
        torch.save(value, path)
    return copy


def _eight_bit(value: Any) -> None:
    state = value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["absmax1"] = torch.zeros(3)


def _missing(value: Any) -> None:
    del value["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"]


def _step(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] += 1


def _word(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = "two"


def _path(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["../../evil"] = value["optimizer_state_dict"][
        "base_optimizer_state"
    ]["state"][0]["exp_avg"]


def _none(value: Any) -> None:
    del value["optimizer_state_dict"]["base_optimizer_state"]


def _object(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = torch.device("cpu")


def _dtype(value: Any) -> None:
    state = value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"].bfloat16()


BAD: dict[str, tuple[str, Callable[[Any], None], type[DsconvError], str]] = {
    "eight_bit": ("*pp_rank_*", _eight_bit, UnsupportedError, "absmax1"),
    "missing_on_a_rank": ("*pp_rank_1_*", _missing, InconsistentCheckpointError, "exp_avg"),
    "steps": ("*pp_rank_1_*", _step, InconsistentCheckpointError, "optimizer steps"),
    "step_is_a_word": ("*pp_rank_0_*", _word, MalformedError, "expected a number"),
    "path": ("*pp_rank_*", _path, UnsafeError, "evil"),
    "no_state": ("*pp_rank_0_*", _none, MalformedError, "no state of the base optimizer"),
    "object": ("*pp_rank_0_*", _object, UnsupportedError, "param_groups"),
    "dtype": ("*pp_rank_1_*", _dtype, InconsistentCheckpointError, "dtype"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_optimizer_states_are_named(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    pattern, edit, error, words = BAD[kind]
    source = edited(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "ckpt", pattern, edit)
    with pytest.raises(error, match=words) as caught:
        dsconv.to_universal(source, tmp_path / "out")
    assert isinstance(caught.value, DsconvError)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


def _info(**info: Any) -> Callable[[Any], None]:
    return lambda value: value.update(universal_checkpoint_info={**PATTERNS, **info})


BAD_INFO: dict[str, tuple[dict[str, Any], type[DsconvError], str]] = {
    "slow": ({"vocabulary_parameter_patterns": ["(a+)+$"]}, UnsupportedError, "regular expressions"),
    "no_pattern": ({"vocabulary_parameter_patterns": ["[a"]}, UnsupportedError, "regular expressions"),
    "no_text": ({"vocabulary_parameter_patterns": [3]}, MalformedError, "list of name patterns"),
    "rows": ({"original_vocab_size": "many"}, MalformedError, "rows"),
    "sub_params": ({"parameter_with_sub_params": [3]}, MalformedError, "sub_params"),
    "sub_shape": (
        {"parameter_with_sub_params": [{"patterns": ["cube"], "shape": (4, -1), "partition_dim": 0}]},
        MalformedError,
        "cube",
    ),
    "affine_version": ({"affine_map": {"version": 9}}, UnsupportedError, "version 9"),
    "affine_shape": (
        {"affine_map": {"params": {"pair": {"logical_shape": (5, 7)}}}},
        MalformedError,
        "affine map of 'pair",
    ),
}


@pytest.mark.parametrize("kind", BAD_INFO)
def test_bad_patterns_are_named(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    info, error, words = BAD_INFO[kind]
    source = edited(made["odd-z2-fp32-w2-patterns"] / "ckpt", tmp_path / "ckpt", "mp_rank_00*", _info(**info))
    with pytest.raises(error, match=words):
        dsconv.to_universal(source, tmp_path / "out")


def test_scalar_states_and_numbers_of_numpy(made: dict[str, Path], tmp_path: Path) -> None:
    """The format has no place for NAdam's mu_product. A learning rate that a scheduler made with numpy is a number."""
    import numpy as np

    def edit(value: Any) -> None:
        base = value["optimizer_state_dict"]["base_optimizer_state"]
        base["state"][0]["mu_product"] = torch.tensor(0.5)
        base["param_groups"][0]["lr"] = np.float64(0.125)

    source = edited(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "ckpt", "*optim_states.pt", edit)
    report = dsconv.to_universal(source, tmp_path / "out")
    assert any("mu_product" in warning for warning in report.warnings)
    assert load(tmp_path / "out" / "zero" / "optimizer_state.pt")["param_groups"][0]["lr"] == 0.125


def test_sources_without_an_optimizer_are_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    dsconv.merge(trained("llama_tied-z0-bf16-w2").checkpoint, tmp_path / "merged", fsync=False)
    with pytest.raises(
        UnsupportedError, match=r"one of DeepSpeed's or a DCP directory that holds the optimizer's states$"
    ):
        dsconv.to_universal(tmp_path / "merged", tmp_path / "out")


def test_a_universal_checkpoint_is_not_converted_again(converted: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a universal checkpoint already"):
        dsconv.to_universal(converted("llama_groups-z2-bf16-w2"), tmp_path / "out")


def test_the_checkpoint_itself_is_never_the_output(made: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "ckpt"))
    shutil.copytree(source, tmp_path / "other")
    for target in (source, source / "global_step2"):
        with pytest.raises(OutputError, match="folder of its own"):
            dsconv.to_universal(source, target, force=True)
    with pytest.raises(OutputError, match="another checkpoint"):
        dsconv.to_universal(source, tmp_path / "other" / "global_step2", force=True)
    assert raw(dsconv.open_checkpoint(source)["model.norm.weight"].read())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        dsconv.to_universal(source, tmp_path / "file")


@pytest.mark.parametrize("name", ["zero/thesis.tex", "zero/w/notes.txt", "zero/a/b/c.pt"])
def test_files_that_no_universal_checkpoint_has_are_not_removed(
    converted: Callable[[str], Path], made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """With --force ``zero/`` is replaced as a whole, so nothing else may be in there, nor may a link."""
    source = made["llama_groups-z2-bf16-w2"] / "ckpt"
    for target in (tmp_path / "alone", Path(shutil.copytree(converted("llama_groups-z2-bf16-w2"), tmp_path / "older"))):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
        before = files(target)
        with pytest.raises(OutputError, match="belongs to no universal checkpoint, and would be removed"):
            dsconv.to_universal(source, target, force=True)
        assert files(target) == before
        (target / name).unlink()
        (target / name).symlink_to(source)
        with pytest.raises(OutputError, match="belongs to no universal checkpoint"):
            dsconv.to_universal(source, target, force=True)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_00-model_states.pt"])
def test_another_checkpoint_is_not_replaced(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A checkpoint without ZeRO has model states alone, as a universal one has beside ``zero/``."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="holds another checkpoint"):
        dsconv.to_universal(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path, force=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_beside_the_output_that_is_no_pointer_stays(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "latest_universal").write_text("notes\nof years\n")
    report = dsconv.to_universal(made["llama_groups-z2-bf16-w2"] / "ckpt", tmp_path / "out", fsync=False)
    assert (tmp_path / "latest_universal").read_text() == "notes\nof years\n"
    assert any("could not be written (it holds more than the name of a checkpoint)" in text for text in report.warnings)
