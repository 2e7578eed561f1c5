"""Loads on 1 to 4 real ranks; the scenes are in tests/fixtures/loading.py, and one launch runs them all."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures import gloo
from tests.fixtures.loading import CASES
from tests.fixtures.session import DONE


def test_loads(tmp_path: Path) -> None:
    gloo.check("loading", CASES, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if (path / DONE).exists()} == set(CASES)
