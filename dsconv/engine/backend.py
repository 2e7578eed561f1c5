"""What a backend is to the loop: an engine that takes steps, saves and loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass
class StepResult:
    """Of one step on one rank. ``loss`` is this rank's mean over its samples, ``grad_norm`` global, before clipping."""

    loss: float
    grad_norm: float | None
    lr: float


class Backend(Protocol):
    """One rank's part of an engine. All ranks call each method together."""

    dp_rank: int
    stream: int  # ranks with the same one draw the same random numbers

    def step(self, rows: torch.Tensor) -> StepResult:
        """One optimizer step on this data-parallel rank's samples, [accumulation × micro_batch, seq_len]."""

    def save(self, folder: Path, tag: str) -> None:
        """Write ``folder``/``tag``."""

    def load(self, checkpoint: Path) -> None:
        """Go on from what ``save`` wrote in the same layout; or, where the backend was made for it, in another."""

    def masters(self) -> dict[str, Any]:
        """Every parameter in full at the optimizer's precision, by its name in the transformers model; the same on every rank."""

    def close(self) -> None:
        """End the engine."""
