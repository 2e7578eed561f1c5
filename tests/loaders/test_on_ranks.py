"""Loads on 1 to 4 real ranks; the scenes are in tests/fixtures/loading.py and loading_zero3.py, and one launch runs
them all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fixtures import gloo
from tests.fixtures.loading import CASES, FOUR_RANKS
from tests.fixtures.loading_zero3 import async_io_is_built
from tests.fixtures.session import DONE
from tests.trained import Trained

NVME = {name for name in CASES if name.startswith("nvme")}


@pytest.fixture(scope="module")
def done(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("loads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOUR_RANKS, str(trained("llama_tied-z3-bf16-w4").checkpoint))
        gloo.check("loading", [name for name in CASES if name not in NVME or async_io_is_built()], folder)
    return {path.name for path in folder.iterdir() if (path / DONE).exists()}


def test_loads(done: set[str]) -> None:
    assert done >= set(CASES) - NVME


def test_loads_to_nvme(done: set[str]) -> None:
    if not async_io_is_built():
        pytest.skip(
            "DeepSpeed's async_io op is not built here, which takes minutes: install libaio-dev, then `make aio`"
        )
    assert done >= NVME
