"""Compare loading a tensor-parallel model with dsconv, with ``from_pretrained``, and with a plain read.

python -m benchmarks.load_tp
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.loading import DSCONV, LIMIT, command, one_rank, plain_read, touch


def rank(method: str, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import dsconv

    torch.distributed.init_process_group("gloo")

    def load(path: Path) -> int:
        if method == LIMIT:
            return plain_read(path)
        if method == DSCONV:
            model = dsconv.load_tp(path)
            touch(model)
            return int(model.load_report.bytes_read)
        tensor_parallel = DistributedConfig(tp_size=torch.distributed.get_world_size())
        touch(AutoModelForCausalLM.from_pretrained(path, distributed_config=tensor_parallel))
        return 0  # transformers maps the file, so the bytes that it reads cannot be counted

    one_rank(load, path)


if __name__ == "__main__":
    command(
        "benchmarks.load_tp",
        "Time loads of the same safetensors into tensor-parallel shards, in fresh ranks, in turn.",
        4,
        rank,
    )()
