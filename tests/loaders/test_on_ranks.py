"""Loads on 1 to 4 real ranks: one launch runs the checks of rank_checks.py and rank_checks_zero3.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fixtures import gloo
from tests.loaders.rank_checks import CASES, FOUR_RANKS
from tests.loaders.rank_checks_zero3 import async_io_is_built
from tests.trained import Trained


@pytest.fixture(scope="module")
def failures(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return how each check failed: the ranks' tracebacks, or nothing."""
    cases = {name: case for name, case in CASES.items() if not name.startswith("nvme") or async_io_is_built()}
    source = trained("llama_tied-z3-bf16-w4").checkpoint
    return gloo.outcomes(
        "tests.loaders.rank_checks", cases, tmp_path_factory.mktemp("loads"), {FOUR_RANKS: str(source)}
    )


@pytest.mark.parametrize("name", CASES)
def test_loads(name: str, failures: dict[str, str]) -> None:
    if name not in failures:
        pytest.skip(
            "DeepSpeed's async_io op is not built here, which takes minutes: install libaio-dev, then `make aio`"
        )
    assert not failures[name], failures[name]
