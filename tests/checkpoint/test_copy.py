"""The copy: checksums in any order, blocks of any cut, casts, views, and reads through the map."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dsconv
from dsconv.checkpoint import copy as copying
from dsconv.checkpoint import dtypes
from dsconv.checkpoint.checksums import RunningChecksum
from dsconv.checkpoint.formats.zero import _equal_shares, _flat_pieces
from dsconv.checkpoint.loading import load_tensors
from dsconv.checkpoint.torch_file import TorchFile
from dsconv.zero_utils.partition import share_numel
from tests.trained import Trained, load_safetensors, same


@settings(derandomize=True, deadline=None)
@given(data=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=12), order=st.randoms(use_true_random=False))
def test_a_checksum_of_blocks_in_any_order(data: bytes, cuts: list[int], order: object) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    spans = list(pairwise(edges))
    order.shuffle(spans)  # type: ignore[attr-defined]
    running = RunningChecksum(len(data))
    for start, end in spans:
        assert not running.complete
        running.add(start, end - start, zlib.crc32(data[start:end]))
    assert running.complete
    assert running.value == zlib.crc32(data)


@settings(derandomize=True, deadline=None)
@given(
    world=st.integers(1, 9),
    shapes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    sub_groups=st.integers(1, 4),
)
def test_stage_3_pieces_are_what_partitioning_does(
    world: int, shapes: list[int], sub_groups: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut parameters as ZeRO-3 does, save each rank's flat data in sub-groups, and read the parameters back through the map."""
    folder = tmp_path_factory.mktemp("z3")
    parameters = [torch.randn(numel) for numel in shapes]
    files, flats = [], []
    for rank in range(world):
        shares = []
        for parameter in parameters:
            share = share_numel(parameter.numel(), world)
            padded = torch.cat([parameter, torch.zeros(share * world - parameter.numel())])
            shares.append(padded[rank * share : (rank + 1) * share])
        flat = torch.cat(shares)
        torch.save([t.clone() for t in flat.chunk(sub_groups)] if flat.numel() else [flat], folder / f"{rank}.pt")
        file = TorchFile(folder / f"{rank}.pt")
        starts = [0]
        for group in file.root:
            starts.append(starts[-1] + group.numel)
        files.append(file)
        flats.append((file.root, starts))
    position = 0
    for parameter in parameters:
        share = share_numel(parameter.numel(), world)
        pieces = _equal_shares(files, flats, position, share, parameter.numel())
        position += share
        entry = dsconv.TensorEntry("w", dtypes.BY_NAME["float32"], (parameter.numel(),), lambda pieces=pieces: pieces)  # type: ignore[misc]
        dsconv.checkpoint.tensormap.prove_tiling(entry)
        assert same(entry.read(), parameter)


@settings(derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6), data=st.data())
def test_stage_2_pieces_cross_ranks(lengths: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("z2")
    flat = torch.randn(sum(lengths))
    files, starts = [], [0]
    for rank, part in enumerate(flat.split(lengths)):
        torch.save(part.clone(), folder / f"{rank}.pt")
        files.append(TorchFile(folder / f"{rank}.pt"))
        starts.append(starts[-1] + len(part))
    begin = data.draw(st.integers(0, len(flat)))
    numel = data.draw(st.integers(0, len(flat) - begin))
    pieces = _flat_pieces(files, [file.root for file in files], starts, begin, numel)
    entry = dsconv.TensorEntry("w", dtypes.BY_NAME["float32"], (numel,), lambda: pieces)
    dsconv.checkpoint.tensormap.prove_tiling(entry)
    assert same(entry.read(), flat[begin : begin + numel])


@pytest.mark.parametrize("block", [8, 24, 104, 4096])
def test_blocks_of_any_size_give_the_same_bytes(
    block: int, trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "BLOCK_BYTES", block)
    for case in ("odd-z3-bf16-w4", "odd-z1-bf16-w2-aligned", "llama_groups-z2-bf16-w3"):
        made = trained(case)
        dsconv.merge(made.checkpoint, tmp_path / case, fsync=False, workers=3)
        made.check(load_safetensors(tmp_path / case))
        dsconv.merge(made.checkpoint, tmp_path / f"{case}-16", fsync=False, workers=3, dtype="bf16")
        made.check(load_safetensors(tmp_path / f"{case}-16"), torch.bfloat16)


@settings(derandomize=True, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), wanted=st.sampled_from(["float16", "bfloat16"]))
def test_casts_of_any_bits_equal_torch(bits: list[int], wanted: str) -> None:
    values = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    expected = values.to(getattr(torch, wanted))
    data = memoryview(bytearray(values.view(torch.uint8).numpy().tobytes()))
    out, overflowed = copying.Caster().cast(data, dtypes.BY_NAME["float32"], dtypes.BY_NAME[wanted])
    assert bytes(out) == expected.view(torch.uint8).numpy().tobytes()
    assert overflowed == int((expected.isinf() & values.isfinite()).sum())


def test_reading_parts(tmp_path: Path) -> None:
    tensor = torch.arange(2 * 5 * 3).reshape(5, 2, 3)
    save_file({"w": tensor, "scalar": torch.tensor(4.5), "none": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    entry = dsconv.open_checkpoint(tmp_path)["w"]
    for index in (
        slice(None),
        slice(1, 3),
        slice(-2, None),
        slice(4, 1),
        slice(0, 5, 2),
        3,
        -1,
        (slice(1, 4), 1),
        (2, slice(None), 0),
        ...,
        None,
    ):
        assert same(entry.read(index), tensor if index is None else tensor[index]), index
    with pytest.raises(IndexError, match="row 5 is out of range"):
        entry.read(5)
    checkpoint = dsconv.open_checkpoint(tmp_path)
    assert same(checkpoint["scalar"].read(), torch.tensor(4.5))
    assert same(checkpoint["none"].read(), torch.empty(0, 3))
    with pytest.raises(KeyError):
        checkpoint["missing"]


def test_a_view_that_was_saved_without_its_gaps_closed(tmp_path: Path) -> None:
    """Stage 0 saves what the module holds: a transposed weight is a view with strides."""
    base = torch.randn(4, 6)
    module = {"t": base.t(), "part": base[1:3, 2:5], "step": base[::2], "same": base.t()}
    state: dict[str, object] = {"module": module, "buffer_names": [], "optimizer": None, "global_steps": 1, "param_shapes": None}
    (tmp_path / "global_step1").mkdir()
    torch.save(state, tmp_path / "global_step1" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step1")
    dsconv.merge(tmp_path, tmp_path / "out", fsync=False, verify_output=True)
    merged = load_safetensors(tmp_path / "out")
    assert dsconv.open_checkpoint(tmp_path).ties == {"same": "t"}
    for name in ("t", "part", "step"):
        assert same(merged[name], module[name].contiguous()), name


def test_load_tensors_checks_what_it_reads(copied: Callable[[str], Path]) -> None:
    save_dir = copied("llama_tied-z3-bf16-w3")
    checkpoint = dsconv.open_checkpoint(save_dir)
    extent = checkpoint["model.norm.weight"].pieces[0].extent
    data = bytearray(extent.record.path.read_bytes())
    data[extent.offset_bytes] ^= 1
    extent.record.path.write_bytes(bytes(data))
    with pytest.raises(dsconv.DsconvError, match="CRC-32"):
        load_tensors(checkpoint.values())


def test_files_saved_without_checksums_load_with_a_warning(
    copied: Callable[[str], Path], trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    for case in ("llama_frozen-z3-bf16-w3", "llama_tied-z2-bf16-w3", "odd-z0-bf16-w2"):
        save_dir = copied(case)
        torch.serialization.set_crc32_options(False)
        try:
            for path in save_dir.rglob("*.pt"):
                torch.save(torch.load(path, weights_only=False), path)
        finally:
            torch.serialization.set_crc32_options(True)
        report = dsconv.merge(save_dir, tmp_path / case, fsync=False)
        assert len(report.warnings) == 1
        assert "saved without checksums" in report.warnings[0]
        trained(case).check(load_safetensors(tmp_path / case))


def test_a_tag_whose_model_states_alone_have_no_checksums_is_told(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied("llama_tied-z2-bf16-w3")
    path = next(save_dir.rglob("mp_rank_00_model_states.pt"))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(path, weights_only=False), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert "saved without checksums" in dsconv.merge(save_dir, tmp_path / "out", fsync=False).warnings[0]


def test_opening_needs_megabytes_for_a_huge_checkpoint(tmp_path: Path) -> None:
    """A sparse file of 40 GB opens and plans in little memory: only its header is read."""
    import json
    import resource
    import subprocess
    import sys

    header: dict[str, object] = {}
    offset = 0
    for layer in range(40):
        header[f"layers.{layer}.weight"] = {"dtype": "BF16", "shape": [1 << 19, 1 << 10], "data_offsets": [offset, offset + (1 << 30)]}
        offset += 1 << 30
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    program = f"import dsconv; r = dsconv.merge({str(tmp_path)!r}, {str(tmp_path / 'out')!r}, dry_run=True); print(r.nbytes)"
    limit = 400 << 20

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=bound, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > offset
