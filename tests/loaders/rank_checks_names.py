"""Checks for ``rank_checks``: loads straight from checkpoints that have the names of other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.loaders.rank_checks import ds_config, require_same, state

DATA = Path(__file__).parents[1] / "data" / "names"
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
    "tie_word_embeddings": False,
}  # fmt: skip


def other_names(folder: Path, rank: int) -> None:
    """Compare what each loader makes of a torchtitan and a Megatron-core checkpoint with what it makes of the merged
    model: rotated rows, query groups, stacked layers and experts.
    """
    import transformers

    import dsconv

    llama = transformers.LlamaConfig(vocab_size=64, intermediate_size=48, **SIZES)
    experts = transformers.Qwen3MoeConfig(
        vocab_size=60, intermediate_size=48, moe_intermediate_size=16, head_dim=16, num_experts=4,
        num_experts_per_tok=2, **SIZES
    )  # fmt: skip
    for config, source in ((llama, DATA / "torchtitan" / "llama3" / "step-3"),
                           (experts, DATA / "megatron" / "qwen3-moe-ep")):  # fmt: skip
        merged = folder / config.model_type
        if rank == 0:
            config.save_pretrained(folder / "config")
            dsconv.merge(source, merged, names="hf", config_from=folder / "config", dtype="fp32", fsync=False)
        torch.distributed.barrier()
        settings = ds_config()
        ours = dsconv.load_zero3(source, settings, config=config, strict=True)
        require_same(state(ours), state(dsconv.load_zero3(merged, settings, strict=True)), config.model_type)
        sharded, truth = (
            dsconv.load_tp(path, config=config, dtype="float32", strict=True).state_dict() for path in (source, merged)
        )
        for name, tensor in truth.items():
            a, b = (t.to_local() if hasattr(t, "placements") else t for t in (sharded[name], tensor))
            assert torch.equal(a, b), name
        plain, whole = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
        for model, path in ((plain, source), (whole, merged)):
            dsconv.stream_into(model, path)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), whole.parameters(), strict=True))
