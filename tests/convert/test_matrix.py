"""Every checkpoint that DeepSpeed trained here is merged bit for bit, and loads with the library that made it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dsconv
from tests.fixtures.case import Case
from tests.fixtures.cases import ALL, MATRIX, MODELS, NATIVE
from tests.trained import Trained, load_safetensors, same

MERGEABLE = [case for case in ALL + NATIVE if "nvme_swapped" not in case.name]


@pytest.mark.parametrize("case", MERGEABLE, ids=lambda case: case.name)
def test_merge_is_bit_exact(case: Case, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(case.name)
    report = dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    merged = load_safetensors(tmp_path / "out")
    made.check(merged)
    assert report.tensors == len(merged)
    assert report.step == made.facts["step"]
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    expected = f"ZeRO-{case.stage}" if case.stage else "DeepSpeed stage 0"
    assert report.format.startswith(expected)
    if case.model == "llama_lora":  # no library loads a LoRA run that is merged as it is
        (warning,) = report.warnings
        assert "--adapter writes the adapter alone; --fold-lora folds a LoRA into its base" in warning
    else:
        assert not report.warnings


@pytest.mark.parametrize(
    "case", [c for c in MATRIX if c.world in (1, 3) and c.dtype == "bf16"], ids=lambda case: case.name
)
def test_open_checkpoint_reads_the_same(case: Case, trained: Callable[[str], Trained]) -> None:
    made = trained(case.name)
    checkpoint = dsconv.open_checkpoint(made.checkpoint)
    for name, expected in made.truth.items():
        assert same(checkpoint[name].read(), expected), name
    roles = {name: entry.role for name, entry in checkpoint.items()}
    frozen = {name for name, role in roles.items() if role == "frozen"}
    if case.stage:  # stage 0 does not record what was frozen
        assert frozen == set(made.facts["frozen"])
    assert {name for name, role in roles.items() if role == "buffer"} == set(made.facts["buffers"])
    assert set(checkpoint.ties) | set(checkpoint) == set(made.truth)


def expected_weights(made: Trained) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.truth.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", [m for m in MODELS if m != "llama_lora"])
def test_transformers_loads_it(
    model: str, stage: int, dtype: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """from_pretrained finds every weight under its expected name, even tied ones. In fp32 they equal the masters."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for world in (1, 2, 3, 4):
        made = trained(f"{model}-z{stage}-{dtype}-w{world}")
        out = tmp_path / str(world)
        dsconv.merge(made.checkpoint, out, fsync=False, dtype="fp32")
        config = AutoConfig.from_pretrained(out)
        assert config.dtype in (None, torch.float32)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded, info = kind.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        state = loaded.state_dict()
        for name, expected in expected_weights(made).items():
            assert same(state[name], expected), name


@pytest.mark.parametrize("model", ["llama_tied", "t5", "gpt2", "mixtral", "llama_frozen"])
def test_tied_weights_have_the_name_that_transformers_keeps(
    model: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    made = trained(f"{model}-z3-fp32-w2")
    dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False)
    kind = AutoModelForSeq2SeqLM if model == "t5" else AutoModelForCausalLM
    kind.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    ours, theirs = load_safetensors(tmp_path / "out"), load_safetensors(tmp_path / "theirs")
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_peft_loads_a_merged_lora_model_and_an_adapter(
    stage: int, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    from tests.fixtures import models

    made = trained(f"llama_lora-z{stage}-bf16-w3")
    dsconv.merge(made.checkpoint, tmp_path / "whole", fsync=False)
    whole = models.build("llama_lora", frozen=False, stage=0)
    missing, unexpected = whole.load_state_dict(load_safetensors(tmp_path / "whole"), strict=False)
    assert not missing
    assert not unexpected

    report = dsconv.merge(made.checkpoint, tmp_path / "adapter", fsync=False, adapter=True, verify_output=True)
    assert report.files == ["adapter_model.safetensors"]
    assert report.sidecars == ["adapter_config.json"]
    base = models.build("llama_groups", frozen=False, stage=0)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert loaded
    for name, tensor in loaded.items():
        full = name.replace(".weight", ".default.weight")
        assert same(tensor, made.truth[full]), name
    assert len(loaded) == sum("lora_" in name for name in made.truth)


@pytest.mark.parametrize("model", ["llama_frozen", "llama_lora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_exclude_frozen(model: str, stage: int, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(f"{model}-z{stage}-bf16-w2")
    dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, exclude_frozen=True, verify_output=True)
    merged = load_safetensors(tmp_path / "out")
    assert set(merged) == set(made.facts["trainable"]) | set(made.facts["buffers"])
    assert all(same(tensor, made.truth[name]) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize(
    "case", ["odd-z0-fp32-w2", "odd-z1-bf16-w4", "odd-z2-fp32-w2", "odd-z3-bf16-w2", "llama_groups-z3-fp16-w2-dynscale"]
)
def test_casts_equal_torch(
    case: str, name: str, dtype: torch.dtype, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Floats are cast once, to nearest even. Integers and bools keep their dtype."""
    made = trained(case)
    dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, dtype=name, verify_output=True)
    made.check(load_safetensors(tmp_path / "out"), dtype)
