"""Follow docs/adding-a-destination.md to the letter: its toy destination writes a whole output or none."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsconv.convert.writing import WriteOptions
from dsconv.errors import OutputError, UnsupportedError
from tests.trained import Trained, raw

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-destination.md"
QUICK = WriteOptions(fsync=False)


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module that the guide shows."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "numpy_output.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(importlib.import_module("sys").modules, "numpy_output", raising=False)
    return importlib.import_module("numpy_output")


def test_numpy_reads_what_the_toy_destination_wrote(
    guide: Any, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    made = trained("odd-z3-fp32-w2")
    written = guide.to_numpy(made.checkpoint, tmp_path / "out", QUICK)
    names = json.loads((tmp_path / "out" / "arrays.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "arrays.json"])
    arrays = {name.removesuffix(".npy"): np.load(tmp_path / "out" / name) for name in names}
    assert set(arrays) <= set(made.truth)
    assert {alias for name in arrays for alias in made.names(name)} == set(made.truth)
    for name, array in arrays.items():
        assert (array.shape, array.tobytes()) == (tuple(made.truth[name].shape), raw(made.truth[name])), name
    assert written.bytes_read > 0


def test_an_older_output_is_refused_and_replaced_with_force(guide: Any, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, tmp_path / "hf" / "model.safetensors")
    guide.to_numpy(tmp_path / "hf", tmp_path / "out", QUICK)
    with pytest.raises(OutputError, match=r"--force"):
        guide.to_numpy(tmp_path / "hf", tmp_path / "out", QUICK)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    save_file({"c": torch.arange(4)}, tmp_path / "hf" / "model.safetensors")
    guide.to_numpy(tmp_path / "hf", tmp_path / "out", WriteOptions(fsync=False, force=True))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c.npy", "arrays.json", "mine.txt"}


def test_what_numpy_lacks_is_refused_before_anything_is_written(guide: Any, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UnsupportedError, match="NumPy has no bfloat16"):
        guide.to_numpy(tmp_path / "hf", tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_a_store_is_written_to_as_well(guide: Any, tmp_path: Path, memory: Any) -> None:
    from dsconv.checkpoint.storage.roots import as_path

    (tmp_path / "hf").mkdir()
    tensors = {"a": torch.arange(300.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    guide.to_numpy(tmp_path / "hf", as_path("memory://shelf/out"), WriteOptions())
    assert sorted(path.rpartition("/")[2] for path in memory.ls("/shelf/out", detail=False)) == [
        "a.npy",
        "arrays.json",
        "b.npy",
    ]
    data = memory.cat("/shelf/out/a.npy")
    assert data.endswith(raw(tensors["a"]))
