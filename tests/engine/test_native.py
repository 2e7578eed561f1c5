"""The native backend on real ranks; the scenes are in tests/fixtures/native_runs.py, and one launch runs them all."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures import gloo
from tests.fixtures.native_runs import CASES
from tests.fixtures.session import DONE


def test_native_runs(tmp_path: Path) -> None:
    gloo.check("native_runs", CASES, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if (path / DONE).exists()} == set(CASES)
