"""Measure how the cost of opening, planning and a dry run grows with ranks, tensors and bytes.

    python -m benchmarks.scale --plot docs/scale.svg

The ZeRO-3 (or ZeRO-2) checkpoints have the files, names, keys, zip records and checksums that DeepSpeed 0.19.8 writes.
Their tensors are holes in sparse files, so that 1 TB takes a few hundred MB of disk, nearly all of it metadata. Each
command runs in its own process. Its memory is the peak that the system reports (VmHWM), and its open files are counted
while it runs.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import click
from zlib_ng import zlib_ng

from benchmarks.measure import machine, median
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import Instance
from dsconv.convert.torch_writer import Streamed, TorchArchive
from dsconv.zero_utils.partition import group_numel, share_numel

FP32, BF16 = BY_NAME["float32"], BY_NAME["bfloat16"]
SUB_GROUP_NUMEL = 1_000_000_000  # sub_group_size of DeepSpeed
STEP = 10
CONFIG = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
FRAGMENT = "deepspeed.utils.tensor_fragment.fragment_address"
LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# This runs in its own process: open, count the open files meanwhile, plan, and print the result.
PROGRAM = """
import json, os, sys, threading, time
began = time.perf_counter()
import dsconv
imported = time.perf_counter()
most, done = 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, len(os.listdir("/proc/self/fd")))
threading.Thread(target=watch, daemon=True).start()
checkpoint = dsconv.open_checkpoint(sys.argv[1])
opened = time.perf_counter()
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
after_open = peak()
report = dsconv.merge(checkpoint, sys.argv[2], dry_run=True)
planned = time.perf_counter()
done.set()
print(json.dumps({"open_seconds": opened - imported, "open_peak_bytes": after_open, "plan_seconds": planned - opened,
                  "peak_bytes": peak(),
                  "open_files": most, "tensors": report.tensors, "parameters": report.parameters,
                  "output_bytes": report.nbytes,
                  "shards": len(report.files), "pieces": sum(row["pieces"] for row in report.plan)}))
"""


@cache
def crc_of_zeros(nbytes: int) -> int:
    """Return the CRC-32 of that many zero bytes."""
    if nbytes <= 1 << 20:
        return zlib_ng.crc32(bytes(nbytes))
    half = nbytes // 2
    return zlib_ng.crc32_combine(crc_of_zeros(half), crc_of_zeros(nbytes - half), nbytes - half)


def shapes_of(tensors: int, parameters: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a transformer with that many weights: every eighth tensor is a vector, the others
    are square matrices.
    """
    side = max(1, round((parameters / max(1, tensors - tensors // 8)) ** 0.5))
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(tensors):
        layer, place = divmod(number, len(LAYER) + 1)
        vector = place == len(LAYER)
        shapes[f"model.layers.{layer}.{'input_layernorm' if vector else LAYER[place]}.weight"] = (
            (side,) if vector else (side, side)
        )
    return shapes


def write(path: Path, value: Any) -> None:
    """Write a ``.pt`` file whose streamed tensors are holes."""
    archive = TorchArchive(path.stem, value)
    lengths = [tensor.nbytes for tensor in streamed_in(value)]
    with open(path, "wb") as file:
        file.truncate(archive.nbytes)
        for offset, data in archive.fixed([crc_of_zeros(nbytes) for nbytes in lengths]):
            file.seek(offset)
            file.write(data)


def streamed_in(value: Any) -> list[Streamed]:
    if isinstance(value, Streamed):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for child in children for found in streamed_in(child)]


def make(folder: Path, ranks: int, tensors: int, parameters: int, stage: int = 3) -> Path:
    """Return a save dir, which is made unless it exists."""
    home = folder / f"stage-{stage}-{ranks}-ranks-{tensors}-tensors-{parameters}-parameters"
    if (home / "latest").is_file():
        return home
    shutil.rmtree(home, ignore_errors=True)
    tag = home / f"global_step{STEP}"
    tag.mkdir(parents=True)
    shapes = shapes_of(tensors, parameters)
    model = {
        "module": {name: Streamed(BF16, (0,) if stage == 3 else shape) for name, shape in shapes.items()},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": {},
        "shared_params": {},
        "frozen_param_fragments": {},
        "global_steps": STEP,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": CONFIG,
        "ds_version": "0.19.8",
    }
    write(tag / f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt", model)
    for rank in range(ranks):
        state = stage_3(shapes, ranks) if stage == 3 else stage_2(shapes, ranks, rank)
        value = {"optimizer_state_dict": state, "ds_config": CONFIG, "ds_version": "0.19.8"}
        write(tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", value)
        if stage == 3 and rank:  # neither dsconv nor DeepSpeed's script reads these files when no weights are frozen
            (tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    (home / "latest").write_text(tag.name)
    return home


@cache
def flat_lengths(shapes: tuple[tuple[int, ...], ...], ranks: int) -> list[int]:
    """Return a rank's elements in each sub-group. Sub-groups take whole parameters until the size is reached (0.19.8
    stage3.py _create_fp16_sub_groups).
    """
    groups = [0]
    for shape in shapes:
        if groups[-1] >= SUB_GROUP_NUMEL:
            groups.append(0)
        groups[-1] += share_numel(math.prod(shape), ranks)
    return groups


def stage_3(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, Any]:
    groups = flat_lengths(tuple(shapes.values()), ranks)
    return {
        **settings(3),
        "partition_count": ranks,
        "optimizer_state_dict": adam(groups),
        "fp32_flat_groups": flat(groups),
    }


def stage_2(shapes: dict[str, tuple[int, ...]], ranks: int, rank: int) -> dict[str, Any]:
    """Return the states of one group. The last rank's part is saved without its padding (0.19.8 stage_1_and_2.py)."""
    starts = [0, *accumulate(math.prod(shape) for shape in shapes.values())]
    part = group_numel(starts[-1], ranks) // ranks
    low, high = min(rank * part, starts[-1]), min((rank + 1) * part, starts[-1])
    first, last = bisect_right(starts, low) - 1, bisect_left(starts, high)
    held = {
        name: Instance(
            FRAGMENT, (), {"numel": min(starts[i + 1], high) - max(starts[i], low), "start": max(starts[i], low) - low}
        )
        for i, name in enumerate(islice(shapes, first, last), first)
    }
    return {
        **settings(2),
        "partition_count": [ranks],
        "base_optimizer_state": adam([high - low]),
        "single_partition_of_fp32_groups": flat([high - low]),
        "param_slice_mappings": [held],
    }


def settings(stage: int) -> dict[str, Any]:
    scaler = Instance("deepspeed.runtime.fp16.loss_scaler.LossScaler", (), {"cur_scale": 1.0, "dynamic": False})
    return {"zero_stage": stage, "loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False}


def flat(lengths: list[int]) -> list[Streamed]:
    return [Streamed(FP32, (length,)) for length in lengths]


def adam(lengths: list[int]) -> dict[str, Any]:
    step = SmallTensor(FP32, (), bytes(4))
    states = {
        n: {"step": step, "exp_avg": Streamed(FP32, (g,)), "exp_avg_sq": Streamed(FP32, (g,))}
        for n, g in enumerate(lengths)
    }
    group = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(range(len(lengths)))}
    return {"state": states, "param_groups": [group]}


def cost(source: Path, rounds: int) -> dict[str, Any]:
    """Return the medians of ``rounds`` runs, after one that warms the page cache."""
    found = []
    for number in range(rounds + 1):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(source), str(source / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise click.ClickException(f"{source}: {ran.stderr[-2000:]}")
        if number:
            found.append(json.loads(ran.stdout))
    medians = {key: median([run[key] for run in found]) for key in found[0]}
    files = list(source.rglob("*.pt"))
    return {
        **medians,
        "source_bytes": sum(p.stat().st_size for p in files),
        "on_disk_bytes": sum(p.stat().st_blocks * 512 for p in files),
    }


def draw(series: dict[str, list[dict[str, Any]]], where: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    mpl.rcParams.update(
        {"svg.hashsalt": "dsconv", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, rows = plt.subplots(2, 3, figsize=(9.2, 5.2), layout="constrained", sharey="row")
    for column, (label, key, unit) in enumerate(
        (("ranks", "ranks", 1), ("tensors", "tensors", 1), ("GB of fp32 weights", "output_bytes", 1e9))
    ):
        results = series[label.split()[0]]
        x = [result[key] / unit for result in results]
        time_axes, memory_axes = rows[0][column], rows[1][column]
        for name, field, color in (("open", "open_seconds", "#1f6f8b"), ("plan (dry run)", "plan_seconds", "#b5482f")):
            time_axes.plot(x, [result[field] for result in results], marker="o", markersize=4, color=color, label=name)
        for name, field, color in (
            ("after opening", "open_peak_bytes", "#1f6f8b"),
            ("after the plan", "peak_bytes", "#b5482f"),
        ):
            memory_axes.plot(
                x, [result[field] / 1e6 for result in results], marker="o", markersize=4, color=color, label=name
            )
        fixed = ", ".join(
            text
            for name, text in (
                ("ranks", f"{results[0]['ranks']:,} ranks"),
                ("tensors", f"{results[0]['tensors']:,.0f} tensors"),
                ("output_bytes", f"{results[0]['output_bytes'] / 1e9:,.0f} GB"),
            )
            if name != key
        )
        time_axes.set_title(fixed, fontsize=8)
        memory_axes.set_xlabel(label)
        for axes in (time_axes, memory_axes):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(x, [f"{value:,.0f}" for value in x])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.minorticks_off()
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    rows[0][0].set_ylabel("seconds")
    rows[1][0].set_ylabel("MB of memory at the peak")
    rows[0][0].legend(frameon=False)
    rows[1][0].legend(frameon=False)
    figure.suptitle(f"A ZeRO-3 checkpoint in sparse files, opened and planned. {where}", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    click.echo(f"drew {path}")


RANKS, TENSORS, PARAMETERS = (
    (16, 64, 256, 1024),
    (1_000, 10_000, 100_000),
    (2_500_000_000, 25_000_000_000, 250_000_000_000),
)


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("bench/scale"),
    show_default=True,
    help="Checkpoints are kept here.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", nargs=3, type=int, help="RANKS TENSORS PARAMETERS: measure that one only.")
@click.option("--stage", type=click.Choice(["2", "3"]), default="3", show_default=True, help="Of ZeRO.")
@click.option("--json", "as_json", is_flag=True)
def main(
    folder: Path, rounds: int, plot: Path | None, only: tuple[int, int, int] | None, stage: str, as_json: bool
) -> None:
    """Make sparse checkpoints and measure what it costs to open and plan them."""
    series: dict[str, list[tuple[int, int, int]]] = {
        "ranks": [(ranks, TENSORS[-1], PARAMETERS[0]) for ranks in RANKS],
        "tensors": [(RANKS[-1], tensors, PARAMETERS[0]) for tensors in TENSORS],
        "GB": [(RANKS[-1], TENSORS[0], parameters) for parameters in PARAMETERS],
    }
    if only:
        series = {"only": [only]}
    measured: dict[tuple[int, int, int], dict[str, Any]] = {}
    for case in dict.fromkeys(case for cases in series.values() for case in cases):
        began = time.perf_counter()
        source = make(folder, *case, int(stage))
        click.echo(f"{source.name}: made in {time.perf_counter() - began:.0f} s", err=True)
        measured[case] = result = {"ranks": case[0], **cost(source, rounds)}
        if not as_json:
            click.echo(
                f"{case[0]:5,} ranks {result['tensors']:9,.0f} tensors {result['output_bytes'] / 1e9:8,.0f} GB,"
                f" {result['pieces']:13,.0f} pieces: open {result['open_seconds']:6.2f} s"
                f" {result['open_peak_bytes'] / 1e6:5.0f} MB, plan {result['plan_seconds']:5.2f} s"
                f" {result['peak_bytes'] / 1e6:5.0f} MB, {result['open_files']:.0f} files open;"
                f" {result['source_bytes'] / 1e9:,.0f} GB, on disk {result['on_disk_bytes'] / 1e6:,.0f} MB"
            )
    results = {name: [measured[case] for case in cases] for name, cases in series.items()}
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rounds": rounds, "results": results}, indent=2))
    if plot:
        draw(results, machine(), plot)


if __name__ == "__main__":
    main()
