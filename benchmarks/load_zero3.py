"""Loading a model under ZeRO-3: dsconv against ``from_pretrained`` with ``HfDeepSpeedConfig``, and a plain read.

python -m benchmarks.load_zero3
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.loading import DSCONV, LIMIT, compare, one_rank, plain_read
from benchmarks.measure import machine

SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def rank(method: str, path: Path) -> None:
    import deepspeed
    import torch._dynamo  # noqa: F401 - before zero.Init patches what it looks at
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import dsconv

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo for every collective
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


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench"), show_default=True, help="The models are kept here.")
@click.option("--size", "sizes", type=float, multiple=True, default=(0.1, 0.8, 2.0), show_default=True, help="In 10⁹ parameters.")
@click.option("--world", "worlds", type=int, multiple=True, default=(2, 4), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--rank", "method", hidden=True)
@click.argument("path", type=click.Path(path_type=Path), required=False)
def main(
    folder: Path, sizes: tuple[float, ...], worlds: tuple[int, ...], rounds: int, as_json: bool, method: str | None, path: Path | None
) -> None:
    """Time loads of the same safetensors into ZeRO-3 partitions, in fresh ranks, in turn."""
    if method is not None and path is not None:
        rank(method, path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    results = compare("benchmarks.load_zero3", folder, sizes, worlds, rounds, goal=8)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))


if __name__ == "__main__":
    main()
