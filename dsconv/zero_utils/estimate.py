"""Estimate all settings of a job side by side, and find the cheapest that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dsconv.zero_utils.memory import (
    Held,
    Job,
    ModelSizes,
    Setting,
    checkpoint_bytes,
    deepspeed_figure,
    held,
    ideal_bytes,
    settings,
)


@dataclass(frozen=True)
class Row:
    """One setting, in bytes of a rank. ``deepspeed`` is (a GPU, a node's CPU); ``disk`` is a checkpoint of all
    ranks.
    """

    setting: Setting
    held: Held
    ideal: int
    deepspeed: tuple[int, int] | None
    disk: int


@dataclass(frozen=True)
class Report:
    """An estimate. ``rows`` begin with the cheapest setting; ``fit`` is the first whose peak is at most ``limit``."""

    model: ModelSizes
    job: Job
    rows: list[Row]
    limit: int | None
    fit: Row | None

    @property
    def smallest(self) -> Row:
        """The row with the smallest peak."""
        return min(self.rows, key=lambda row: row.held.peak)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON, in bytes."""
        model = {
            "name": self.model.name,
            "parameters": self.model.numel,
            "largest_layer_parameters": self.model.largest_layer_numel,
        }
        decoder = asdict(self.model.decoder) if self.model.decoder else None
        job = {**asdict(self.job), "world": self.job.world}
        fit = self.fit and {**self._row(self.fit), "left": (self.limit or 0) - self.fit.held.peak}
        return {
            "model": {**model, "decoder": decoder},
            "job": job,
            "settings": list(map(self._row, self.rows)),
            "limit": self.limit,
            "fit": fit,
        }

    def _row(self, row: Row) -> dict[str, Any]:
        nproc = self.job.nproc
        gpu = {
            name: getattr(row.held, name)
            for name in ("parameters", "gradients", "optimizer", "buffers", "activations", "step", "peak")
        }
        return {
            **asdict(row.setting),
            "gpu": gpu if self.model.decoder else {**gpu, "activations": None},
            "cpu": row.held.cpu,
            "cpu_per_node": row.held.cpu * nproc,
            "nvme_per_node": row.held.nvme * nproc,
            "ideal_model_states": row.ideal,
            "deepspeed_estimator": row.deepspeed and {"gpu": row.deepspeed[0], "cpu_per_node": row.deepspeed[1]},
            "checkpoint": row.disk,
        }


def estimate(model: ModelSizes, job: Job, tps: tuple[int, ...] = (1,), limit: int | None = None) -> Report:
    """Return every setting of a job.

    Args:
        model: The sizes of the model.
        job: The hardware and the batch.
        tps: Tensor-parallel degrees, which divide the ranks.
        limit: Bytes of a GPU, for ``fit``.
    """
    rows = [
        Row(
            each,
            held(model, job, each),
            ideal_bytes(model, job, each),
            deepspeed_figure(model, job, each),
            checkpoint_bytes(model, job, each),
        )
        for each in settings(job, tps)
    ]
    fit = next((row for row in rows if limit is not None and row.held.peak <= limit), None)
    return Report(model, job, rows, limit, fit)
