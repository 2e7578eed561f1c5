"""Follow docs/adding-a-format.md to the letter: its toy format opens, merges and refuses like any other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsconv
from dsconv.checkpoint.formats import table
from dsconv.errors import CheckpointNotFoundError, MalformedError, UnsupportedError
from tests.trained import load_safetensors, same

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "adding-a-format.md"
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "model.embed.weight": np.arange(35, dtype=np.float32).reshape(7, 5),
    "half": np.linspace(-1, 1, 9, dtype=np.float16),
    "step": np.array(7),
    "mask": np.array([[True, False]]),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of arrays, and put the guide's module into the table."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "npy_folder.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    row = table.Row("NumPy arrays", "npy_folder", "No other format goes by .npy.")
    monkeypatch.setattr(table, "FORMATS", (*table.FORMATS, row))
    (tmp_path / "arrays").mkdir()
    for name, array in ARRAYS.items():
        np.save(tmp_path / "arrays" / f"{name}.npy", array)
    return tmp_path / "arrays"


def test_the_toy_format_reads_what_numpy_wrote(folder: Path, tmp_path: Path) -> None:
    opened = dsconv.open_checkpoint(folder)
    assert (opened.format, set(opened)) == ("NumPy arrays", set(ARRAYS))
    for name, array in ARRAYS.items():
        assert same(opened[name].read(), torch.from_numpy(array)), name
    assert same(opened["model.embed.weight"].read(slice(2, 4)), torch.from_numpy(ARRAYS["model.embed.weight"][2:4]))
    dsconv.merge(folder, tmp_path / "out", fsync=False)
    merged = load_safetensors(tmp_path / "out")
    assert set(merged) == set(ARRAYS)
    assert all(same(merged[name], torch.from_numpy(array)) for name, array in ARRAYS.items())
    assert dsconv.verify(folder, tmp_path / "out").equal


def test_the_toy_format_refuses_what_it_does_not_read(folder: Path, tmp_path: Path) -> None:
    path = folder / "half.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(MalformedError, match=r"half\.npy: float16 of shape \(9,\) does not take 17 bytes"):
        dsconv.open_checkpoint(folder)
    path.write_bytes(b"\x93NUMPZ" + whole[6:])
    with pytest.raises(MalformedError, match=r"half\.npy: not a \.npy file"):
        dsconv.open_checkpoint(folder)
    np.save(path, np.ones(2, dtype=np.complex64))
    with pytest.raises(UnsupportedError, match=r"half\.npy: an array of dtype b'<c8'"):
        dsconv.open_checkpoint(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="a folder that holds none: expected a DeepSpeed checkpoint"):
        dsconv.open_checkpoint(tmp_path / "nothing")
