"""What a backend is to the loop: an engine that takes steps, saves and loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass
class StepResult:
    """Of one step on one rank. ``loss`` is this rank's mean over its samples, ``grad_norm`` global, before clipping.

    ``comm_seconds``: in collectives, where the backend measures that.
    """

    loss: float
    grad_norm: float | None
    lr: float
    comm_seconds: float | None = None


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

    def local_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(parameter's name in the transformers model, state, this rank's part of it without padding).

        States are ``weight`` (what the model computes with), ``fp32`` (the master) and the optimizer's, such as
        ``exp_avg``.
        """

    def logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Of whole rows, [batch, seq_len, vocabulary], fp32, without dropout; None where the layout computes none."""

    def close(self) -> None:
        """End the engine."""
