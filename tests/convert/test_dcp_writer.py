"""torch's own reader loads the output of ``to-dcp`` into any layout, bit for bit, and the output is whole or absent."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dsconv
from dsconv.checkpoint.map.regions import box, prove_cover
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.convert import dcp_layout
from dsconv.errors import InconsistentCheckpointError, MalformedError, OutputError
from tests.cli.running import dsconv as command
from tests.fixtures import gloo
from tests.trained import Trained, raw, same

ZOO = {
    "matrix": torch.randn(7, 5),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    "deep": torch.randn(2, 1, 3, 11).half(),
    "flags": torch.arange(13) % 3 == 0,
    "ids": torch.arange(9),
    "bytes": torch.arange(200, dtype=torch.uint8),
    "u16": torch.arange(40).to(torch.uint16),
    "fp8": torch.randn(6, 2).to(torch.float8_e5m2),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "zoo").mkdir()
    save_file(ZOO, tmp_path / "zoo" / "model.safetensors")
    return tmp_path / "zoo"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_layout, "CHUNK_BYTES", 64)


def loaded(folder: Path, like: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    state = {prefix + name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert same(found[name], tensor), name


@pytest.mark.parametrize(("prefix", "limit"), [("", "5GB"), ("model.", 2000), ("app.model", 1)])
def test_every_dtype_and_shape(prefix: str, limit: str | int, zoo: Path, tmp_path: Path, small_chunks: None) -> None:
    report = dsconv.to_dcp(zoo, tmp_path / "out", prefix=prefix, max_shard_size=limit, fsync=False)
    dotted = prefix and prefix.rstrip(".") + "."
    check(loaded(tmp_path / "out", ZOO, dotted), ZOO)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(report.files)
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.distcp"))
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.distcp")]
    if limit == "5GB":
        assert len(sizes) == 1
    elif limit == 2000:
        assert max(sizes) <= 2000
    else:  # no chunk fits, so each has its own file
        assert len(sizes) == len(pickle.loads((tmp_path / "out" / ".metadata").read_bytes()).storage_data)


def test_torch_unflattens_it_by_its_planner_data(zoo: Path, tmp_path: Path, small_chunks: None) -> None:
    """A name keeps its dots, and only the prefix becomes keys."""
    dotted = {f"layers.0.{name}": tensor for name, tensor in ZOO.items()}
    save_file(dotted, zoo / "model.safetensors")
    dsconv.to_dcp(zoo, tmp_path / "out", prefix="app.model.", fsync=False)
    dcp_to_torch_save(tmp_path / "out", tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt")
    assert set(state) == {"app"}
    assert set(state["app"]["model"]) == set(dotted)
    check(state["app"]["model"], dotted)


def test_each_chunk_is_a_torch_save_file_with_sound_checksums(zoo: Path, tmp_path: Path, small_chunks: None) -> None:
    dsconv.to_dcp(zoo, tmp_path / "out", fsync=False)
    metadata = pickle.loads((tmp_path / "out" / ".metadata").read_bytes())
    data = (tmp_path / "out" / "__0_0.distcp").read_bytes()
    assert metadata.version == "1.0.0"
    assert len(metadata.storage_data) == 20
    for index, info in metadata.storage_data.items():
        content = data[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None
            assert archive.namelist()[0] == "archive/data.pkl"
        tensor = torch.load(io.BytesIO(content), weights_only=True)
        part = ZOO[index.fqn][tuple(slice(o, o + s) for o, s in zip(index.offset, tensor.shape, strict=True))]
        assert same(tensor, part)
        (tmp_path / "one.pt").write_bytes(content)
        file = TorchFile(tmp_path / "one.pt")
        assert file.root.shape == tuple(tensor.shape)
        (piece,) = file.pieces(file.root) or (None,)
        if piece is not None:
            assert (info.offset + piece.extent.offset_bytes) % 64 == 0


def test_casts_equal_torch(zoo: Path, tmp_path: Path, small_chunks: None) -> None:
    save_file({**ZOO, "large": torch.tensor([1e6, 1.0])}, zoo / "model.safetensors")
    report = dsconv.to_dcp(zoo, tmp_path / "out", dtype="fp16", fsync=False)
    expected = {n: t.half() if t.dtype in (torch.float32, torch.float64, torch.bfloat16) else t for n, t in ZOO.items()}
    check(loaded(tmp_path / "out", expected), expected)
    assert report.overflowed == {"large": 1}
    assert "'large'" in report.warnings[0]


@pytest.mark.parametrize("name", ["everything-w4", "fsdp2-tp-w4", "fsdp1-sharded-w3"])
def test_from_shards_in_regions(name: str, tmp_path: Path, small_chunks: None) -> None:
    """The conversion goes straight from one layout to another, without a merge in between."""
    made = Trained(gloo.ensure("rankfiles")[name])
    dsconv.to_dcp(made.folder, tmp_path / "out", fsync=False)
    truth = {name: tensor for name, tensor in made.truth.items() if tensor.dtype != torch.float8_e4m3fn}
    check(loaded(tmp_path / "out", truth), truth)


def test_from_deepspeed_with_its_ties(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """A tied weight is stored once and found under both names."""
    made = trained("llama_tied-z3-bf16-w2")
    report = dsconv.to_dcp(made.checkpoint, tmp_path / "out", fsync=False)
    assert made.tied
    assert len(report.ties) == len(made.tied)
    check(loaded(tmp_path / "out", made.truth), made.truth)
    assert report.step == made.facts["step"]


def test_a_tied_name_that_safetensors_lacks_is_there_too(tmp_path: Path) -> None:
    """transformers saves one of the two names, but a model's state dict needs both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 17,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "hf")
    report = dsconv.to_dcp(tmp_path / "hf", tmp_path / "out", fsync=False)
    assert report.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    check(loaded(tmp_path / "out", state), state)


def test_the_ties_of_a_merge_are_kept(tmp_path: Path) -> None:
    """The manifest records them, which helps for a model that transformers does not know."""
    made = Trained(gloo.ensure("rankfiles")["verl-fsdp2-w4"])
    dsconv.merge(made.folder / "global_step_7", tmp_path / "merged", fsync=False)
    report = dsconv.to_dcp(tmp_path / "merged", tmp_path / "out", fsync=False)
    assert report.ties == {"head.weight": "embed.weight"}
    check(loaded(tmp_path / "out", made.truth), made.truth)
    (tmp_path / "merged" / "dsconv.manifest.json").write_text(
        '{"ties": {"x": 3, "embed.weight": "norm.bias", "y": "nowhere"}}'
    )
    assert not dsconv.to_dcp(tmp_path / "merged", tmp_path / "again", fsync=False).ties


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 24, 64, 1 << 20]))
def test_chunks_follow_each_other_and_tile_the_tensor(sizes: list[int], itemsize: int, limit: int) -> None:
    shape = tuple(sizes)
    chunks = list(dcp_layout.split_chunks(shape, itemsize, limit))
    assert all(math.prod(part) * itemsize <= limit for _, part in chunks)
    order = torch.arange(math.prod(shape)).reshape(shape)
    parts = [
        order[tuple(slice(o, o + s) for o, s in zip(offsets, part, strict=True))].flatten() for offsets, part in chunks
    ]
    assert torch.equal(torch.cat(parts), order.flatten())
    if math.prod(shape):
        prove_cover([box(offsets, part) for offsets, part in chunks], shape, "w")
    else:
        assert len(chunks) == 1


def test_dry_run_prints_what_a_run_does(zoo: Path, tmp_path: Path, small_chunks: None) -> None:
    plan = dsconv.to_dcp(zoo, tmp_path / "out", dry_run=True, max_shard_size=2000)
    assert not (tmp_path / "out").exists()
    report = dsconv.to_dcp(zoo, tmp_path / "out", fsync=False, max_shard_size=2000)
    assert (plan.files, plan.nbytes, plan.tensors) == (report.files, report.nbytes, report.tensors)
    for row in plan.plan:
        whole = ZOO[row["name"]]
        assert row["bytes"] == whole.numel() * whole.element_size()
        first = min(row["bytes"], 8)  # in the first chunk, whichever tensor that is
        with open(tmp_path / "out" / row["file"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(first) == raw(whole)[:first]


def test_an_existing_checkpoint_is_replaced_only_by_force(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dsconv.to_dcp(zoo, out, fsync=False, max_shard_size=1)
    with pytest.raises(OutputError, match="already holds a DCP checkpoint"):
        dsconv.to_dcp(zoo, out)
    (out / "notes.txt").write_text("mine")
    report = dsconv.to_dcp(zoo, out, fsync=True, force=True)
    assert sorted(p.name for p in out.iterdir()) == sorted([*report.files, "notes.txt"])
    check(loaded(out, ZOO), ZOO)
    with pytest.raises(OutputError, match="is a file"):
        dsconv.to_dcp(zoo, out / "notes.txt")


def test_damage_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "rank_0.pt"
    torch.save({"w": torch.arange(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(500, 510).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(MalformedError, match=r"rank_0.pt.*fails its CRC-32"):
        dsconv.to_dcp(tmp_path / "in", tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_nothing_to_write_and_names_that_collide_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(MalformedError, match="no tensors to write"):
        dsconv.to_dcp(tmp_path, tmp_path / "out")
    for prefix in (".", "a..b", ".a"):
        with pytest.raises(ValueError, match="is not a prefix"):
            dsconv.to_dcp(tmp_path, tmp_path / "out", prefix=prefix)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_interrupted_leaves_nothing(zoo: Path, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dsconv.to_dcp(zoo, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()


def test_no_torch_is_imported_for_a_copy(zoo: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, dsconv; dsconv.to_dcp({str(zoo)!r}, {str(tmp_path / 'out')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    check(loaded(tmp_path / "out", ZOO), ZOO)


def test_the_command(zoo: Path, tmp_path: Path) -> None:
    ran = command("to-dcp", zoo, tmp_path / "out", "--prefix", "model.", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["prefix"] == "model"
    assert ran.json["files"] == ["__0_0.distcp", ".metadata"]
    check(loaded(tmp_path / "out", ZOO, "model."), ZOO)
    again = command("to-dcp", zoo, tmp_path / "out")
    assert (again.code, again.out) == (3, "")
    assert "--force" in again.err
    assert command("to-dcp", zoo, tmp_path / "out", "--force", "--quiet").out == ""
    plan = command("to-dcp", zoo, tmp_path / "other", "--dry-run", "--dtype", "bf16")
    assert "float32" in plan.out
    assert "nothing was written" in plan.out
    assert not (tmp_path / "other").exists()
    bad = command("to-dcp", zoo, tmp_path / "other", "--prefix", "a..b")
    assert bad.code == 2
    assert "is not a prefix" in bad.err


def test_a_checkpoint_that_does_not_open_is_not_a_usage_error(tmp_path: Path) -> None:
    for rank in (0, 1):
        torch.save({"w": torch.arange(rank + 1)}, tmp_path / f"rank_{rank}.pt")
    with pytest.raises(InconsistentCheckpointError):
        dsconv.to_dcp(tmp_path, tmp_path / "out")
    assert command("to-dcp", tmp_path, tmp_path / "out").code == 3


def test_metadata_has_only_names_that_torch_writes(zoo: Path, tmp_path: Path) -> None:
    dsconv.to_dcp(zoo, tmp_path / "ours", fsync=False)
    dcp.save(dict(ZOO), checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours = {
        str(arg)
        for op, arg, _ in pickletools.genops((tmp_path / "ours" / ".metadata").read_bytes())
        if op.name == "GLOBAL"
    }
    texts = [
        str(arg)
        for op, arg, _ in pickletools.genops((tmp_path / "theirs" / ".metadata").read_bytes())
        if "UNICODE" in op.name
    ]
    assert len(ours) > 10
    assert ours <= {f"{module} {name}" for module in texts for name in texts}


def test_its_output_is_read_back_with_all_ties(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source = trained("llama_tied-z3-bf16-w3").checkpoint
    dsconv.to_dcp(source, tmp_path / "dcp", fsync=False)
    found = dsconv.open_checkpoint(tmp_path / "dcp")
    assert found.ties == {"lm_head.weight": "model.embed_tokens.weight"} or found.ties == {
        "model.embed_tokens.weight": "lm_head.weight"
    }
    assert dsconv.verify(source, tmp_path / "dcp").equal
    report = dsconv.merge(tmp_path / "dcp", tmp_path / "out", fsync=False)
    assert report.tensors == len(dsconv.open_checkpoint(source))
