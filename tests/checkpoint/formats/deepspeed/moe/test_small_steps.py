"""MoE without ZeRO in bf16 at real learning rates: equal weights have masters that differ, and none goes astray."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsconv
from tests.fixtures import gloo
from tests.fixtures.moe_realistic import CASES
from tests.trained import Trained, load_safetensors, same


@pytest.mark.parametrize("name", CASES)
def test_each_master_goes_to_its_own_weight(name: str, tmp_path: Path) -> None:
    made = Trained(gloo.ensure("moe_realistic")[name])
    low = load_safetensors(made.folder / "truth_module.safetensors")
    norms = [key for key in low if "layernorm" in key]
    assert all(same(low[norms[0]], low[key]) for key in norms), "values should not tell the norms apart"
    report = dsconv.merge(made.checkpoint, tmp_path / "out", fsync=False)
    found = load_safetensors(tmp_path / "out")
    for alias in made.tied:
        found.pop(alias, None)
    assert found.keys() == made.truth.keys() - made.tied.keys()
    wrong = [key for key in found if not same(found[key], made.truth[key])]
    assert not wrong
    assert not report.warnings
