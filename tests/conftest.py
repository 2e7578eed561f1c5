"""Fixtures of trained checkpoints. The first run trains them in 2 to 3 minutes and keeps them in tests/.cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import gloo
from tests.trained import Trained

pytest_plugins = ["tests.servers.fixtures"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Trained]:
    """Return ``trained(name)``: a checkpoint and its truth. The first use trains all missing cases at once."""
    folders = gloo.ensure("zero")
    return lambda name: Trained(folders[name] if name in folders else gloo.NATIVE_DATA / name)


@pytest.fixture
def copied(trained: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """Return ``copied(name)``, which copies a checkpoint and returns the save dir, for tests that damage it."""

    def copy(name: str) -> Path:
        source = trained(name).checkpoint
        return Path(shutil.copytree(source, tmp_path / "copied" / name / source.name))

    return copy
