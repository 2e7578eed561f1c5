"""The contract between the training loop and an engine that takes steps, saves and loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass
class StepResult:
    """The result of one step on one rank.

    Attributes:
        loss: This rank's mean over its samples.
        grad_norm: The norm of the whole gradient before clipping.
        lr: The learning rate of the step.
        comm_seconds: Seconds in collectives, if the backend measures them.
    """

    loss: float
    grad_norm: float | None
    lr: float
    comm_seconds: float | None = None


class Backend(Protocol):
    """One rank's part of an engine. All ranks call each method together, in the same order."""

    dp_rank: int
    stream: int  # ranks of the same stream draw the same random numbers

    def step(self, rows: torch.Tensor) -> StepResult:
        """Take one optimizer step on this rank's samples, of shape [accumulation × micro_batch, seq_len]."""

    def save(self, folder: Path, tag: str) -> None:
        """Write ``folder``/``tag``."""

    def load(self, checkpoint: Path) -> None:
        """Restore what ``save`` wrote in this layout, or in another if the backend was made for that."""

    def local_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (name of the parameter in the transformers model, state, this rank's part without padding).

        States are ``weight`` (what the model computes with), ``fp32`` (the master) and the optimizer's, such as
        ``exp_avg``.
        """

    def logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return fp32 logits of whole rows without dropout, of shape [batch, seq_len, vocabulary].

        Returns None if the layout does not compute them.
        """

    def close(self) -> None:
        """Release the engine."""
