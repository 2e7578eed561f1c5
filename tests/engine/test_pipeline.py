"""Pipeline runs: a transformers model that is cut into stages computes the same, resumes bit for bit, and continues in
other layouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.engine import Layout, RunOptions
from dsconv.engine.matrix import Scenario
from dsconv.engine.models import open_source
from dsconv.engine.pipeline_backend import PipelineBackend
from dsconv.engine.pipeline_layers import Donor, layer_specs, pipeline_names
from dsconv.engine.validation import Validation
from dsconv.errors import UnsupportedError, UsageError

PP2 = Layout(nproc=2, pp=2, zero_stage=1)
ZERO2 = Layout(nproc=2, zero_stage=2)
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "mistral-sliding": {"model_type": "mistral", **SIZES, "sliding_window": 4},
    "qwen2-sliding": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SIZES},
    "gpt2": {"model_type": "gpt2", **GPT2},
}


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    settings = dict(MODELS[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def run_options(model: Path, layout: Layout, **changes: Any) -> RunOptions:
    return RunOptions(str(model), "", 4, layout, seq_len=16, batch_size=8, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_layers_one_after_another_are_the_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    names = pipeline_names(config)
    assert sorted(names) == sorted(key for key, _ in model.named_parameters())
    assert all(new.endswith(f".{old}") for old, new in names.items())
    assert len(set(names.values())) == len(names)
    rows = torch.randint(3, 61, (2, 12))
    x: Any = rows
    with torch.no_grad():
        for spec in layer_specs(Donor(model)):
            layer = spec.build()
            head = getattr(spec, "forward_fn", None)
            x = head(layer, x) if head is not None else layer(x)
        assert torch.equal(x, model(rows).logits)


def test_a_pipeline_and_zero_resume_from_each_other(tiny_llama: Path, tmp_path: Path) -> None:
    """The states saved right after the change equal those before it, bit for bit, and the losses are those of either
    layout.
    """
    without = Scenario("zero0", Layout(nproc=2, pp=2), "fp32")
    there = Scenario("pp2", PP2, "fp32", {}, {"another stage": ZERO2})
    back = Scenario("zero2", ZERO2, "fp32", {}, {"another stage": PP2})
    validation = Validation(tmp_path, run_options(tiny_llama, PP2), [there, back])
    for scenario, column in ((there, "another stage"), (there, "convert"), (back, "another stage")):
        validation.check(scenario, column)
    assert [cell.passed for cell in validation.cells] == [True] * 3, validation.cells
    assert validation.cells[0].evidence["tensors compared"] > 50
    runs = [validation.runs.whole(scenario, scenario.layout, 0.0) for scenario in (back, there, without)]
    for run in runs[1:]:
        for key in ("loss", "grad_norm", "lr"):
            assert run.curve(key) == pytest.approx(runs[0].curve(key), rel=2e-6), key
    expected, found, _ = (dsconv.open_checkpoint(run.run_folder / "checkpoints", tag="step-00000001") for run in runs)
    assert list(found) == list(expected)
    for name in found:  # the first step has a learning rate of 0, so these are the initial weights
        assert torch.equal(found[name].read(), expected[name].read()), name


def test_stages_and_replicas_resume_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    """Dropout is on, and activation checkpointing must apply the same dropout again."""
    layout = Layout(nproc=4, pp=2, zero_stage=1)
    scenario = Scenario("row", layout, "fp32", {"activation_checkpointing": True})
    validation = Validation(tmp_path, run_options(tiny_llama, layout), [scenario])
    validation.check(scenario, "in place")
    (cell,) = validation.cells
    assert cell.passed, cell.evidence
    assert cell.evidence["states compared"] > 50


def test_what_a_pipeline_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GemmaConfig

    def start(layout: Layout, **changes: Any) -> None:
        options = run_options(tmp_path / "model", layout, **changes)
        PipelineBackend(options, open_source(options, False), fresh=True, universal=False)

    GemmaConfig(**SIZES).save_pretrained(tmp_path / "model")
    with pytest.raises(
        UnsupportedError, match="pipeline stages for llama, mistral, qwen2, qwen3, gpt2, but not for gemma"
    ):
        start(PP2, dtype="fp32")
    config_of("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="--pp 4: each stage needs a layer, but the model has 3"):
        start(Layout(nproc=4, pp=4, zero_stage=1), dtype="fp32")
    with pytest.raises(UsageError, match="needs --zero-stage 1"):
        start(Layout(nproc=2, pp=2), dtype="bf16")
