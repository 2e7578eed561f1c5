"""Read a trained checkpoint and the truth beside it, and compare raw bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def load_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, or of a folder of them, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in found, f"{name} is stored twice"
                found[name] = file.get_tensor(name)
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


class Trained:
    """``checkpoint`` is the saved checkpoint; ``truth`` holds the tensors that a merge must give, under all of their
    names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "truth.json").read_text())

    @property
    def checkpoint(self) -> Path:
        """Return the folder that a user would name: the save dir, or the Trainer's ``checkpoint-N``."""
        base = self.folder / "ckpt" if (self.folder / "ckpt").is_dir() else self.folder
        return next(iter(sorted(base.glob("checkpoint-*"))), base)

    @functools.cached_property
    def truth(self) -> dict[str, torch.Tensor]:
        return load_safetensors(self.folder / "truth.safetensors")

    @property
    def tied(self) -> dict[str, str]:
        """Return the first name of each tied parameter, by its other names."""
        tied: dict[str, str] = self.facts["tied"]
        return tied

    def names(self, name: str) -> set[str]:
        """Return all names of the parameter called ``name``."""
        first = self.tied.get(name, name)
        return {first, *(alias for alias, owner in self.tied.items() if owner == first)}

    def check(self, merged: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        """Assert that ``merged`` holds each tensor of the truth under one of its names, bit for bit (cast to
        ``dtype``), and no other tensor.
        """
        left = set(self.truth)
        for name, tensor in merged.items():
            assert name in left, f"{name} is not in the model, or is stored under two names"
            left -= self.names(name)
            expected = self.truth[name]
            if dtype is not None and expected.is_floating_point():
                expected = expected.to(dtype)
            assert same(tensor, expected), (
                f"{name}: {tensor.dtype} {list(tensor.shape)}, expected {expected.dtype} {list(expected.shape)}"
            )
        assert not left, f"missing: {sorted(left)}"
