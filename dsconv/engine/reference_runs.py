"""The runs that validation is made of: each is a launch of its own, and none is done twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsconv.engine import checkpoints, files
from dsconv.engine.launch import launch
from dsconv.engine.matrix import Row
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.worker import Job, read_metrics

DROPOUT = 0.1


class Leg:
    """A run's folder, with what its ranks left to compare."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.probe = folder / "probe"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.run)

    def curve(self, key: str) -> list[float]:
        return [line[key] for line in self.metrics]


class Legs:
    """Makes legs in ``folder``, of ``options`` with the layout, dtype and dropout of each; ``half``, an even step,
    is where they stop.
    """

    def __init__(self, folder: Path, options: RunOptions, half: int, began: Callable[[str], None]) -> None:
        self.folder, self.options, self.half, self.began = folder, options, half, began
        self._made: dict[str, Leg] = {}

    def whole(self, row: Row, layout: Layout, dropout: float) -> Leg:
        """Uninterrupted, with a checkpoint halfway."""
        return self._leg(
            f"whole {row.dtype} {_settings(row)}{layout.label()} dropout {dropout}",
            row,
            layout,
            dropout,
            self.options.steps,
        )

    def first_half(self, row: Row) -> Leg:
        """As ``whole`` with dropout, in a process that ends halfway."""
        return self._leg(f"half {row.name}", row, row.layout, DROPOUT, self.half)

    def second_half(self, row: Row, sabotage: str | None) -> Leg:
        """From the checkpoint of ``first_half``, in new processes."""
        first = self.first_half(row)
        leg = self._begin(f"resumed {row.name} {sabotage or ''}".strip())
        if leg is None:
            return self._made[f"resumed {row.name} {sabotage or ''}".strip()]
        shutil.copytree(first.run, leg.run, ignore=shutil.ignore_patterns("logs"))
        _break_files(leg.run, self.half, sabotage)
        self._resume(leg, row.layout, sabotage)
        return leg

    def elsewhere(self, row: Row, layout: Layout, sabotage: str | None) -> Leg:
        """The second half of ``whole`` without dropout, on ranks laid out otherwise."""
        name = f"elsewhere {row.name} {layout.label()} {sabotage or ''}".strip()
        source = self.whole(row, row.layout, 0.0)
        leg = self._begin(name)
        if leg is None:
            return self._made[name]
        shutil.copytree(
            source.run, leg.run, ignore=shutil.ignore_patterns("logs", checkpoints.tag_of(self.options.steps))
        )
        files.write_file(leg.run / checkpoints.FOLDER / checkpoints.LATEST, checkpoints.tag_of(self.half).encode())
        _break_files(leg.run, self.half, sabotage)
        self._resume(leg, layout, sabotage)
        return leg

    def loaded(self, row: Row, model: Path) -> Leg:
        """An engine in the row's layout that is given a converted model, and takes no step."""
        name = f"loaded {row.name}"
        leg = self._begin(name)
        if leg is None:
            return self._made[name]
        options = self._options(row, row.layout, 0.0, leg)
        _run(Job(replace(options, model=str(model)), 0, probe=leg.probe))
        return leg

    def _leg(self, name: str, row: Row, layout: Layout, dropout: float, last: int) -> Leg:
        leg = self._begin(name)
        if leg is None:
            return self._made[name]
        options = self._options(row, layout, dropout, leg)
        options.write()
        _run(Job(options, last, probe=leg.probe))
        return leg

    def _begin(self, name: str) -> Leg | None:
        if name in self._made:
            return None
        self.began(name)
        leg = self._made[name] = Leg(self.folder / name.replace(" ", "_").replace("×", "x"))
        shutil.rmtree(leg.folder, ignore_errors=True)
        leg.run.mkdir(parents=True)
        if not name.startswith(("half", "whole", "loaded")):
            leg.run.rmdir()  # a copy comes here
        return leg

    def _options(self, row: Row, layout: Layout, dropout: float, leg: Leg) -> RunOptions:
        changes: dict[str, Any] = {
            "output_dir": str(leg.run),
            "dtype": row.dtype,
            "dropout": dropout,
            "save_every": self.half // 2,
            "layout": layout,
        }
        return replace(self.options, **changes, **row.settings).relaid(layout)

    def _resume(self, leg: Leg, layout: Layout, sabotage: str | None) -> None:
        options = replace(RunOptions.read(leg.run), output_dir=str(leg.run))
        checkpoint = checkpoints.latest(leg.run)
        relaid = checkpoints.read_state(checkpoint).layout != layout
        options = options.relaid(layout)
        if layout.zero_stage == 0:
            options = replace(options, offload="none")
        _run(Job(options, options.steps, checkpoint, relaid, leg.probe, sabotage))


def _run(job: Job) -> None:
    """Raises KeyboardInterrupt where a signal ended it: then validation is to end."""
    if launch(job).interrupted:
        raise KeyboardInterrupt


def _settings(row: Row) -> str:
    return "".join(f"{key} {value} " for key, value in sorted(row.settings.items()))


def _break_files(run: Path, half: int, sabotage: str | None) -> None:
    """The sabotages that are of files."""
    checkpoint = checkpoints.latest(run)
    if sabotage == "stale-latest":
        files.write_file(run / checkpoints.FOLDER / checkpoints.LATEST, checkpoints.tag_of(half // 2).encode())
    elif sabotage == "swap-shards":  # without ZeRO, all that ranks keep for themselves are random generators
        for pattern in ("*optim_states.pt", "*.distcp", "rng-rank-*"):
            shards = sorted(checkpoint.glob(pattern))
            if len(shards) > 1:
                spare = checkpoint / "spare"
                shards[0].rename(spare)
                shards[1].rename(shards[0])
                spare.rename(shards[1])
                return
