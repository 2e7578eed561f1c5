"""How tensor-parallel shards are joined where the trainer saved no rules (DeepSpeed before 0.18.5 and AutoTP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsconv.checkpoint.formats.joining import Join, Shape
from dsconv.errors import UnsupportedError


class PlanRules:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, folders: Sequence[Path], path: Path) -> PlanRules:
        return cls(path)

    def join(self, name: str, shapes: Sequence[Shape]) -> Join:
        raise UnsupportedError(f"{self.path}: no universal_checkpoint_info for {name}")
