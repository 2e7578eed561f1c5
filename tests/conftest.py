"""The trained checkpoints, made once a session (2 to 3 minutes the first time, then kept in tests/.cache)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import gloo
from tests.trained import Trained

pytest_plugins = ["tests.servers.fixtures"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Trained]:
    """``trained(name)``: a checkpoint and its truth. The first use trains whatever is not there yet, all cases at
    once.
    """
    folders = gloo.ensure("zero")
    return lambda name: Trained(folders[name] if name in folders else gloo.NATIVE_DATA / name)


@pytest.fixture
def copied(trained: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """``copied(name)``: the save dir of a fresh copy of a checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        source = trained(name).checkpoint
        return Path(shutil.copytree(source, tmp_path / "copied" / name / source.name))

    return copy
