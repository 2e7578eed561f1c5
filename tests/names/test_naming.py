"""``--names hf`` gives a model that loads, and refuses what it does not know."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsconv
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    UnsupportedError,
    UsageError,
)
from dsconv.names.choosing import with_hf_names
from dsconv.names.marks import MARKS, framework_of
from dsconv.names.naming import FAMILIES, to_hf
from dsconv.names.operations import Config
from tests.cli.running import dsconv as run

DATA = Path(__file__).parents[1] / "data" / "names" / "torchtitan"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


def config_in(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_a_merge_keeps_the_names_with_a_hint_or_gives_hfs(tmp_path: Path) -> None:
    source = DATA / "llama3" / "step-3"
    kept = dsconv.merge(source, tmp_path / "kept")
    assert any("names of torchtitan (llama3)" in text and "--names hf" in text for text in kept.warnings)
    config = config_in(tmp_path / "config")
    report = dsconv.merge(source, tmp_path / "out", names="hf", config_from=config, verify_output=True)
    assert (report.loadable, report.warnings, report.verified) == (True, [], True)
    assert dsconv.verify(source, tmp_path / "out").equal  # by the names in the manifest
    truth = load_file(DATA / "llama3" / "truth.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in truth.items()}


def test_inspect_names_framework_and_family() -> None:
    source = str(DATA / "qwen3-moe" / "step-3")
    assert "names        torchtitan, qwen3\n" in run("inspect", source).out
    assert run("inspect", source, "--json").json["names"] == "torchtitan, qwen3"


def titan(folder: Path, **changes: torch.Tensor | None) -> Path:
    """A torchtitan llama3 in one file, with some tensors changed, added or removed."""
    from dsconv.checkpoint.transfer.loading import load_tensors

    tensors = load_tensors(dsconv.open_checkpoint(DATA / "llama3" / "step-3").values())
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    folder.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def refused(source: Path, tmp_path: Path, **options: Any) -> DsconvError:
    with pytest.raises(DsconvError) as error:
        dsconv.merge(source, tmp_path / "out", names="hf", **options)
    assert not (tmp_path / "out").exists()
    return error.value


def test_nothing_is_guessed(tmp_path: Path) -> None:
    source = shutil.copytree(DATA / "llama3" / "step-3", tmp_path / "run" / "step-3")  # without a configuration
    error = refused(source, tmp_path)
    assert isinstance(error, CheckpointNotFoundError)
    assert "--config-from" in str(error)
    other = config_in(tmp_path / "a", model_type="mistral")
    error = refused(source, tmp_path, config_from=other)
    assert isinstance(error, InconsistentCheckpointError)
    assert "model_type is 'mistral'" in str(error)
    error = refused(source, tmp_path, config_from=config_in(tmp_path / "b", num_attention_heads=8))
    assert "'layers.0.attention.qkv_linear.wk.weight': expected 2 heads (num_key_value_heads) of 4 rows" in str(error)
    error = refused(source, tmp_path, config_from=config_in(tmp_path / "c", num_attention_heads="4"))
    assert isinstance(error, UnsupportedError)
    assert "num_attention_heads is '4'" in str(error)
    strange = titan(tmp_path / "strange", **{"layers.0.attention.gate.weight": torch.zeros(2)})
    error = refused(strange, tmp_path, config_from=config_in(tmp_path / "d"))
    assert isinstance(error, UnsupportedError)
    assert "not that of 'layers.0.attention.gate.weight'" in str(error)
    error = refused(DATA / "deepseek-v3" / "step-3", tmp_path, config_from=config_in(
        tmp_path / "e", model_type="deepseek_v3", rope_interleave=False
    ))  # fmt: skip
    assert "rope_interleave is False" in str(error)
    save_file({"w": torch.zeros(2)}, tmp_path / "plain.safetensors")
    assert "no framework and family" in str(refused(tmp_path / "plain.safetensors", tmp_path))


def test_a_tied_output_layer_is_left_out_if_it_is_the_embedding(tmp_path: Path) -> None:
    config = config_in(tmp_path / "config", tie_word_embeddings=True)
    source = DATA / "llama3" / "step-3"
    assert "the output layer and the embedding differ" in str(refused(source, tmp_path, config_from=config))
    embedding = dsconv.open_checkpoint(source)["tok_embeddings.weight"].read()
    tied = titan(tmp_path / "tied", **{"lm_head.weight": embedding})
    report = dsconv.merge(tied, tmp_path / "out", names="hf", config_from=config)
    assert (report.loadable, report.tensors) == (True, 20)


def test_what_hf_has_no_place_for_is_named() -> None:
    folder = DATA / "qwen3-moe"
    warnings = with_hf_names(dsconv.open_checkpoint(folder / "step-3"), folder / "config.json").warnings
    assert any("left out 'layers.0.moe.expert_bias_E' and 1 more: it is not zero" in text for text in warnings)


def test_names_go_with_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--names cannot be combined"):
        dsconv.merge(DATA / "llama3" / "step-3", tmp_path / "out", names="hf", adapter=True)
    with pytest.raises(UsageError, match="names is 'mine'; expected 'hf' or 'stored'"):
        dsconv.merge(DATA / "llama3" / "step-3", tmp_path / "out", names="mine")  # type: ignore[arg-type]


def test_every_mark_of_a_family_is_one_of_its_framework() -> None:
    for family in FAMILIES:
        for mark in family.marks:
            assert framework_of([mark.replace("{}", "0")]) == family.framework, mark
    assert set(MARKS) == {family.framework for family in FAMILIES}
    assert framework_of(["model.visual.blocks.0.mlp.linear_fc1.weight", "model.layers.0.mlp.router.weight"]) is None


def test_a_merge_imports_no_table_of_names_where_none_is_needed(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    program = (
        "import sys, dsconv; dsconv.merge(sys.argv[1], sys.argv[2], fsync=False);"
        "print(*sorted(name for name in sys.modules if name.startswith('dsconv.names.')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["dsconv.names.choosing", "dsconv.names.marks"]


def test_the_advice_names_the_option(tmp_path: Path) -> None:
    config = config_in(tmp_path / "config")
    report = dsconv.merge(DATA / "llama3" / "step-3", tmp_path / "out", config_from=config)
    assert "These are names of torchtitan, llama3: merge with --names hf" in report.warnings[-1]


QWEN = {
    "model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32,
}  # fmt: skip
Q = "layers.0.attention.qkv_linear.wq.weight"
EXPERTS = "layers.0.moe.routed_experts.inner_experts.w1_EFD"


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"layers.0.attention.q_norm.weight": (8,), EXPERTS: (1 << 40, 0, 4)}, QWEN),
        ({Q: (1 << 21, 1)}, {**LLAMA, "num_attention_heads": 1 << 20, "head_dim": 2}),
        ({Q: (8192, 0)}, {**LLAMA, "num_attention_heads": 4096, "head_dim": 2}),
        (
            {"decoder.layers.self_attention.linear_qkv.weight": (1, 3 << 38, 0)},
            {**LLAMA, "num_attention_heads": 1 << 38, "num_key_value_heads": 1 << 38, "head_dim": 1},
        ),
    ],
    ids=["experts without elements", "a million heads", "heads without elements", "groups without elements"],
)  # fmt: skip
def test_shapes_and_numbers_of_no_real_model_take_no_time(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], tmp_path: Path
) -> None:
    import time

    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in tensors.items()}, tmp_path / "model.safetensors"
    )
    opened = dsconv.open_checkpoint(tmp_path)
    began = time.process_time()
    with pytest.raises((InconsistentCheckpointError, UnsupportedError), match=r"divided into|at most 4096"):
        to_hf(opened, Config.read(tmp_path / "config.json"))
    assert time.process_time() - began < 1


def test_a_configuration_of_any_depth_is_an_error_by_name(tmp_path: Path) -> None:
    """What Python's parser just allows would end in a RecursionError where the value is shown."""
    save_file({"layers.0.attention.qkv_linear.wq.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    opened = dsconv.open_checkpoint(tmp_path)
    for depth in range(40, 1100, 20):
        (tmp_path / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(DsconvError, match=r"config\.json: (model_type is|not a JSON object)"):
            to_hf(opened, Config.read(tmp_path / "config.json"))
