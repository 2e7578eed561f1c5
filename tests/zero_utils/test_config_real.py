"""DeepSpeed's and transformers' own word on configs; the scenes are in tests/fixtures/config_running.py, and one
launch runs them all.
"""

from __future__ import annotations

from pathlib import Path

from tests.fixtures import gloo
from tests.fixtures.config_running import CASES
from tests.fixtures.session import DONE


def test_configs_are_what_deepspeed_and_transformers_take(tmp_path: Path) -> None:
    gloo.check("config_running", CASES, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if (path / DONE).exists()} == set(CASES)
