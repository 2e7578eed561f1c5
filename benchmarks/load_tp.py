"""Loading a tensor-parallel model: dsconv against ``from_pretrained`` with a ``DistributedConfig``, and a plain read.

python -m benchmarks.load_tp
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.loading import DSCONV, LIMIT, compare, one_rank, plain_read, touch
from benchmarks.measure import machine


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
        return 0  # the file is mapped: what is read is not counted

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
    """Time loads of the same safetensors into tensor-parallel shards, in fresh ranks, in turn."""
    if method is not None and path is not None:
        rank(method, path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    results = compare("benchmarks.load_tp", folder, sizes, worlds, rounds, goal=4)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))


if __name__ == "__main__":
    main()
