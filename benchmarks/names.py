"""Measure conversions of names: against ``cp`` of the output, against torchtitan's own converter, and at 671 B.

    python -m benchmarks.names --size 2.0 --torchtitan ENV/bin/python

The first part converts a llama of random bf16 weights, which has torchtitan's names, to Hugging Face's. Each round
runs every command once, on the same bytes and beside nothing else; between two commands, outside the timing, the output
is removed and everything is synced. torchtitan runs in an environment of its own (see ``torchtitan_convert.py``), or is
left out. The second part plans DeepSeek-V3's 671 B parameters, whose tensors are holes in sparse files: from Hugging
Face's names to torchtitan's and to Megatron-core's, and from torchtitan's back. Memory is anonymous memory, sampled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measure import Run, machine, measure, median
from benchmarks.scale import crc_of_zeros
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.dcp_layout import METADATA, Item, chunk_archive, make_dcp_plan, metadata
from dsconv.convert.dcp_writer import to_dcp
from dsconv.convert.plan import parse_size
from dsconv.names.choosing import with_names

HERE = Path(__file__).parent
DSCONV, COPY, TITAN = "dsconv --names hf --no-fsync", "cp", "torchtitan's convert_to_hf"
SETTLE_SECONDS = 0.5
GOALS = ((DSCONV, COPY, "at most 1.6"), (DSCONV, TITAN, "at least 5 times as fast"))
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def llama_config(billions: float) -> dict[str, Any]:
    """Return the config.json of a llama of about that many parameters."""
    hidden, layers = 2048, max(1, round(billions * 1e9 / 61e6) - 2)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 8192,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def llama_shapes(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return with_outer(
        {f"model.layers.{n}.{name}.weight": s for n in range(config["num_hidden_layers"]) for name, s in layer.items()},
        config,
    )


def deepseek_shapes(config: dict[str, Any]) -> Shapes:
    hidden, heads, moe = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, latent, rank = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank")
    )
    attention = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_a_proj": (rank, hidden),
        "self_attn.q_a_layernorm": (rank,), "self_attn.q_b_proj": (heads * (nope + rope), rank),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden), "self_attn.kv_a_layernorm": (latent,),
        "self_attn.kv_b_proj": (heads * (nope + config["v_head_dim"]), latent),
        "self_attn.o_proj": (hidden, heads * config["v_head_dim"]),
    }  # fmt: skip
    found: Shapes = {}
    for number in range(config["num_hidden_layers"]):
        mlps = {"mlp": config["intermediate_size"]}
        if number >= config["first_k_dense_replace"]:
            mlps = {f"mlp.experts.{expert}": moe for expert in range(config["n_routed_experts"])}
            mlps["mlp.shared_experts"] = moe * config["n_shared_experts"]
            found[f"model.layers.{number}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            found[f"model.layers.{number}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for name, shape in attention.items():
            found[f"model.layers.{number}.{name}.weight"] = shape
        for name, inner in mlps.items():
            for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                found[f"model.layers.{number}.{name}.{part}_proj.weight"] = shape
    return with_outer(found, config)


def with_outer(shapes: Shapes, config: dict[str, Any]) -> Shapes:
    table = (config["vocab_size"], config["hidden_size"])
    return {
        "model.embed_tokens.weight": table, **shapes, "model.norm.weight": (config["hidden_size"],),
        "lm_head.weight": table,
    }  # fmt: skip


def hub_folder(folder: Path, config: dict[str, Any], shapes: Shapes, filled: bool) -> Path:
    """Return a folder of bf16 safetensors, which is made unless it exists: of random bytes, or of holes."""
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards: list[list[str]] = [[]]
    total = 0
    for name, shape in shapes.items():
        total += math.prod(shape) * 2
        if total > 5_000_000_000:
            shards.append([])
            total = math.prod(shape) * 2
        shards[-1].append(name)
    weight_map = {}
    random = np.random.default_rng(0)
    for number, names in enumerate(shards, 1):
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + math.prod(shapes[name]) * 2
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
            weight_map[name] = filename
        text = json.dumps(header).encode()
        with open(folder / filename, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            if filled:
                file.seek(8 + len(text))
                file.writelines(random.bytes(min(64 << 20, end - at)) for at in range(0, end, 64 << 20))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sparse_dcp(folder: Path, checkpoint: Checkpoint) -> Path:
    """Return a DCP directory of a checkpoint's names and shapes, whose tensors are holes."""
    if (folder / METADATA).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    items = [Item(entry, ((entry.name,),)) for entry in checkpoint.values()]
    plan = make_dcp_plan(items, [], source=checkpoint.path, dtype=None, max_file_bytes=parse_size("5GB"))
    files = {name: open(folder / name, "wb") for name in plan.files}  # noqa: SIM115
    for name, nbytes in plan.files.items():
        files[name].truncate(nbytes)
    for tensor in plan.tensors:
        for chunk in tensor.chunks:
            for offset, data in chunk_archive(tensor.dtype, chunk.sizes).fixed([crc_of_zeros(chunk.data_bytes)]):
                files[chunk.filename].seek(chunk.offset_bytes + offset)
                files[chunk.filename].write(data)
    for file in files.values():
        file.close()
    (folder / METADATA).write_bytes(metadata(plan))
    return folder


def commands(source: Path, config: Path, merged: Path, target: Path, titan: Path | None) -> dict[str, list[str]]:
    found = {
        DSCONV: [*program(), "merge", str(source), str(target), "--names", "hf", "--config-from", str(config),
                 "--no-fsync", "--quiet"],
        COPY: ["cp", "-r", str(merged), str(target)],
    }  # fmt: skip
    if titan is not None:
        values = json.loads((config / "config.json").read_text())
        keys = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
                "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
                "vocabulary": "vocab_size"}  # fmt: skip
        sizes = json.dumps({key: values[name] for key, name in keys.items()})
        found[TITAN] = [str(titan), str(HERE / "torchtitan_convert.py"), str(source), str(target), sizes]
    return found


def program() -> list[str]:
    return [sys.executable, "-m", "dsconv"]


def checked(command: list[str]) -> Run:
    run = measure(command)
    if run.code:
        raise click.ClickException(f"exit code {run.code} of {' '.join(command)}\n{run.output}")
    return run


def rounds_of(todo: dict[str, list[str]], target: Path, rounds: int) -> Iterator[tuple[str, Run]]:
    """Yield the runs of all rounds but the first, which only warms the page cache."""
    for number in range(rounds + 1):
        names = list(todo)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            time.sleep(SETTLE_SECONDS)
            run = checked(todo[name])
            if number:
                yield name, run
    shutil.rmtree(target)


def convert(folder: Path, size: float, rounds: int, titan: Path | None) -> dict[str, Any]:
    """Convert a llama of torchtitan's names, and return what it took."""
    config = llama_config(size)
    shapes = llama_shapes(config)
    model = hub_folder(folder / f"llama-{size}", config, shapes, filled=True)
    source, merged, target = folder / f"titan-{size}", folder / "merged", folder / "target"
    if not (source / METADATA).is_file():
        to_dcp(model, source, names="torchtitan", fsync=False)
    shutil.rmtree(merged, ignore_errors=True)
    todo = commands(source, model, merged, target, titan)
    checked([str(merged) if word == str(target) else word for word in todo[DSCONV]])
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for name, run in rounds_of(todo, target, rounds):
        runs[name].append(run)
    shutil.rmtree(merged)
    ratios = {
        f"{one} / {other}": median([a.seconds / b.seconds for a, b in zip(runs[one], runs[other], strict=True)])
        for one, other, _ in GOALS
        if other in runs
    }
    return {
        "parameters": sum(map(math.prod, shapes.values())),
        "seconds": {name: [round(run.seconds, 3) for run in of] for name, of in runs.items()},
        "peak_anonymous_mb": {name: round(median([run.peak_bytes for run in of]) / 1e6) for name, of in runs.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def plans(folder: Path, layers: int) -> dict[str, Any]:
    """Plan DeepSeek-V3, of so many layers, in each direction, and return what it took."""
    config = {**DEEPSEEK, "num_hidden_layers": layers}
    shapes = deepseek_shapes(config)
    hub = hub_folder(folder / f"deepseek-{layers}", config, shapes, filled=False)
    titan = sparse_dcp(
        folder / f"deepseek-titan-{layers}", with_names(open_checkpoint(hub), hub / "config.json", "torchtitan")
    )
    todo = {
        "Hugging Face to torchtitan": ["to-dcp", str(hub), str(folder / "out"), "--names", "torchtitan"],
        "Hugging Face to Megatron-core": ["to-dcp", str(hub), str(folder / "out"), "--names", "megatron"],
        "torchtitan to Hugging Face": ["merge", str(titan), str(folder / "out"), "--names", "hf", "--config-from",
                                       str(hub)],
    }  # fmt: skip
    found = {name: checked([*program(), *words, "--dry-run", "--quiet"]) for name, words in todo.items()}
    return {
        "parameters": sum(map(math.prod, shapes.values())),
        "output_bytes": sum(map(math.prod, shapes.values())) * BY_NAME["bfloat16"].itemsize,
        "plans": {
            name: {"seconds": round(run.seconds, 1), "peak_anonymous_mb": round(run.peak_bytes / 1e6)}
            for name, run in found.items()
        },
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench/names"), show_default=True)
@click.option("--size", type=float, default=1.0, show_default=True, help="Billions of parameters of the llama.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--torchtitan", "titan", type=click.Path(path_type=Path), help="A python that has torchtitan.")
@click.option("--layers", type=click.IntRange(4), default=61, show_default=True, help="Of DeepSeek-V3.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, size: float, rounds: int, titan: Path | None, layers: int, as_json: bool) -> None:
    """Convert a llama, and plan DeepSeek-V3."""
    folder = folder.resolve()
    converted, planned = convert(folder, size, rounds, titan), plans(folder, layers)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "convert": converted, "plan": planned}, indent=2))
        return
    click.echo(f"{converted['parameters'] / 1e6:,.0f} M parameters of bf16, torchtitan's names to Hugging Face's:")
    for name, seconds in converted["seconds"].items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        click.echo(f"  {name:32} {median(seconds):6.2f} s  ({spread})  {converted['peak_anonymous_mb'][name]:6,} MB")
    for one, other, goal in GOALS:
        ratio = converted["ratios"].get(f"{one} / {other}")
        if ratio is not None:
            text = f"{1 / ratio:.1f} times as fast as" if other == TITAN else f"{ratio:.2f} of"
            click.echo(f"  {one}: {text} {other} (goal: {goal})")
    click.echo(f"{planned['parameters'] / 1e9:,.0f} B parameters planned (goal: under 60 s and 1,000 MB):")
    for name, cost in planned["plans"].items():
        click.echo(f"  {name:32} {cost['seconds']:6.1f} s  {cost['peak_anonymous_mb']:6,} MB")


if __name__ == "__main__":
    main()
