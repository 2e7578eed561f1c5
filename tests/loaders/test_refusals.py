"""A loader refuses by name, before a model is built, so these tests need no ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dsconv
from dsconv.errors import InconsistentCheckpointError, MalformedError, OutputError, UnsupportedError

ZERO3: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def zero3(**zero: Any) -> dict[str, Any]:
    return {**ZERO3, "zero_optimization": {"stage": 3, **zero}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("method", ["bitsandbytes", "quanto", "compressed-tensors", "fp8"])
def test_quantized_checkpoint(method: str, copied: Path) -> None:
    import transformers

    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "load_in_4bit": True}})
    )
    for load in (
        lambda **more: dsconv.load_tp(copied, **more),
        lambda **more: dsconv.load_zero3(copied, ZERO3, **more),
    ):
        with pytest.raises(
            UnsupportedError, match=rf"model: the configuration says that the weights are quantized \({method}\)"
        ):
            load()
    plain = transformers.AutoConfig.from_pretrained(copied)
    del plain.quantization_config  # the remedy in the message works if the weights are not quantized
    assert not dsconv.load_tp(copied, config=plain).load_report.missing


def test_quantized_values_are_not_numbers(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        save_file({"weight": torch.ones(4, 3).to(dtype)}, tmp_path / "model.safetensors")
        model = nn.Linear(3, 4, bias=False)
        before = model.weight.detach().clone()
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(
            UnsupportedError,
            match=f"weight is float32 in the model, and weight is stored as {name}: weights are",
        ):
            dsconv.stream_into(model, tmp_path)
        assert torch.equal(model.weight, before)
        same = nn.Module()
        same.weight = nn.Parameter(torch.zeros(4, 3, dtype=dtype), requires_grad=False)
        dsconv.stream_into(same, tmp_path)  # loading into the same dtype only copies bytes
        assert torch.equal(same.weight.view(torch.uint8), torch.ones(4, 3).to(dtype).view(torch.uint8))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (zero3(zero_quantized_weights=True), "ds_config sets zero_quantized_weights"),
        (zero3(zero_quantized_nontrainable_weights=True), "ds_config sets zero_quantized_nontrainable_weights"),
        (
            {**ZERO3, "weight_quantization": {"quantized_initialization": {"num_bits": 4}}},
            "ds_config sets quantized_initialization",
        ),
        (zero3(offload_param={"device": "nvme"}), "needs nvme_path"),
        (
            zero3(offload_param={"device": "nvme", "nvme_path": "x"}, zero_hpz_partition_size=2),
            "DeepSpeed has no secondary partitions",
        ),
    ],
)
def test_settings(settings: dict[str, Any], says: str, llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=says):
        dsconv.load_zero3(llama, settings)


def test_nvme_that_cannot_be_used(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="nvme_path cannot be created: Not a directory"):
        dsconv.load_zero3(llama, zero3(offload_param={"device": "nvme", "nvme_path": str(tmp_path / "file")}))
    monkeypatch.setenv("CC", "false")  # without a compiler, DeepSpeed cannot find out whether libaio exists
    with pytest.raises(
        UnsupportedError, match=r"needs DeepSpeed's async_io op, which cannot be loaded here: install libaio"
    ):
        dsconv.load_zero3(llama, zero3(offload_param={"device": "nvme", "nvme_path": str(tmp_path / "disk")}))


def test_damaged_and_foreign_checkpoints(copied: Path) -> None:
    import transformers

    file = copied / "model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    loads = [lambda **more: dsconv.load_tp(copied, **more), lambda **more: dsconv.load_zero3(copied, ZERO3, **more)]
    file.write_bytes(whole[:-100])
    for load in loads:
        with pytest.raises(MalformedError, match=r"model\.safetensors"):
            load()
    # With another model's checkpoint no name fits, which strict reports; with another width the shapes do not fit.
    save_file({f"encoder.{name}": tensor for name, tensor in weights.items()}, file)
    with pytest.raises(InconsistentCheckpointError, match="the model has and the checkpoint lacks: "):
        dsconv.load_tp(copied, strict=True)
    file.write_bytes(whole)
    wider = transformers.AutoConfig.from_pretrained(copied)
    wider.intermediate_size = 16
    with pytest.raises(
        InconsistentCheckpointError,
        match=r"3 tensors with another shape: .*down_proj\.weight is \[8, 12\], the model has",
    ):
        dsconv.load_tp(copied, config=wider)


def test_no_memory_for_a_block(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconv.checkpoint.transfer import copy
    from dsconv.checkpoint.transfer.reading import new_block
    from dsconv.loaders import memory

    # They ask for more memory than any machine has.
    monkeypatch.setattr(copy, "new_block", lambda nbytes: new_block(nbytes << 30))
    monkeypatch.setattr(memory, "bytearray", lambda nbytes: bytearray(nbytes << 30), raising=False)
    with pytest.raises(MemoryError):
        dsconv.load_tp(copied)
    with pytest.raises(MemoryError):
        dsconv.merge(copied, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_integers_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.register_buffer("ids", torch.zeros(2, dtype=torch.int32))
    save_file({"weight": torch.ones(1, 2), "ids": torch.tensor([2**40 + 7, 5])}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedError, match=r"ids is int32 in the model, but ids has values from 5 to 1099511627783"
    ):
        dsconv.stream_into(model, tmp_path)
    assert model.ids.tolist() == [0, 0]
    save_file({"weight": torch.ones(1, 2), "ids": torch.tensor([-(2**31), 5])}, tmp_path / "model.safetensors")
    dsconv.stream_into(model, tmp_path)
    assert model.ids.tolist() == [-(2**31), 5]
