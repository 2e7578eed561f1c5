"""Time one load in fresh ranks, and measure its memory: the code that the loaders' benchmarks share.

Imports and the set-up of the process group are not counted, since a training script needs them anyway. The added peak
is the highest anonymous memory of a rank during the load, minus what it used before.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import anonymous_bytes, machine, median
from benchmarks.train_llama import llama_config

TINY = "llama-tiny-bf16"
LIMIT, PEER, DSCONV = "plain read", "from_pretrained", "dsconv"


def model_folder(folder: Path, size: float) -> Path:
    """Return a folder with a bf16 Llama of about ``size`` × 10⁹ parameters, which is made on the first call."""
    target = folder / (f"llama-{size:g}b-bf16" if size else TINY)
    if not (target / "config.json").is_file():
        code = f"from benchmarks.loading import save; save({str(target)!r}, {size})"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return target


def save(target: str, size: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config(size), dtype=torch.bfloat16).save_pretrained(target)


def run_ranks(script: str, method: str, path: Path, world: int) -> dict[str, float]:
    """Load once in ``world`` fresh ranks; return the slowest time, the largest added peak and the sum of bytes read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    environment |= {
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", script, "--rank", method, str(path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    found = []
    for process in ranks:
        out, err = process.communicate()
        if process.returncode:
            raise click.ClickException(f"{method} failed:\n{err[-3000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return {
        "seconds": max(one["seconds"] for one in found),
        "added_peak_bytes": max(one["added_peak_bytes"] for one in found),
        "bytes_read": sum(one["bytes_read"] for one in found),
    }


def plain_read(path: Path) -> int:
    """Read this rank's share of the weights in order into new memory. No load can be faster than that."""
    import torch

    from dsconv.checkpoint.transfer.reading import tensor_bytes

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        share = -(-file.stat().st_size // world)
        low, high = rank * share, min((rank + 1) * share, file.stat().st_size)
        memory = torch.empty(high - low, dtype=torch.uint8)
        view = tensor_bytes(memory)
        descriptor = os.open(file, os.O_RDONLY)
        for at in range(low, high, 8 << 20):
            total += os.preadv(descriptor, [view[at - low : at - low + (8 << 20)]], at)
        os.close(descriptor)
    return total


def touch(model: Any) -> None:
    """Read a byte of each page of the weights. Mapped pages are not loaded until they are touched, which would
    otherwise happen in the first training step.
    """
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "placements") else parameter
        local.detach().reshape(-1)[:: 2048 // local.element_size()].sum()


def one_rank(load: Callable[[Path], int], path: Path) -> None:
    """Run ``load``, which returns the bytes it read, between two barriers and print its time and memory.

    A tiny model is loaded the same way first, so that one-time imports and set-up are not counted.
    """
    import torch.distributed as dist

    load(path.with_name(TINY))

    before = peak = anonymous_bytes(os.getpid())
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    began = time.perf_counter()
    read = load(path)
    dist.barrier()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "added_peak_bytes": max(peak, anonymous_bytes(os.getpid())) - before,
                "bytes_read": read,
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)


def compare(
    script: str, folder: Path, sizes: tuple[float, ...], worlds: tuple[int, ...], rounds: int, goal: float
) -> list[dict[str, Any]]:
    """Run every method in turn, ``rounds`` times at each size and world size, and print a table."""
    results = []
    model_folder(folder, 0)
    for size in sizes:
        path = model_folder(folder, size)
        nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        for world in worlds:
            runs: dict[str, list[dict[str, float]]] = {LIMIT: [], PEER: [], DSCONV: []}
            for number in range(rounds + 1):  # the first round only warms the page cache
                for method, of in runs.items():
                    run = run_ranks(script, method, path, world)
                    if number:
                        of.append(run)
            medians = {
                method: {key: median([run[key] for run in of]) for key in ("seconds", "added_peak_bytes", "bytes_read")}
                for method, of in runs.items()
            }
            faster = median([a["seconds"] / b["seconds"] for a, b in zip(runs[PEER], runs[DSCONV], strict=True)])
            over = median([b["seconds"] / a["seconds"] for a, b in zip(runs[LIMIT], runs[DSCONV], strict=True)])
            allowed = nbytes / world + 256 * 2**20
            click.echo(f"\n{size:g} B parameters, {nbytes / 1e9:.2f} GB of bf16, {world} ranks")
            for method, values in medians.items():
                click.echo(
                    f"  {method:16} {values['seconds']:6.2f} s   worst rank + {values['added_peak_bytes'] / 1e6:6,.0f}"
                    f" MB   read {values['bytes_read'] / nbytes:.2f} × the weights"
                )
            click.echo(f"  dsconv: {faster:.1f} times as fast as from_pretrained (goal: at least {goal:g})")
            click.echo(f"  {over:.1f} × the plain read (goal: at most 2)")
            click.echo(
                f"  added peak {medians[DSCONV]['added_peak_bytes'] / allowed:.2f} of model/W + 256 MB (goal: at"
                " most 1)"
            )
            results.append(
                {
                    "size": size,
                    "world": world,
                    "bytes": nbytes,
                    "median": medians,
                    "faster": faster,
                    "over_plain_read": over,
                }
            )
    return results


def command(script: str, about: str, goal: float, rank: Callable[[str, Path], None]) -> click.Command:
    """Run the command line of a benchmark that compares loads. With ``--rank`` the process is one rank of one load."""

    @click.command(help=about)
    @click.option(
        "--folder",
        type=click.Path(path_type=Path),
        default=Path("bench"),
        show_default=True,
        help="The models are kept here.",
    )
    @click.option(
        "--size",
        "sizes",
        type=float,
        multiple=True,
        default=(0.1, 0.8, 2.0),
        show_default=True,
        help="In 10⁹ parameters.",
    )
    @click.option("--world", "worlds", type=int, multiple=True, default=(2, 4), show_default=True)
    @click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
    @click.option("--rank", "method", hidden=True)
    @click.argument("path", type=click.Path(path_type=Path), required=False)
    def main(
        folder: Path,
        sizes: tuple[float, ...],
        worlds: tuple[int, ...],
        rounds: int,
        as_json: bool,
        method: str | None,
        path: Path | None,
    ) -> None:
        if method is not None and path is not None:
            rank(method, path)
            return
        folder.mkdir(parents=True, exist_ok=True)
        results = compare(script, folder, sizes, worlds, rounds, goal)
        if as_json:
            click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))

    return main
