"""The content of the output folder, read by other libraries: files, names, headers, index, manifest and sidecars."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dsconv
from dsconv import DsconvError
from dsconv.convert.plan import parse_size
from tests.trained import Trained, load_safetensors, raw, same

CASE = "llama_tied-z3-bf16-w3"


def headers(path: Path) -> tuple[int, dict[str, Any]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return size, json.loads(data[8 : 8 + size])


def test_one_file(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    report = dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "dsconv.manifest.json",
        "model.safetensors",
    ]
    assert report.files == ["model.safetensors"]
    size, header = headers(tmp_path / "out" / "model.safetensors")
    assert (size + 8) % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert report.ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_same_bytes_as_safetensors_own_writer(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """With data of one dtype in one order, our file equals theirs, byte for byte, after the header."""
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", fsync=False)
    merged = load_safetensors(tmp_path / "out")
    save_file(merged, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = (headers(path) for path in (tmp_path / "out" / "model.safetensors", tmp_path / "theirs.safetensors"))
    assert set(ours[1]) == set(theirs[1])
    assert load_safetensors(tmp_path / "theirs.safetensors").keys() == merged.keys()


@pytest.mark.parametrize("limit", ["3KB", "10KB", 1])
def test_shards(limit: str | int, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(CASE)
    report = dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, max_shard_size=limit, verify_output=True)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    made.check(load_safetensors(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for path in shards:
        held = load_safetensors(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(held)
        assert len(held) == 1 or sum(len(raw(t)) for t in held.values()) <= parse_size(limit)
    merged = load_safetensors(tmp_path / "out")
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in merged.values()),
        "total_size": sum(len(raw(t)) for t in merged.values()),
    }
    assert report.files == [*(path.name for path in shards), "model.safetensors.index.json"]


def test_transformers_loads_shards(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(CASE)
    dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, max_shard_size="5KB")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(same(state[name], tensor) for name, tensor in made.truth.items())


def test_manifest(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("odd-z3-bf16-w2")
    dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, max_shard_size=200, sha256=True)
    manifest = json.loads((tmp_path / "out" / "dsconv.manifest.json").read_text())
    merged = load_safetensors(tmp_path / "out")
    assert manifest["dsconv_version"] == dsconv.__version__
    assert manifest["source"]["format"] == "ZeRO-3"
    assert manifest["source"]["step"] == 2
    assert manifest["source"]["world"] == {"data_parallel": 2, "model_parallel": 1}
    assert manifest["source"]["deepspeed_version"].startswith("0.")
    sources = {path.name: path.stat().st_size for path in made.checkpoint.rglob("*.pt")}
    assert manifest["source"]["files"].items() <= sources.items()
    assert set(manifest["tensors"]) == set(merged)
    for name, row in manifest["tensors"].items():
        assert row["crc32"] == f"{zlib.crc32(raw(merged[name])):08x}", name
        assert row["shape"] == list(merged[name].shape)
        assert row["dtype"] == str(merged[name].dtype).removeprefix("torch.")
        assert name in load_safetensors(tmp_path / "out" / row["file"])
    for name, row in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert row == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_dry_run_is_what_a_run_does(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("odd-z2-fp32-w2")
    planned = dsconv.merge(made.checkpoint, tmp_path / "out", dry_run=True, max_shard_size=300, dtype="bf16")
    assert not (tmp_path / "out").exists()
    done = dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, max_shard_size=300, dtype="bf16")
    assert planned.files == done.files
    assert (
        planned.nbytes == done.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    )
    for row in planned.plan:
        _, header = headers(tmp_path / "out" / row["file"])
        assert header[row["name"]]["data_offsets"] == [row["offset"], row["offset"] + row["bytes"]]
        assert header[row["name"]]["shape"] == row["shape"]
    assert len(planned.plan) == done.tensors


def test_sidecars_beside_the_checkpoint(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    config = json.loads((save_dir / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "modeling_mine.Mine"},
        "dtype": "bfloat16",
    }
    (save_dir / "config.json").write_text(json.dumps(config))
    wanted = {
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "preprocessor_config.json": "{}",
        "chat_template.jinja": "hi",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "modeling_mine.py": "class Mine: ...",
    }
    for name, text in wanted.items():
        (save_dir / name).write_text(text)
    (save_dir / "training.log").write_text("not this")
    (save_dir / "other.py").write_text("nor this")
    report = dsconv.merge(save_dir, tmp_path / "out", fsync=False)
    assert set(report.sidecars) == {*wanted, "config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *wanted,
        "config.json",
        "model.safetensors",
        "dsconv.manifest.json",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "float32"}


def test_sidecars_of_the_parent_and_of_config_from(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    (save_dir / "config.json").rename(save_dir.parent / "config.json")
    assert dsconv.merge(save_dir, tmp_path / "a", fsync=False).sidecars == ["config.json"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mine"}')
    assert dsconv.merge(save_dir, tmp_path / "b", fsync=False, config_from=other).sidecars == ["config.json"]
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {"model_type": "mine"}


def test_the_dtype_that_config_says_is_that_of_the_weights(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    config = {"model_type": "any", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 3}}
    (save_dir / "config.json").write_text(json.dumps(config))
    for dtype, expected in (("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")):
        dsconv.merge(save_dir, tmp_path / str(dtype), fsync=False, dtype=dtype)
        written = json.loads((tmp_path / str(dtype) / "config.json").read_text())
        assert written == {
            "model_type": "any",
            "torch_dtype": expected,
            "text_config": {"dtype": expected, "hidden_size": 3},
        }


def test_default_output(copied: Callable[[str], Path]) -> None:
    save_dir = copied(CASE)
    assert dsconv.merge(save_dir, fsync=False).output == str(save_dir / "global_step2-fp32")
    assert dsconv.merge(save_dir, fsync=False, dtype="bf16").output == str(save_dir / "global_step2-bf16")
    # An output inside the save dir is not one of its checkpoints.
    assert dsconv.open_checkpoint(save_dir).format == "ZeRO-3"


def test_the_tag_dir_the_save_dir_and_the_trainers_folder(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    save_dir = trained(CASE).checkpoint
    for number, path in enumerate(
        (save_dir, save_dir / "global_step2", trained("llama_tied-z3-bf16-w2-trainer").checkpoint)
    ):
        report = dsconv.merge(path, tmp_path / str(number), fsync=False)
        assert report.sidecars[0] == "config.json"
    assert report.source.endswith("checkpoint-2/global_step2")


def test_fp16_overflow_is_counted_and_reported(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 7e4, -1e30, float("inf"), float("nan"), 65504.0, 65519.9, 65520.0])
    save_file({"w": values, "fine": torch.ones(3)}, tmp_path / "model.safetensors")
    report = dsconv.merge(tmp_path, tmp_path / "out", dtype="fp16", fsync=False)
    assert report.overflowed == {"w": 3}
    assert report.warnings == [
        "NaN or infinite values lie in 1 of 2 tensors, first in 'w'; dsconv inspect --values counts them",
        "3 values in 1 tensor became infinite, too large for the dtype, first in 'w'",
    ]
    assert same(load_safetensors(tmp_path / "out")["w"], values.half())
    manifest = json.loads((tmp_path / "out" / "dsconv.manifest.json").read_text())
    assert manifest["overflowed"] == {"w": 3}


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6),
    limit=st.sampled_from([1, 40, 10**9]),
)
def test_any_dtype_and_shape_survives(
    data: list[tuple[torch.dtype, list[int]]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (dtype, drawn) in enumerate(data):
        # A float of shape [0] is what ZeRO-3 leaves of a weight, so it is refused: see check_not_hollow.
        shape = [0, 2] if drawn == [0] and dtype.is_floating_point else drawn
        size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[f"t{number} é"] = bits.view(dtype).reshape(shape)
    save_file(tensors, folder / "model.safetensors")
    dsconv.merge(folder, folder / "out", fsync=False, max_shard_size=limit, verify_output=True)
    merged = load_safetensors(folder / "out")
    assert set(merged) == set(tensors)
    assert all(same(merged[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), ("7", 7), (9, 9), ("2KiB", 2048), ("1TB", 10**12)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "0", "1e3", "0.5"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_workers_do_not_change_the_output(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    for workers in (1, 2, 7):
        dsconv.merge(trained(CASE).checkpoint, tmp_path / str(workers), fsync=workers == 2, workers=workers)
    names = sorted(os.listdir(tmp_path / "1"))
    for name in names:
        assert len({(tmp_path / str(w) / name).read_bytes() for w in (1, 2, 7)}) == 1


def test_merge_of_a_safetensors_folder_into_itself_needs_force(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / "model.safetensors")
    with pytest.raises(DsconvError, match="already holds a model"):
        dsconv.merge(tmp_path, tmp_path, fsync=False)
    dsconv.merge(tmp_path, tmp_path, fsync=False, force=True, dtype="bf16", verify_output=True)
    assert same(load_safetensors(tmp_path)["w"], torch.arange(6.0).bfloat16())


def test_unwritable_dtype_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        dsconv.merge(tmp_path, tmp_path / "out", dtype="int4")
