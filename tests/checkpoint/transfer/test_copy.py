"""The copy: checksums in any order, blocks of any size, casts, views, and reads through the map."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dsconv
from dsconv.checkpoint.formats.deepspeed.flat import EqualShares, RankFlats, flat_pieces
from dsconv.checkpoint.map import dtypes
from dsconv.checkpoint.map.tensors import prove_tiling
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer import casting
from dsconv.checkpoint.transfer import copy as copying
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import InconsistentCheckpointError
from dsconv.zero_utils.partition import share_numel
from tests.trained import Trained, load_safetensors, same


@settings(derandomize=True, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    order=st.randoms(use_true_random=False),
)
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
    """Partition parameters as ZeRO-3 does, save each rank's flat data in sub-groups, and read them back through the
    map.
    """
    folder = tmp_path_factory.mktemp("z3")
    parameters = [torch.randn(numel) for numel in shapes]
    files = []
    for rank in range(world):
        shares = []
        for parameter in parameters:
            share = share_numel(parameter.numel(), world)
            padded = torch.cat([parameter, torch.zeros(share * world - parameter.numel())])
            shares.append(padded[rank * share : (rank + 1) * share])
        flat = torch.cat(shares)
        torch.save([t.clone() for t in flat.chunk(sub_groups)] if flat.numel() else [flat], folder / f"{rank}.pt")
        files.append(TorchFile(folder / f"{rank}.pt"))
    ranks = RankFlats(files, [file.root for file in files])
    position = 0
    for parameter in parameters:
        share = share_numel(parameter.numel(), world)
        layout = EqualShares(ranks, position, share, parameter.numel())
        position += share
        entry = dsconv.TensorEntry("w", dtypes.BY_NAME["float32"], (parameter.numel(),), layout)
        prove_tiling(entry)
        prove_piece_by_piece(entry)
        assert same(entry.read(), parameter)


def prove_piece_by_piece(entry: dsconv.TensorEntry) -> None:
    pieces = entry.layout()
    assert entry.piece_count == len(pieces)
    prove_tiling(dsconv.TensorEntry(entry.name, entry.dtype, entry.shape, lambda: pieces))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    alike=st.booleans(),
    begin=st.integers(-1, 8),
    share=st.integers(0, 8),
    numel=st.integers(0, 20),
)
def test_arithmetic_proofs_hold_for_each_piece(
    lengths: list[list[int]], alike: bool, begin: int, share: int, numel: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For shares that follow from the numbers, whether they fit the files or not, the proof without pieces holds for
    the pieces.
    """
    folder = tmp_path_factory.mktemp("shares")
    files = []
    for rank, of_rank in enumerate([lengths[0]] * len(lengths) if alike else lengths):
        torch.save([torch.zeros(n) for n in of_rank], folder / f"{rank}.pt")
        files.append(TorchFile(folder / f"{rank}.pt"))
    ranks = RankFlats(files, [file.root for file in files])
    entry = dsconv.TensorEntry("w", dtypes.BY_NAME["float32"], (numel,), EqualShares(ranks, begin, share, numel))
    fits = begin >= 0 and begin + min(share, numel) <= min(ranks.totals) and numel <= share * len(files)
    if fits:
        prove_tiling(entry)
        prove_piece_by_piece(entry)
    else:
        with pytest.raises(InconsistentCheckpointError):
            prove_tiling(entry)


def test_flat_tensors_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    torch.save([torch.arange(8.0)], tmp_path / "sound.pt")
    torch.save([torch.arange(16.0)[::2]], tmp_path / "strided.pt")
    torch.save([torch.arange(8)], tmp_path / "integers.pt")
    files = {path.stem: TorchFile(path) for path in tmp_path.iterdir()}
    parts = {name: file.root for name, file in files.items()}
    longer = replace(parts["sound"][0], shape=(9,))
    for name, wanted, error in (
        ("strided", parts["strided"], "no single run of its storage"),
        ("integers", parts["integers"], "holds int64 masters"),
        ("sound", [longer], "reaches byte 36"),
    ):
        with pytest.raises(dsconv.DsconvError, match=error):
            RankFlats([files["sound"], files[name]], [parts["sound"], wanted])


@settings(derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6), data=st.data())
def test_stage_2_pieces_cross_ranks(
    lengths: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("z2")
    flat = torch.randn(sum(lengths))
    files, starts = [], [0]
    for rank, part in enumerate(flat.split(lengths)):
        torch.save(part.clone(), folder / f"{rank}.pt")
        files.append(TorchFile(folder / f"{rank}.pt"))
        starts.append(starts[-1] + len(part))
    begin = data.draw(st.integers(0, len(flat)))
    numel = data.draw(st.integers(0, len(flat) - begin))
    pieces = flat_pieces(files, [file.root for file in files], starts, begin, numel)
    entry = dsconv.TensorEntry("w", dtypes.BY_NAME["float32"], (numel,), lambda: pieces)
    prove_tiling(entry)
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
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), wanted=st.sampled_from(["float16", "bfloat16"])
)
def test_casts_of_any_bits_equal_torch(bits: list[int], wanted: str) -> None:
    values = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    expected = values.to(getattr(torch, wanted))
    data = memoryview(bytearray(values.view(torch.uint8).numpy().tobytes()))
    out, overflowed = casting.Caster().cast(data, dtypes.BY_NAME["float32"], dtypes.BY_NAME[wanted])
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
    """Stage 0 saves the module's own tensors, where a transposed weight is a strided view."""
    base = torch.randn(4, 6)
    module = {"t": base.t(), "part": base[1:3, 2:5], "step": base[::2], "same": base.t()}
    state: dict[str, object] = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "global_steps": 1,
        "param_shapes": None,
    }
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


def test_model_states_without_checksums_give_a_warning(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied("llama_tied-z2-bf16-w3")
    path = next(save_dir.rglob("mp_rank_00_model_states.pt"))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(path, weights_only=False), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert "saved without checksums" in dsconv.merge(save_dir, tmp_path / "out", fsync=False).warnings[0]


def test_opening_needs_megabytes_for_a_huge_checkpoint(tmp_path: Path) -> None:
    """A sparse file of 40 GB is opened and planned in little memory, because only its header is read."""
    import json
    import resource
    import subprocess
    import sys

    header: dict[str, object] = {}
    offset = 0
    for layer in range(40):
        header[f"layers.{layer}.weight"] = {
            "dtype": "BF16",
            "shape": [1 << 19, 1 << 10],
            "data_offsets": [offset, offset + (1 << 30)],
        }
        offset += 1 << 30
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    program = (
        f"import dsconv; r = dsconv.merge({str(tmp_path)!r}, {str(tmp_path / 'out')!r}, dry_run=True); print(r.nbytes)"
    )
    limit = 400 << 20

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=bound, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > offset
