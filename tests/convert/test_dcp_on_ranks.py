"""Ranks in every layout load the output of ``to-dcp`` with torch's own reader, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.convert import dcp_layout
from tests.fixtures import dcp_reading, gloo, rankfiles, ranks
from tests.trained import load_safetensors, same


@pytest.fixture(scope="module")
def read_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Return the outputs, and for each case of ``dcp_reading`` the folder of what its ranks loaded, in one launch."""
    home = tmp_path_factory.mktemp("read_by_ranks")
    torch.manual_seed(3)
    truth = rankfiles.truth_of(rankfiles.net())
    (home / "hf").mkdir()
    save_file(truth, home / "hf" / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_layout, "CHUNK_BYTES", 64)
        report = dsconv.to_dcp(home / "hf", home / "plain", fsync=False)
        assert len(report.files) == 2
        options: dict[str, Any] = {"prefix": "model.", "max_shard_size": 3000}
        dsconv.to_dcp(home / "hf", home / "under_model" / "pytorch_model_fsdp_0", fsync=False, **options)
    for path in (home / "under_model" / "pytorch_model_fsdp_0").iterdir():  # accelerate takes the parent folder
        (home / "under_model" / path.name).hardlink_to(path)
    cases = {name: ranks.Case(world, home) for name, world in dcp_reading.WORLDS.items()}
    return truth, gloo.run("dcp_reading", cases, home / "read")


@pytest.mark.parametrize("name", dcp_reading.WORLDS)
def test_ranks_load_it(name: str, read_by_ranks: tuple[dict[str, torch.Tensor], dict[str, Path]]) -> None:
    """1, 2 and 4 gloo ranks load it, sharded in every way, and so does accelerate's own loader, which keeps the model
    under the key ``model``.
    """
    truth, folders = read_by_ranks
    world = dcp_reading.WORLDS[name]
    kinds = ("loaded",) if name.startswith("accelerate") else ("loaded", "nested")
    files = {f"{kind}-{rank}.safetensors" for kind in kinds for rank in range(world)}
    assert {path.name for path in folders[name].glob("*.safetensors")} == files
    for file in files:
        found = load_safetensors(folders[name] / file)
        assert set(found) == set(truth), file
        for key, tensor in truth.items():
            assert same(found[key], tensor), (file, key)
