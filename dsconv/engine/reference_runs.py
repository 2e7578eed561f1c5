"""The training runs that validation compares. Each is a separate launch, and none is made twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsconv.engine import checkpoints, files
from dsconv.engine.launch import launch
from dsconv.engine.matrix import Scenario
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.worker import Job, read_metrics

DROPOUT = 0.1


class Run:
    """A run's folder, and the digests that its ranks left for comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = folder / "run"
        self.digests = folder / "digests"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics.jsonl."""
        return read_metrics(self.run_folder)

    def curve(self, key: str) -> list[float]:
        """One metric over the steps."""
        return [line[key] for line in self.metrics]


class ReferenceRuns:
    """Make runs in ``folder`` from ``options``, each with its own layout, dtype and dropout.

    Args:
        folder: The folder that holds all runs.
        options: What the runs have in common.
        half: The step, an even one, at which interrupted runs stop.
        began: Called with the name of each run that starts.
    """

    def __init__(self, folder: Path, options: RunOptions, half: int, began: Callable[[str], None]) -> None:
        self.folder, self.options, self.half, self.began = folder, options, half, began
        self._made: dict[str, Run] = {}

    def whole(self, scenario: Scenario, layout: Layout, dropout: float) -> Run:
        """Return an uninterrupted run with a checkpoint halfway."""
        name = f"whole {scenario.dtype} {_settings(scenario)}{layout.label()} dropout {dropout}"
        return self._launch(name, scenario, layout, dropout, self.options.steps)

    def first_half(self, scenario: Scenario) -> Run:
        """Return a run with dropout whose processes end halfway."""
        return self._launch(f"half {scenario.name}", scenario, scenario.layout, DROPOUT, self.half)

    def second_half(self, scenario: Scenario, fault: str | None) -> Run:
        """Return a run that new processes resume from the checkpoint of ``first_half``."""
        name = f"resumed {scenario.name} {fault or ''}".strip()
        first = self.first_half(scenario)
        run = self._begin(name)
        if run is None:
            return self._made[name]
        shutil.copytree(first.run_folder, run.run_folder, ignore=shutil.ignore_patterns("logs"))
        _break_files(run.run_folder, self.half, fault)
        self._resume(run, scenario.layout, fault)
        return run

    def elsewhere(self, scenario: Scenario, layout: Layout, fault: str | None) -> Run:
        """Return the second half of ``whole``, without dropout, resumed in another layout."""
        name = f"elsewhere {scenario.name} {layout.label()} {fault or ''}".strip()
        source = self.whole(scenario, scenario.layout, 0.0)
        run = self._begin(name)
        if run is None:
            return self._made[name]
        last, middle = checkpoints.tag_of(self.options.steps), checkpoints.tag_of(self.half)
        shutil.copytree(source.run_folder, run.run_folder, ignore=shutil.ignore_patterns("logs", last))
        files.write_file(run.run_folder / checkpoints.FOLDER / checkpoints.LATEST, middle.encode())
        _break_files(run.run_folder, self.half, fault)
        self._resume(run, layout, fault)
        return run

    def loaded(self, scenario: Scenario, model: Path) -> Run:
        """Return a run that starts from a converted model in the scenario's layout and takes no step."""
        name = f"loaded {scenario.name}"
        run = self._begin(name)
        if run is None:
            return self._made[name]
        options = self._options(scenario, scenario.layout, 0.0, run)
        _launch(Job(replace(options, model=str(model)), 0, digests=run.digests))
        return run

    def _launch(self, name: str, scenario: Scenario, layout: Layout, dropout: float, last: int) -> Run:
        run = self._begin(name)
        if run is None:
            return self._made[name]
        options = self._options(scenario, layout, dropout, run)
        options.write()
        _launch(Job(options, last, digests=run.digests))
        return run

    def _begin(self, name: str) -> Run | None:
        """Return a new, empty run called ``name``; None if it was made before."""
        if name in self._made:
            return None
        self.began(name)
        run = self._made[name] = Run(self.folder / name.replace(" ", "_").replace("×", "x"))
        shutil.rmtree(run.folder, ignore_errors=True)
        run.run_folder.mkdir(parents=True)
        if not name.startswith(("half", "whole", "loaded")):
            run.run_folder.rmdir()  # the caller copies another run here
        return run

    def _options(self, scenario: Scenario, layout: Layout, dropout: float, run: Run) -> RunOptions:
        changes: dict[str, Any] = {
            "output_dir": str(run.run_folder),
            "dtype": scenario.dtype,
            "dropout": dropout,
            "save_every": self.half // 2,
            "layout": layout,
        }
        return replace(self.options, **changes, **scenario.settings).resharded(layout)

    def _resume(self, run: Run, layout: Layout, fault: str | None) -> None:
        options = replace(RunOptions.read(run.run_folder), output_dir=str(run.run_folder))
        checkpoint = checkpoints.latest(run.run_folder)
        resharded = checkpoints.read_state(checkpoint).layout != layout
        options = options.resharded(layout)
        if layout.zero_stage == 0:
            options = replace(options, offload="none")
        _launch(Job(options, options.steps, checkpoint, resharded, run.digests, fault))


def _launch(job: Job) -> None:
    """Run ``job``; raise KeyboardInterrupt if a signal ended it, so that validation ends too."""
    if launch(job).interrupted:
        raise KeyboardInterrupt


def _settings(scenario: Scenario) -> str:
    return "".join(f"{key} {value} " for key, value in sorted(scenario.settings.items()))


def _break_files(run: Path, half: int, fault: str | None) -> None:
    """Inject those faults that change files."""
    checkpoint = checkpoints.latest(run)
    if fault == "stale-latest":
        files.write_file(run / checkpoints.FOLDER / checkpoints.LATEST, checkpoints.tag_of(half // 2).encode())
    elif fault == "swap-shards":  # without ZeRO, only the states of random generators differ between ranks
        for pattern in ("*optim_states.pt", "*.distcp", "rng-rank-*"):
            shards = sorted(checkpoint.glob(pattern))
            if len(shards) > 1:
                spare = checkpoint / "spare"
                shards[0].rename(spare)
                shards[1].rename(shards[0])
                spare.rename(shards[1])
                return
