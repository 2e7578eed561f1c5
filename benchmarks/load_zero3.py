"""Compare loading a model under ZeRO-3 with dsconv, with ``from_pretrained``, and with a plain read.

python -m benchmarks.load_zero3
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.loading import DSCONV, LIMIT, command, one_rank, plain_read

SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def rank(method: str, path: Path) -> None:
    import deepspeed
    import torch._dynamo  # noqa: F401 - import it before zero.Init patches what it inspects
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import dsconv

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # use gloo for every collective
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)

    def load(path: Path) -> int:
        if method == LIMIT:
            return plain_read(path)
        if method == DSCONV:
            return int(dsconv.load_zero3(path, SETTINGS).load_report.bytes_read)
        keep = HfDeepSpeedConfig(SETTINGS)
        AutoModelForCausalLM.from_pretrained(path)
        del keep
        return sum(file.stat().st_size for file in path.glob("*.safetensors")) if deepspeed.comm.get_rank() == 0 else 0

    one_rank(load, path)


if __name__ == "__main__":
    command(
        "benchmarks.load_zero3",
        "Time loads of the same safetensors into ZeRO-3 partitions, in fresh ranks, in turn.",
        8,
        rank,
    )()
