"""Checkpoints of many ranks are opened and planned without making pieces, and merged with few open files."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import dsconv
from benchmarks import scale
from benchmarks.scale import make
from dsconv.checkpoint.formats.deepspeed import flat
from dsconv.convert.universal_plan import training_of


def test_opening_and_planning_make_no_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 ranks and 2,000 tensors have 100,000 pieces, each of which would be an object."""
    source = make(tmp_path, ranks=64, tensors=2_000, parameters=1_000_000_000_000)  # 4 TB, in holes
    monkeypatch.setattr(flat, "flat_pieces", None)
    report = dsconv.merge(source, tmp_path / "out", dry_run=True)
    assert report.parameters == pytest.approx(1e12, rel=0.01)
    assert sum(row["pieces"] for row in report.plan) == 2_000 * 64
    assert report.nbytes > 3.9e12
    with pytest.raises(dsconv.DsconvError, match=r"needs [\d,]+ bytes and the disk has [\d,]+ free"):
        dsconv.merge(source, tmp_path / "out")


def test_many_ranks_are_merged_with_few_open_files(tmp_path: Path) -> None:
    """There are 300 files of each kind, and every byte of the sources is checked, padding included."""
    source = make(tmp_path, ranks=300, tensors=40, parameters=300_000)
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    program = f"import dsconv; dsconv.merge({str(source)!r}, {str(out)!r}, workers=1, fsync=False, verify_output=True)"
    ran = subprocess.run([sys.executable, "-c", program], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    victim = next(source.rglob("*rank_299_*optim_states.pt"))
    entry = dsconv.open_checkpoint(source)["model.layers.0.input_layernorm.weight"]
    # The vector has fewer elements than there are ranks, so this rank holds only padding.
    assert len(entry.pieces) == entry.piece_count < 300
    with open(victim, "r+b") as file:
        last = dsconv.open_checkpoint(source)["model.layers.0.self_attn.q_proj.weight"].layout.ranks.records(299)[0]  # type: ignore[attr-defined]
        file.seek(last.offset_bytes + last.nbytes - 1)
        file.write(b"\1")
    with pytest.raises(dsconv.DsconvError, match=f"{victim.name}: record .* fails its CRC-32"):
        dsconv.merge(source, tmp_path / "again", fsync=False)


def test_a_parameter_without_elements_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter begins where the last sub-group ends, so it lies in none."""
    shapes = {"a": (3, 3), "b": (5,), "z": (0, 4)}
    monkeypatch.setattr(scale, "shapes_of", lambda tensors, parameters: shapes)
    checkpoint = dsconv.open_checkpoint(make(tmp_path, ranks=2, tensors=3, parameters=14))
    states = training_of(checkpoint).states
    assert {name: states[name]["exp_avg"].shape for name in states} == shapes
    assert [entry.piece_count for entry in checkpoint.values()] == [2, 2, 0]
    assert [len(states[name]["exp_avg"].pieces) for name in shapes] == [2, 2, 0]
