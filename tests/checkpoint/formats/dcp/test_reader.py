"""Directories of torch.distributed.checkpoint: every real one is merged bit for bit, and broken ones are refused by
name.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import dsconv
from dsconv.checkpoint.formats.dcp.chunks import ChunkFiles
from dsconv.checkpoint.formats.dcp.metadata import Stored
from dsconv.checkpoint.formats.dcp.names import choose
from dsconv.checkpoint.formats.items.state_dicts import Leaf
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.pieces import arranged
from dsconv.checkpoint.map.regions import runs
from dsconv.checkpoint.map.tensors import Extent, Piece, Record
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    SeveralModelsError,
    UnsafeError,
    UnsupportedError,
)
from tests.checkpoint.building import colliding_pairs, glob, text
from tests.cli.running import dsconv as command
from tests.fixtures.dcp import CASES, STEP
from tests.fixtures.gloo import ensure
from tests.trained import Trained, load_safetensors, same

DIRECTORIES = [name for name in CASES if not name.startswith("hf")]


@functools.cache
def made(name: str) -> Trained:
    return Trained(ensure("dcp")[name])


def ckpt(name: str) -> Path:
    return made(name).folder / "ckpt"


@pytest.mark.parametrize("name", DIRECTORIES)
def test_merge_is_bit_exact(name: str, tmp_path: Path) -> None:
    case = made(name)
    checkpoint = dsconv.open_checkpoint(case.checkpoint)
    report = dsconv.merge(checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    case.check(load_safetensors(tmp_path / "out"))
    assert checkpoint.world == {"ranks": CASES[name].world}
    warned = {"per_rank-w3": ["1"], "titan-w3": [case.checkpoint.name], "root_prefix-w3": ["left"]}
    assert [w.split()[0] for w in report.warnings] == warned.get(name, [])
    for tensor, expected in case.truth.items():
        assert same(checkpoint[tensor].read(), expected), tensor


@pytest.mark.parametrize(
    ("name", "left_out", "removed"),
    [
        ("fsdp2-w3", {"lr_scheduler": 7, "optim": 35, "rng": 1, "step": 1}, ["model."]),
        ("hsdp-w4", {"app.optim": 30}, ["app.model."]),
        ("tp-w3", None, None),
        ("threads-w3", {"_extra_state": 1}, ["model."]),
        ("wrapped-w3", None, ["net.", "_orig_mod.", "_checkpoint_wrapped_module."]),
        ("zstd-w3", {"step": 1}, ["model."]),
        ("root_prefix-w3", {"optimizer.state.lr": 1}, ["model."]),
        ("titan-w3", {"dataloader": 2, "lr_scheduler": 7, "optimizer": 86, "train_state": 2}, None),
    ],
)
def test_left_out_items_are_reported(name: str, left_out: dict[str, int] | None, removed: list[str] | None) -> None:
    info = dsconv.open_checkpoint(ckpt(name)).info
    found = info.get("left_out")
    if found and "lr_scheduler" in found:  # torch releases differ in what a scheduler keeps
        assert left_out is not None
        assert found.keys() == left_out.keys()
        assert all(
            found[key] == count for key, count in left_out.items() if key not in ("lr_scheduler", "optimizer", "optim")
        )
    else:
        assert found == left_out
    assert info.get("removed_prefixes") == removed


def test_inspect_and_merge_from_the_command_line(tmp_path: Path) -> None:
    shown = command("inspect", ckpt("hsdp-w4"))
    assert "left out          30 app.optim" in shown.out
    assert "removed prefixes  app.model." in shown.out
    assert (
        command("inspect", ckpt("titan-w3"), "--tag", "step-2", "--json").json["info"]["left_out"]["train_state"] == 2
    )
    assert command("merge", ckpt("titan-w3"), tmp_path / "out", "--tag", "step-2", "--quiet").code == 0
    refused = command("merge", ckpt("titan-w3"), tmp_path / "other", "--tag", "step-3")
    assert refused.code == 3
    assert "no checkpoint of tag 'step-3'; choose one with --tag, or give its folder: step-2, step-10" in " ".join(
        refused.err.split()
    )


def test_weights_of_the_folder_itself_come_before_checkpoints_in_it(tmp_path: Path) -> None:
    """After a final save_model, the Trainer's output folder holds the model beside the checkpoints."""
    folder = Path(shutil.copytree(ckpt("trainer-w2"), tmp_path / "run"))
    assert dsconv.open_checkpoint(folder).info["tag"] == "checkpoint-1"
    dsconv.merge(folder, tmp_path / "out", fsync=False)
    shutil.copyfile(tmp_path / "out" / "model.safetensors", folder / "model.safetensors")
    assert dsconv.open_checkpoint(folder).format == "safetensors"


def test_the_latest_whole_step_is_taken_and_any_by_tag(tmp_path: Path) -> None:
    """torchtitan's folder has the steps 2, 10 and 20, of which the last has no .metadata."""
    folder = ckpt("titan-w3")
    latest = dsconv.open_checkpoint(folder)
    assert (latest.step, latest.info["tag"]) == (10, "step-10")
    assert "step 20" in latest.warnings[0]
    old = dsconv.open_checkpoint(folder, "step-2")
    assert old.step == 2
    truth = load_safetensors(made("titan-w3").folder / "truth-2.safetensors")
    assert all(same(old[name].read(), tensor) for name, tensor in truth.items())
    direct = dsconv.open_checkpoint(folder / "step-2")
    assert (direct.step, direct.warnings) == (2, ())
    copied = shutil.copytree(folder, tmp_path / "ckpt")
    report = dsconv.merge(copied, fsync=False, tag="step-2")
    assert Path(report.output) == copied / "step-2-merged"


@pytest.mark.parametrize("path", [f"checkpoint-{STEP}", f"checkpoint-{STEP}/pytorch_model_fsdp_0", "."])
def test_transformers_loads_what_accelerate_saved(path: str, tmp_path: Path) -> None:
    """Open the Trainer's folder, the folder inside it, or the folder of all checkpoints; config.json lies two levels
    up.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = dsconv.open_checkpoint(ckpt("accelerate-w3") / path)
    assert checkpoint.step == STEP
    dsconv.merge(checkpoint, tmp_path / "out", fsync=False)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(same(state[name], tensor) for name, tensor in made("accelerate-w3").truth.items())


def test_tied_weights_load_though_they_are_written_twice(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = dsconv.open_checkpoint(ckpt("tied-w3"))
    assert checkpoint.info == {"removed_prefixes": ["state.model.", "module."]}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint)
    dsconv.merge(checkpoint, tmp_path / "out", fsync=False)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(same(model.state_dict()[name], tensor) for name, tensor in made("tied-w3").truth.items())


def test_a_folder_of_optimizer_state_holds_no_model() -> None:
    folder = ckpt("accelerate-w3") / f"checkpoint-{STEP}" / "optimizer_0"
    with pytest.raises(UnsupportedError, match=f"^{folder}: no tensor of a model; it holds .*optimizer"):
        dsconv.open_checkpoint(folder)


def test_two_models_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    source = ckpt("accelerate-w3") / f"checkpoint-{STEP}" / "pytorch_model_fsdp_0"
    for number in (0, 1):
        shutil.copytree(source, tmp_path / f"pytorch_model_fsdp_{number}")
    with pytest.raises(SeveralModelsError, match=r"holds 2 models: 'pytorch_model_fsdp_0' .*choose one with --item"):
        dsconv.open_checkpoint(tmp_path)
    second = dsconv.open_checkpoint(tmp_path, item="pytorch_model_fsdp_1")
    assert second.info["models"].keys() == {"pytorch_model_fsdp_0", "pytorch_model_fsdp_1"}
    assert second.sources[0].parent.name == "pytorch_model_fsdp_1"


def test_a_root_prefix_stays_unless_a_config_rules_it_out(tmp_path: Path) -> None:
    case = made("root_prefix-w3")
    bare = shutil.copytree(ckpt("root_prefix-w3"), tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    kept = {"optimizer.state.lr"}  # a number under a bare name may be a buffer; only the architecture can rule that out
    assert set(dsconv.open_checkpoint(bare)) == {f"model.{name}" for name in case.truth} | kept
    assert set(dsconv.open_checkpoint(ckpt("root_prefix-w3"))) == set(case.truth)


def leaves(*paths: tuple[str, ...], shape: tuple[int, ...] | None = (3, 2)) -> dict[str, Leaf]:
    """Return items by their paths in planner_data. A path that ends with ``!`` is an object."""
    found = {}
    for path in paths:
        name = path[-1].removesuffix("!")
        found["/".join(path)] = Leaf((*path[:-1], name), shape if name == path[-1] else None, name == path[-1])
    return found


ADAM = ("exp_avg", "exp_avg_sq", "step")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        # A dictionary under `model`, with names that begin with `model.` or do not.
        ([("model", "model.norm"), ("model", "head")], ["model.norm", "head"]),
        ([("model", "model.norm")], ["model.norm"]),
        ([("state", "model", "w"), ("state", "step!")], ["w"]),
        ([("state_dict", "model", "w"), ("state_dict", "optimizer", "step!")], ["w"]),
        # Bare names: a dot is part of the name, whatever child modules are called.
        ([("model.norm",), ("model.head",)], ["model.norm", "model.head"]),
        ([("w",), ("optimizer.w",)], ["w", "optimizer.w"]),
        ([("optim.w",), ("scheduler.w",), ("dataloader.w",), ("state.w",)],
         ["optim.w", "scheduler.w", "dataloader.w", "state.w"]),
        ([("optimizer",), ("random_proj.weight",)], ["optimizer", "random_proj.weight"]),
        ([("model", "optim.w"), ("model", "rng.w"), ("model", "v")], ["optim.w", "rng.w", "v"]),
        # A single dictionary of another name is the model.
        ([("net", "w")], ["w"]),
        ([("net", "a", "w"), ("net", "a", "v")], ["a.w", "a.v"]),
        # A name with a dot is complete: the names of the dictionaries around it are not part of it.
        ([("app", "net", "a", "l.w"), ("app", "net", "a", "l.v")], ["l.w", "l.v"]),
        # An optimizer is recognised by its structure: nested, flattened, with or without a name or param_groups.
        ([("net", "w"), ("opt", "state", "w", "exp_avg"), ("opt", "param_groups", "0", "lr!")], ["w"]),
        ([("w",), ("optimizer", "state.w.exp_avg"), ("optimizer", "param_groups.w.lr!")], ["w"]),
        ([("w",), ("state.w.exp_avg",), ("param_groups.w.lr!",)], ["w"]),
        ([("w",), ("sgd.state.w.momentum_buffer",), ("sgd.param_groups.w.lr!",)], ["w"]),
        ([("model", "w"), ("adam", "state", "0", "exp_avg"), ("adam", "param_groups!",)], ["w"]),
        ([("model", "w"), *(("moments", "w", slot) for slot in ADAM)], ["w"]),
        ([("model", "w"), *(("optimizer", "state", slot, "w") for slot in ADAM)], ["w"]),
        ([("model", "w"), ("mine", "state", "w", "momentum")], ["w"]),
        ([("w",), ("state.weight",), ("state.a.b",), ("state.w.exp_avg",), ("param_groups.w.lr!",)],
         ["w", "state.weight", "state.a.b"]),
        ([("state.w",), ("w",), ("state.w.exp_avg",), ("param_groups.w.lr!",), ("state.w.step!",)], ["state.w", "w"]),
        ([("w",), ("state.weight",), ("state.w.momentum",)], ["w", "state.weight"]),
        # These are weights in spite of their names.
        ([("w",), ("exp_avg",)], ["w", "exp_avg"]),
        ([("state.w",), ("state.v",)], ["state.w", "state.v"]),
        # Wrappers are removed unless two names would become one.
        ([("model", "_orig_mod.w")], ["w"]),
        ([("model", "module.w"), ("model", "module.v")], ["w", "v"]),
        ([("model", "module.w"), ("model", "v")], ["module.w", "v"]),
        ([("model", "_orig_mod.w"), ("model", "w")], ["_orig_mod.w", "w"]),
        ([("model", "base_model.model.q.lora_A.default.weight")], ["base_model.model.q.lora_A.default.weight"]),
    ],
)  # fmt: skip
def test_names(paths: list[tuple[str, ...]], expected: list[str]) -> None:
    assert sorted(choose(leaves(*paths), Path("x"), None).chosen.values()) == sorted(expected)


@pytest.mark.parametrize(
    ("paths", "models"),
    [
        ([("actor", "w"), ("critic", "w"), ("critic", "v")], {"actor": 1, "critic": 2}),
        ([("model", "w"), ("ema", "w")], {"model": 1, "ema": 1}),
        ([("state", "model", "w"), ("state", "ema", "w")], {"state.model": 1, "state.ema": 1}),
        ([("app", "nets", "g", "w"), ("app", "nets", "d", "w")], {"app.nets.g": 1, "app.nets.d": 1}),
        ([("encoder", "w"), ("decoder", "w")], {"encoder": 1, "decoder": 1}),
        ([("w",), ("ema", "w")], {".": 1, "ema": 1}),
        ([("model", "w"), ("optimizer", "w")], {"model": 1, "optimizer": 1}),
        ([(name, kind, "w") for name in ("actor", "critic") for kind in ("model",)]
         + [("actor", "optim", "state", "w", "exp_avg"), ("actor", "optim", "param_groups!")],
         {"actor.model": 1, "critic.model": 1}),
    ],
)  # fmt: skip
def test_several_models_are_never_mixed(paths: list[tuple[str, ...]], models: dict[str, int]) -> None:
    with pytest.raises(SeveralModelsError, match=r"They are not mixed: choose one with --item") as caught:
        choose(leaves(*paths), Path("x"), None)
    assert caught.value.models == models
    for key in models:
        chosen = choose(leaves(*paths), Path("x"), None, key)
        assert (chosen.key, len(chosen.chosen)) == (key, models[key])
        assert "w" in chosen.chosen.values()
    with pytest.raises(CheckpointNotFoundError, match="no model is called 'reference'; it holds '"):
        choose(leaves(*paths), Path("x"), None, "reference")


def test_an_item_may_be_the_dictionary_around_a_model() -> None:
    paths = leaves(("actor", "model", "w"), ("critic", "model", "w"), ("both", "a", "w"), ("both", "b", "w"))
    assert choose(paths, Path("x"), None, "actor").key == "actor.model"
    assert sorted(choose(paths, Path("x"), None, "both").chosen.values()) == ["a.w", "b.w"]


def test_leaving_out_what_may_be_trained_gives_a_warning() -> None:
    both = leaves(("model", "w"), ("model", "v")) | leaves(("head", "scale"), shape=(2,))
    found = choose(both, Path("x"), None)
    assert found.left_out == {"head": 1}
    assert "left out 'head', which is not part of the model 'model'" in found.warnings[0]
    assert choose(both, Path("x"), None, "head").chosen == {"head/scale": "scale"}


# Broken and hostile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    """Return ``broken(case)``, which copies the case's directory, for tests that damage it."""
    return lambda name: Path(shutil.copytree(ckpt(name), tmp_path / "broken"))


def edit(folder: Path, change: Callable[[Metadata], None], name: str = ".metadata") -> None:
    metadata = pickle.loads((folder / name).read_bytes())
    change(metadata)
    (folder / name).write_bytes(pickle.dumps(metadata))


def place(metadata: Metadata, name: str, number: int = 0, **changes: Any) -> None:
    """Change the place where chunk ``number`` of a tensor is stored."""
    index = [key for key in metadata.storage_data if key.fqn == name][number]
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def moved(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata["model.up.weight"]
    chunk = tensor.chunks[1]
    info = metadata.storage_data.pop(MetadataIndex("model.up.weight", chunk.offsets))
    tensor.chunks[1] = ChunkStorageMetadata(torch.Size([chunk.offsets[0] - 1, 0]), chunk.sizes)
    metadata.storage_data[MetadataIndex("model.up.weight", tensor.chunks[1].offsets)] = info


def shorter(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata["model.up.weight"]
    tensor.chunks[0] = ChunkStorageMetadata(tensor.chunks[0].offsets, torch.Size([2, 6]))


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.up.weight"].properties.dtype = torch.int32


def unknown_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.up.weight"].properties.dtype = torch.complex128


def forgotten(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.up.weight"].chunks.pop(1)


def swapped(metadata: Metadata) -> None:
    """Swap the sound chunks of two tensors."""
    keys = [MetadataIndex(name, [0]) for name in ("model.up.bias", "model.scale")]
    data = metadata.storage_data
    data[keys[0]], data[keys[1]] = data[keys[1]], data[keys[0]]


def lost_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("model.up.weight", [0, 0])]


def unhashable(metadata: Metadata) -> None:
    """Return an index whose offset holds a list. The class is frozen, so the field is set as a pickle would set it."""
    key = MetadataIndex(UP, [0, 0])
    info = metadata.storage_data.pop(key)
    metadata.storage_data[key] = info
    object.__setattr__(key, "offset", ([],))


UP = "model.up.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda m: place(m, UP, relative_path="../outside.distcp"),
            UnsafeError,
            r"a chunk lies in '\.\./outside\.distcp', outside",
        ),
        (lambda m: place(m, UP, relative_path="/etc/passwd"), UnsafeError, "outside the folder"),
        (lambda m: place(m, UP, relative_path="a/../../b"), UnsafeError, "outside the folder"),
        (lambda m: place(m, UP, relative_path=7), MalformedError, "not the name of a file"),
        (lambda m: place(m, UP, relative_path={}), MalformedError, "not the name of a file"),
        (lambda m: place(m, UP, relative_path="x" * 300), MalformedError, "a name longer than any file has"),
        (lambda m: place(m, UP, relative_path="x/" * 3000 + "x"), MalformedError, "a name longer than any file has"),
        (unhashable, MalformedError, "storage_data has the key 'model.up.weight' at"),
        (
            lambda m: place(m, UP, relative_path="gone.distcp"),
            MissingShardError,
            "lacks 1 file that .metadata names, the first 'gone.distcp'",
        ),
        (
            lambda m: place(m, UP, offset=10**9),
            MalformedError,
            "truncated: the chunk of 'model.up.weight' should end at",
        ),
        (lambda m: place(m, UP, offset=-1), MalformedError, "is stored in .* bytes at -1"),
        (lambda m: place(m, UP, length=700), MalformedError, "no zip directory.*in the chunk of 'model.up.weight'"),
        (
            lambda m: place(m, UP, offset=m.storage_data[MetadataIndex("model.row", [0, 0])].offset),
            MalformedError,
            "share byte",
        ),
        (lambda m: place(m, UP, transform_descriptors=["stream.lz4/1"]), UnsupportedError, "transformed by .*lz4"),
        (lambda m: place(m, UP, transform_descriptors=["stream.zstd/1"]), MalformedError, "not a zstd frame"),
        (moved, InconsistentCheckpointError, "__1_0.distcp: an overlap at element 12"),
        (forgotten, InconsistentCheckpointError, "__2_0.distcp: a hole at element 18"),
        (shorter, InconsistentCheckpointError, r"holds float32 \[3, 6\] where the metadata says float32 \[2, 6\]"),
        (other_dtype, InconsistentCheckpointError, "holds float32 .* says int32"),
        (unknown_dtype, UnsupportedError, "is of dtype complex128"),
        (swapped, InconsistentCheckpointError, r"where the metadata says float32"),
        (lost_place, MalformedError, r"has a chunk at \[0, 0\] that is stored nowhere"),
        (lambda m: m.planner_data.update({UP: ("model", None)}), MalformedError, "leads to 'model.up.weight' by"),
        (lambda m: m.planner_data.update({UP: ("a",) * 40}), MalformedError, "leads to 'model.up.weight' by"),
        (lambda m: m.planner_data.update({UP: ("model", "\ud800")}), MalformedError, "leads to 'model.up.weight' by"),
        (
            lambda m: m.planner_data.update({UP: ("model", "__metadata__")}),
            MalformedError,
            "leads to 'model.up.weight'",
        ),
        (lambda m: m.state_dict_metadata.update({"__metadata__": 3}), MalformedError, "which safetensors keeps"),
        (lambda m: m.state_dict_metadata.update({"a" * 5000: 3}), MalformedError, "a tensor's name, of at most 4096"),
        (lambda m: setattr(m.state_dict_metadata[UP], "size", torch.Size([1] * 70)), MalformedError, "70 dimensions"),
        (lambda m: setattr(m, "storage_data", None), MalformedError, "no storage_data"),
        (lambda m: m.state_dict_metadata.update({"x": 3}), MalformedError, "expected .*TensorStorageMetadata, found 3"),
    ],
)
def test_bad_metadata_is_refused(
    change: Callable[[Metadata], None], error: type[DsconvError], words: str, broken: Callable[[str], Path]
) -> None:
    folder = broken("fsdp2-w3")
    edit(folder, change)
    with pytest.raises(error, match=f"(?s)^(tensor|{folder}).*{words}") as caught:
        dsconv.open_checkpoint(folder)
    assert len(str(caught.value)) < 700


class Call:
    """An object that pickles as a function call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_metadata_runs_nothing(broken: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken("fsdp2-w3")
    edit(folder, lambda m: setattr(m, "planner_data", Call(os.system, f"touch {tmp_path}/ran")))
    with pytest.raises(UnsafeError, match=r"posix\.system"):
        dsconv.open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    (folder / ".metadata").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(MalformedError, match=r"expected torch\.distributed\.checkpoint's Metadata, found {'model': 1}"):
        dsconv.open_checkpoint(folder)


def test_a_chunk_that_is_not_a_tensor(broken: Callable[[str], Path]) -> None:
    """The chunk is a sound zip of a number, or of a tensor that runs code when torch unpickles it."""
    folder = broken("fsdp2-w3")
    for value, error in (({"a": 1}, UnsupportedError), (Call(os.system, "true"), UnsafeError)):
        torch.save(value, folder / "other.distcp")
        size = (folder / "other.distcp").stat().st_size
        edit(folder, lambda m, size=size: place(m, UP, relative_path="other.distcp", offset=0, length=size))  # type: ignore[misc]
        with pytest.raises(error, match=f"^{folder}/other.distcp: .*in the chunk of 'model.up.weight'"):
            dsconv.open_checkpoint(folder)


def chunk_of(folder: Path, name: str) -> tuple[Path, Any]:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    return folder / info.relative_path, info


def test_damage_to_a_chunk_is_found_by_its_checksum(broken: Callable[[str], Path], tmp_path: Path) -> None:
    """A flipped bit in the weights is found when they are copied, and one in their description when the checkpoint is
    opened. torch notices neither.
    """
    folder = broken("fsdp2-w3")
    extent = dsconv.open_checkpoint(folder)["up.weight"].pieces[1].extent
    data = bytearray(extent.record.path.read_bytes())
    data[extent.offset_bytes + 3] ^= 1
    extent.record.path.write_bytes(bytes(data))
    with pytest.raises(MalformedError, match=f"^{extent.record.path}: record .* fails its CRC-32"):
        dsconv.merge(folder, tmp_path / "out", fsync=False)
    assert not list((tmp_path / "out").glob("*"))
    file, info = chunk_of(folder, UP)
    data = bytearray(file.read_bytes())
    at = data.index(b"_rebuild_tensor_v2", info.offset)
    data[at] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(MalformedError, match=r"data.pkl fails its CRC-32.*in the chunk of 'model.up.weight'"):
        dsconv.open_checkpoint(folder)


def test_missing_and_truncated_files_are_named(broken: Callable[[str], Path]) -> None:
    folder = broken("fsdp2-w3")
    os.truncate(folder / "__1_0.distcp", 5000)
    with pytest.raises(MalformedError, match=f"^{folder}/__1_0.distcp: truncated: the chunk of .* the file has 5000"):
        dsconv.open_checkpoint(folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(
        MissingShardError, match=f"^{folder} lacks 1 file that .metadata names, the first '__1_0.distcp'"
    ):
        dsconv.open_checkpoint(folder)


def test_each_rank_s_metadata_is_needed(broken: Callable[[str], Path]) -> None:
    folder = broken("per_rank-w3")
    assert "took the lowest rank's" in dsconv.open_checkpoint(folder).warnings[0]
    edit(folder, lambda m: setattr(m.state_dict_metadata["model.steps"], "size", torch.Size([1])), "__2.metadata")
    with pytest.raises(MalformedError, match=f"^{folder}/__2.metadata: 'model.steps' of shape"):
        dsconv.open_checkpoint(folder)
    (folder / "__2.metadata").unlink()
    with pytest.raises(InconsistentCheckpointError, match=r"hole|needs"):
        dsconv.open_checkpoint(folder)
    shutil.copyfile(folder / "__1.metadata", folder / "__2.metadata")
    (folder / "__1.metadata").unlink()
    with pytest.raises(
        MissingShardError, match=f"^{folder}: 2 ranks wrote their own metadata, .* __1.metadata is missing"
    ):
        dsconv.open_checkpoint(folder)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_random_damage_is_an_error_or_harmless(file: str, broken: Callable[[str], Path]) -> None:
    """Flipped, cut and doubled bytes: each file opens or raises DsconvError, in little time."""
    folder = broken("fsdp2-w1")
    whole = (folder / file).read_bytes()
    random = Random(3)
    refused = []
    for _ in range(400):
        data = bytearray(whole)
        at = random.randrange(len(data))
        kind = random.randrange(3)
        if kind == 0:
            data[at] = random.randrange(256)
        elif kind == 1:
            del data[at : at + random.randrange(1, 40)]
        else:
            data[at:at] = data[at : at + random.randrange(1, 40)]
        (folder / file).write_bytes(bytes(data))
        try:
            dsconv.open_checkpoint(folder)
        except DsconvError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert max(map(len, refused)) < 900


def test_chunks_with_colliding_offsets_take_linear_time(tmp_path: Path) -> None:
    """The file chooses the offsets and so their hashes. As dictionary keys they took quadratic time: 5 s for these 1.8
    MB.
    """
    pairs = colliding_pairs(10_000)
    chunks = [ChunkStorageMetadata(torch.Size(pair), torch.Size((1, 1))) for pair in pairs]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((1 << 61, 1 << 61)), chunks)
    storage = [
        (MetadataIndex("w", torch.Size(pair)), _StorageInfo("__0_0.distcp", 10 * i, 10)) for i, pair in enumerate(pairs)
    ]
    whole = pickle.dumps(Metadata({"w": tensor}, storage_data="MARK"), protocol=2)
    # The reader makes the dictionary from pairs, which are memoised first and recalled after the mark.
    made = glob("collections", "OrderedDict") + pickle.dumps(storage, protocol=2)[2:-1] + b"\x85Rr\0\0\x10\x000"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + made + whole[2:].replace(text("MARK"), b"j\0\0\x10\0"))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(10 * len(pairs)))
    start = time.process_time()
    with pytest.raises(MalformedError, match=r"not a torch.save file"):
        dsconv.open_checkpoint(tmp_path)
    assert time.process_time() - start < 2.5


# zstd -----------------------------------------------------------------------------------------------------------------


def test_zstd_without_its_package_and_damaged(broken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = broken("zstd-w3")
    file, info = chunk_of(folder, UP)
    data = bytearray(file.read_bytes())
    whole = bytes(data)
    data[info.offset + info.length // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(MalformedError, match=f"^{folder}/__0_0.distcp: .*in the chunk of"):
        dsconv.open_checkpoint(folder)
    file.write_bytes(whole)
    edit(folder, lambda m: place(m, UP, length=info.length - 1))
    with pytest.raises(MalformedError, match=f"^{folder}/.*a zstd frame that does not end where the chunk does"):
        dsconv.open_checkpoint(folder)
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match=r"pip install 'dsconv-toolkit\[zstd\]'"):
        dsconv.open_checkpoint(folder)


def test_a_zstd_bomb_is_stopped(tmp_path: Path) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    (tmp_path / "__0_0.distcp").write_bytes(bomb)
    stored = Stored("__0_0.distcp", 0, len(bomb), ("stream.zstd/1",))
    tracemalloc.start()
    with ChunkFiles(tmp_path) as files, pytest.raises(MalformedError, match="decompresses to more than its tensor has"):
        files.piece("w", BY_NAME["float32"], (5,), stored)
    assert tracemalloc.get_traced_memory()[1] < 128 << 20
    tracemalloc.stop()
    assert files.unpacked is not None
    assert files.unpacked.path.stat().st_size < 32 << 20


# Where pieces lie -----------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    return shape, [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]


@given(grids())
@settings(max_examples=150, deadline=None)
def test_boxes_lie_where_numpy_puts_them(grid: tuple[tuple[int, ...], list[list[int]]]) -> None:
    """As flat ranges and as regions, each element of each chunk gets its place in the tensor."""
    shape, cuts = grid
    whole = torch.arange(math.prod(shape)).reshape(shape)
    chunks = []
    for corner in product(*(list(pairwise(c)) for c in cuts)):
        box = whole[tuple(slice(a, b) for a, b in corner)]
        record = Record(Path(), 0, box.numel())
        piece = Piece(Extent(record, 0, box.numel()), 0, box.numel())
        chunks.append((tuple(a for a, _ in corner), tuple(box.shape), piece, box.reshape(-1).tolist()))
    pieces = arranged([chunk[:3] for chunk in chunks], shape)
    values = {id(chunk[2].extent): chunk[3] for chunk in chunks}
    for piece in pieces:
        expected = values[id(piece.extent)]
        if piece.region is None:
            assert expected == list(range(piece.start, piece.start + piece.numel))
        else:
            run, outer = runs(piece.region, shape)
            starts: Iterator[int] = (sum(steps) for steps in product(*(axis.tolist() for axis in outer)))
            assert expected == [start + i for start in starts for i in range(run)]


def test_opening_imports_no_torch_and_is_quick(tmp_path: Path) -> None:
    code = f"import sys, dsconv; dsconv.open_checkpoint({str(ckpt('fsdp2-w3'))!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
