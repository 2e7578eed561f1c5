"""Checkpoints of DeepSpeed 0.9 to 0.18, kept in tests/data, are merged bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsconv
from tests.fixtures.gloo import DATA
from tests.trained import Trained, load_safetensors

OLD = DATA / "old_releases"
FOLDERS = sorted(path.parent for path in OLD.glob("*/*/truth.json"))


def test_all_releases_are_there() -> None:
    assert {folder.parent.name for folder in FOLDERS} == {"0.9.5", "0.10.3", "0.12.6", "0.14.5", "0.16.9", "0.18.9"}
    assert len(FOLDERS) == 40


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_merge_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    made = Trained(folder)
    report = dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False, verify_output=True)
    made.check(load_safetensors(tmp_path / "out"))
    assert not report.warnings
    checkpoint = dsconv.open_checkpoint(made.checkpoint)
    version = checkpoint.info["deepspeed_version"]
    assert version.split("+")[0] == made.facts["deepspeed"]
