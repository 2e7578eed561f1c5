"""Compare ``dsconv estimate`` with real engines, real checkpoints, DeepSpeed's own estimators and real activations."""

from __future__ import annotations

import json

import pytest
import torch

from dsconv.loaders.sizes import sizes_of
from dsconv.zero_utils import activations
from dsconv.zero_utils.estimate import estimate
from dsconv.zero_utils.memory import (
    Job,
    ModelSizes,
    Setting,
    checkpoint_bytes,
    deepspeed_figure,
    held,
    ideal_bytes,
    settings,
)
from dsconv.zero_utils.partition import overlapping_numel
from tests.fixtures import gloo, memory


@pytest.mark.parametrize("name", memory.CASES)
def test_real_engines_hold_what_is_estimated(name: str) -> None:
    """Compare the memory of two ranks, in backward and at the step, and the size of their checkpoints."""
    folder = gloo.ensure("memory")[name]
    model = sizes_of(memory.build(), "llama")
    options: memory.Options = memory.CASES[name].options
    job = Job(
        nproc=2,
        dtype=options.dtype,
        fp32_grads=bool(options.extra),
        seq_len=memory.LENGTH,
        accumulation=options.accumulation,
        reduce_bucket_numel=memory.BUCKET_NUMEL,
        persistence_numel=memory.PERSISTENCE_NUMEL,
    )
    setting = Setting(options.stage, options.offload, options.tp)
    said = held(model, job, setting)
    # The ranks have no GPU, so offloaded states lie in the same memory.
    states = said.parameters + said.optimizer + said.cpu
    for rank, counted in enumerate(json.loads((folder / "counted.json").read_text())):
        where = f"rank {rank}"
        assert counted["step"]["total"] == pytest.approx(states + said.step, rel=0.03), where
        backward = states + said.gradients + said.buffers
        if options.stage < 3:
            assert counted["backward"]["total"] == pytest.approx(backward, rel=0.03), where
            assert counted["backward"]["parameters"] == pytest.approx(said.parameters, rel=0.01), where
        else:  # forward gathers every parameter, and most are released before the end of backward
            gathered = said.buffers - memory.BUCKET_NUMEL * 2
            item = 2 * (model.numel // 2)
            assert counted["forward"]["parameters"] == pytest.approx(item + gathered, rel=0.01), where
            assert counted["backward"]["total"] <= backward * 1.01, where
        if options.offload == "none":
            assert counted["step"]["optimizer"] == pytest.approx(said.optimizer, rel=0.01), where
    files = sum(path.stat().st_size for path in (folder / "ckpt").rglob("*.pt"))
    assert files == pytest.approx(checkpoint_bytes(model, job, setting), rel=0.01)


@pytest.mark.parametrize(("nproc", "nodes"), [(1, 1), (8, 1), (8, 4)])
def test_deepspeeds_figure_is_what_deepspeed_says(nproc: int, nodes: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage3 import model_to_params
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    built = memory.build()
    model, job = sizes_of(built, "llama"), Job(nproc, nodes)
    psi, largest = model_to_params(built)
    assert (model.numel, model.largest_layer_numel) == (psi, largest)
    for offload in (False, True):
        cpu, gpu = zero2(psi, nproc, nodes, cpu_offload=offload)
        assert deepspeed_figure(model, job, Setting(2, "cpu" if offload else "none")) == (gpu, cpu)
        cpu, gpu, _ = zero3(psi, largest, nproc, nodes, cpu_offload=offload, cpu_offload_params=offload)
        assert deepspeed_figure(model, job, Setting(3, "cpu" if offload else "none")) == (gpu, cpu)


def test_the_ideal_is_the_papers_example() -> None:
    """The example is figure 1 of arXiv 1910.02054: 7.5 B parameters on 64 GPUs, K = 12."""
    model, job = ModelSizes("paper", ((7_500_000_000, True),), 0, None), Job(8, 8)
    assert [round(ideal_bytes(model, job, Setting(stage)) / 1e9, 1) for stage in range(4)] == [120.0, 31.4, 16.6, 1.9]
    fp32 = Job(8, 8, dtype="fp32")
    assert ideal_bytes(model, fp32, Setting(0)) == 16 * 7_500_000_000
    assert ideal_bytes(model, job, Setting(0, tp=2)) == 60_000_000_000


def _saved_bytes(kind: str, layers: int, dtype: torch.dtype, recompute: bool) -> tuple[int, activations.Decoder]:
    """Return the bytes that autograd keeps in a real forward pass, without the model's weights."""
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 8}
    config = getattr(transformers, kind)(num_hidden_layers=layers, num_key_value_heads=4, head_dim=16, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.ones((2, 64), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    decoder = sizes_of(model, kind).decoder
    assert decoder is not None
    return sum(storage.nbytes() for storage in saved.values()), decoder


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_a_layer(kind: str, dtype: torch.dtype) -> None:
    item = dtype.itemsize
    few, decoder = _saved_bytes(kind, 1, dtype, False)
    many, _ = _saved_bytes(kind, 3, dtype, False)
    assert (many - few) / 2 == pytest.approx(activations.layer_bytes(decoder, 128, item), rel=0.02)


def test_activations_with_checkpointing() -> None:
    few, decoder = _saved_bytes("LlamaConfig", 1, torch.bfloat16, True)
    many, _ = _saved_bytes("LlamaConfig", 3, torch.bfloat16, True)
    assert (many - few) / 2 == pytest.approx(128 * decoder.hidden * 2, rel=0.05)


def test_parameters_that_reach_into_a_partition() -> None:
    assert overlapping_numel([3, 5, 2], 5) == 8
    assert overlapping_numel([20, 1], 7) == 21
    assert overlapping_numel([4, 4], 4) == 4
    assert overlapping_numel([0], 4) == 0


def test_the_cheapest_that_fits() -> None:
    model = sizes_of(memory.build(), "llama")
    job = Job(8, seq_len=64, reduce_bucket_numel=1000, persistence_numel=0, live_numel=0)
    assert [(s.stage, s.offload) for s in settings(job)] == [
        (0, "none"), (1, "none"), (2, "none"), (3, "none"), (0, "none"), (1, "none"), (2, "none"), (3, "none"),
        (1, "cpu"), (2, "cpu"), (3, "cpu"), (1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme"), (3, "nvme"),
    ]  # fmt: skip
    everything = estimate(model, job)
    for row in everything.rows:
        report = estimate(model, job, limit=row.held.peak)
        assert report.fit is not None
        assert report.fit.held.peak <= row.held.peak
        assert all(other.held.peak > row.held.peak for other in everything.rows[: everything.rows.index(report.fit)])
    assert estimate(model, job, limit=everything.smallest.held.peak - 1).fit is None
    assert not any(row.setting.stage == 0 for row in estimate(model, Job(8, fp32_grads=True)).rows)
