"""``validate``: trains, stops, resumes, reshapes and converts, and compares what must be equal at each step.

Three levels. *States*: what a fresh process has loaded is what the other had when it saved, by sha256 of every weight,
master and optimizer state on every rank; after a change of layout, of the checkpoints by the tensor map. *Bitwise*: a
run that was stopped and resumed has the losses, gradient norms and final states of one that was not, with dropout on.
*Calibrated*: in another layout sums are taken in another order, so curves may part by twice as much as those of
uninterrupted runs in different layouts do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv.convert.merge import merge
from dsconv.engine.checkpoints import latest
from dsconv.engine.comparing import compare_checkpoints, compare_logits, compare_states
from dsconv.engine.matrix import COLUMNS, SABOTAGES, Row, rows
from dsconv.engine.models import open_source
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.reference_runs import DROPOUT, Leg, Legs
from dsconv.engine.validation_report import Cell, ValidationReport, write_report
from dsconv.errors import DsconvError, UsageError

# Two sums of the same numbers part by this much of the loss at least: fp32 sums in another order, bf16 weights rounded
# otherwise.
FLOORS = {"fp32": 2.0**-20, "bf16": 2.0**-14}
LOGITS = {"fp32": 2.0**-16, "bf16": 2.0**-5}  # of the largest logit, where ranks compute parts of the model


Verdict = tuple[str, bool | None, dict[str, Any]]  # level, passed, evidence


class Validation:
    """Runs the cells of ``rows``, in ``folder``; ``began`` is told each run that starts, ``done`` each cell."""

    def __init__(
        self,
        folder: Path,
        options: RunOptions,
        rows: list[Row],
        sabotage: str | None = None,
        began: Callable[[str], None] = lambda name: None,
        done: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self.half = options.steps // 2
        self.legs = Legs(folder, options, self.half, began)
        self.rows, self.sabotage, self.done = rows, sabotage, done
        self.folder = folder
        self.cells: list[Cell] = []
        self.curves: dict[str, dict[str, list[float]]] = {}

    def run(self) -> list[Cell]:
        for row in self.rows:
            for column in COLUMNS:
                # Sabotage breaks runs that resume; what is converted is not one.
                if self.sabotage is None or column not in ("convert", "load back"):
                    self.check(row, column)
        return self.cells

    def check(self, row: Row, column: str) -> None:
        """Run one cell."""
        checks: dict[str, Callable[[], Verdict]] = {
            "in place": lambda: self._in_place(row),
            "convert": lambda: self._convert(row),
            "load back": lambda: self._load_back(row),
        }
        began = time.monotonic()
        try:
            level, passed, evidence = checks.get(column, lambda: self._elsewhere(row, column))()
        except DsconvError as error:  # a run that cannot go on has not passed
            level, passed, evidence = "ran", False, {"error": f"{type(error).__name__}: {error}"}
        cell = Cell(f"{row.name}: {column}", row.name, column, row.layout.label(), row.dtype, passed, level, evidence)
        cell.seconds = time.monotonic() - began
        self.cells.append(cell)
        self.done(cell)

    def _in_place(self, row: Row) -> Verdict:
        whole = self.legs.whole(row, row.layout, DROPOUT)
        first = self.legs.first_half(row)
        second = self.legs.second_half(row, self.sabotage)
        self._keep(row, "uninterrupted", whole)
        self._keep(row, "resumed in place", second)
        evidence: dict[str, Any] = {}
        evidence["states saved and loaded that differ"] = compare_states(first.probe / "end", second.probe / "start")
        evidence["states at the end that differ"] = compare_states(whole.probe / "end", second.probe / "end")
        for key in ("loss", "grad_norm", "lr"):
            pairs = zip(whole.metrics, first.metrics[: self.half] + second.metrics[self.half :], strict=False)
            evidence[f"steps whose {key} differs"] = [
                a["step"] for a, b in pairs if a[key] != b[key] or a["step"] != b["step"]
            ]
        evidence["steps taken"] = [len(whole.metrics), len(second.metrics)]
        compared = sum(len(names) for rank in _states(whole) for names in rank.values())
        passed = bool(compared) and evidence["steps taken"][0] == evidence["steps taken"][1] == self.legs.options.steps
        passed = passed and not any(value for key, value in evidence.items() if "differ" in key)
        return "states, bitwise", passed, {"states compared": compared, **evidence}

    def _elsewhere(self, row: Row, column: str) -> Verdict:
        target = row.targets[column]
        if isinstance(target, str):
            return "–", None, {"why not": target}
        source = self.legs.whole(row, row.layout, 0.0)
        reference = self.legs.whole(row, target, 0.0)
        resumed = self.legs.elsewhere(row, target, self.sabotage)
        self._keep(row, f"{column}: {target.label()}", resumed)
        apart = self._apart(row, target)
        floor = FLOORS[row.dtype] * max(source.curve("loss"))
        tolerance = max(2 * apart, floor)
        distance = _distance(resumed, reference)
        compared, differing = compare_checkpoints(source.run, self.half, resumed.probe / "resaved")
        evidence = {
            "resumed as": target.label(),
            "tensors compared": compared,
            "tensors that differ": differing,
            "largest distance of losses": distance,
            "tolerance": tolerance,
            "distance of uninterrupted runs": apart,
            "floor": floor,
        }
        return "states, calibrated", compared > 0 and not differing and distance <= tolerance, evidence

    def _apart(self, row: Row, target: Layout) -> float:
        """The largest distance between uninterrupted runs of the row's dtype, settings and without dropout, over all
        layouts.
        """
        layouts = {row.layout, target}
        for other in self.rows:
            if (other.dtype, other.settings) == (row.dtype, row.settings):
                layouts |= {other.layout}
        legs = [self.legs.whole(row, layout, 0.0) for layout in sorted(layouts, key=Layout.label)]
        return max(_distance(a, b) for a in legs for b in legs)

    def _convert(self, row: Row) -> Verdict:
        whole = self.legs.whole(row, row.layout, 0.0)
        merged = self.folder / f"merged-{row.name}"
        report = merge(latest(whole.run), merged, verify_output=True, fsync=False, force=True)
        evidence: dict[str, Any] = {"tensors": report.tensors, "parameters": report.parameters}
        exact = row.layout.tp * row.layout.pp * row.layout.cp == 1
        evidence |= compare_logits(whole.probe, merged, row.dtype)
        limit = 0.0 if exact else LOGITS[row.dtype]
        evidence["largest difference allowed"] = limit
        found = evidence.get("largest difference of logits")
        passed = report.verified and (found is None or found <= limit)
        return "bit for bit" if exact else "masters bit for bit, logits calibrated", passed, evidence

    def _load_back(self, row: Row) -> Verdict:
        if row.dtype != "fp32" and row.layout.tp > 1:
            return "–", None, {"why not": "an engine that cuts a 16-bit model makes its masters of 16-bit weights"}
        merged = self.folder / f"merged-{row.name}"
        if not merged.is_dir():
            return "ran", False, {"error": "the conversion failed"}
        whole, loaded = self.legs.whole(row, row.layout, 0.0), self.legs.loaded(row, merged)
        kinds = ("weight", "fp32")
        differing = compare_states(whole.probe / "end", loaded.probe / "end", kinds)
        compared = sum(len(rank.get(kind, {})) for rank in _states(loaded) for kind in kinds)
        return (
            "bit for bit",
            compared > 0 and not differing,
            {"states compared": compared, "states that differ": differing},
        )

    def _keep(self, row: Row, name: str, leg: Leg) -> None:
        self.curves.setdefault(row.name, {})[name] = leg.curve("loss")


def validate(
    model: str,
    report_folder: Path,
    *,
    nproc: int,
    quick: bool = False,
    cells: tuple[str, ...] = (),
    sabotage: str | None = None,
    steps: int = 8,
    seq_len: int = 32,
    seed: int = 0,
    began: Callable[[str], None] = lambda name: None,
    done: Callable[[Cell], None] = lambda cell: None,
) -> ValidationReport:
    """Run the cells and write REPORT/report.json, report.md and curves.png; the runs themselves lie in REPORT/runs.

    ``cells`` names rows (see ``cells.rows``). ``sabotage`` breaks each resumed run on purpose: then a report that
    passes is itself a failure of validation. Raises UsageError, and what opening the model raises.
    """
    began_at = time.monotonic()
    chosen = rows(nproc, quick, cells)
    if sabotage is not None and sabotage not in SABOTAGES:
        raise UsageError(f"--sabotage {sabotage}: it is one of {', '.join(SABOTAGES)}")
    if steps < 4 or steps % 4:
        raise UsageError(
            f"--steps {steps}: a multiple of 4; runs stop halfway, with a checkpoint a quarter of the way before"
        )
    options = RunOptions(model, "", steps, Layout(nproc=nproc), seq_len=seq_len, batch_size=2 * nproc, seed=seed)
    open_source(options, False)  # a model that cannot be read is told before anything runs
    validation = Validation(report_folder / "runs", options, chosen, sabotage, began, done)
    found = validation.run()
    passed = all(cell.passed is not False for cell in found)
    report = ValidationReport(
        model,
        nproc,
        steps,
        steps // 2,
        sabotage,
        passed,
        found,
        validation.curves,
        _versions(),
        time.monotonic() - began_at,
    )
    write_report(report_folder, report)
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("dsconv", "torch", "deepspeed", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _states(leg: Leg) -> list[dict[str, dict[str, str]]]:
    from dsconv.engine.state_digests import read_states

    return read_states(leg.probe / "end")


def _distance(a: Leg, b: Leg) -> float:
    left, right = a.curve("loss"), b.curve("loss")
    return (
        max((abs(x - y) for x, y in zip(left, right, strict=True)), default=math.inf)
        if len(left) == len(right)
        else math.inf
    )
