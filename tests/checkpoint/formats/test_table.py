"""The table of formats: exactly one format recognises each trained checkpoint, and the order decides only where the
table says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dsconv
from dsconv.checkpoint.formats.table import FORMATS, Row
from dsconv.checkpoint.storage.roots import PathRoot
from dsconv.errors import CheckpointNotFoundError
from tests.fixtures import gloo
from tests.fixtures.cases import ALL
from tests.trained import Trained

ORDER = [row.name for row in FORMATS]
MAKERS = ("autotp", "dcp", "moe", "pipeline", "rankfiles", "universal", "universal_mp")


def named_by_users(maker: str, folder: Path) -> dict[Path, str]:
    """Return the format of each path that a maker wrote into the folder of a case."""
    if maker == "rankfiles":  # one case holds only where torch places the shards, and no checkpoint
        return {files.parent: "rank files" for files in folder.rglob("*rank*0.*") if files.suffix in (".pt", ".bin")}
    checkpoint = next(iter(sorted((folder / "ckpt").glob("checkpoint-*"))), folder / "ckpt")
    if maker == "dcp":
        return {checkpoint: "DCP in safetensors" if folder.name.startswith("hf") else "DCP"}
    found = {checkpoint: "DeepSpeed"}
    if (folder / "official" / "latest_universal").is_file():  # DeepSpeed's converter fails for some
        found[folder / "official"] = "DeepSpeed universal"
    return found


def recognised(path: Path, tag: str | None = None) -> list[str]:
    """Return the formats that recognise a path, in the order of the table. A format that raises an error claims the
    path.
    """

    def claims(row: Row) -> bool:
        try:
            return row.load().detect(PathRoot(path), tag)
        except CheckpointNotFoundError:
            return True

    return [row.name for row in FORMATS if claims(row)]


def check(path: Path, expected: str) -> None:
    first, *others = recognised(path)
    assert first == expected, path
    stated = next(row.before for row in FORMATS if row.name == first)
    assert set(others) <= set(stated), f"{path}: {others} recognise it too, and the table does not say so"


@pytest.mark.parametrize("maker", MAKERS)
def test_each_trained_checkpoint_is_of_one_format(maker: str) -> None:
    paths = {
        path: kind for folder in gloo.ensure(maker).values() for path, kind in named_by_users(maker, folder).items()
    }
    assert len(paths) > 2
    for path, expected in paths.items():
        check(path, expected)


def test_each_zero_checkpoint_is_of_one_format(trained: Callable[[str], Trained]) -> None:
    for case in ALL:
        check(trained(case.name).checkpoint, "DeepSpeed")


def test_models_of_transformers_are_of_one_format(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    dsconv.merge(trained(ALL[0].name).checkpoint, tmp_path / "model", fsync=False)
    check(tmp_path / "model", "safetensors")
    check(tmp_path / "model" / "model.safetensors", "safetensors")
    (tmp_path / "bin").mkdir()
    for name in ("pytorch_model.bin", "any.pt", "any.pth", "any.ckpt"):
        torch.save({"w": torch.ones(2)}, tmp_path / "bin" / name)
        check(tmp_path / "bin" / name, "state dict of torch.save")
    check(tmp_path / "bin", "state dict of torch.save")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "bin")
    assert recognised(tmp_path / "bin") == ["safetensors", "state dict of torch.save"]


def test_the_table_speaks_of_formats_below_and_of_a_tag() -> None:
    for row in FORMATS:
        assert row.place.endswith(".")
        assert all(ORDER.index(other) > ORDER.index(row.name) for other in row.before)
    titan = gloo.ensure("dcp")["titan-w3"] / "ckpt"
    assert recognised(titan, "step-10") == ["DCP", "DeepSpeed"]  # DeepSpeed would raise an error
