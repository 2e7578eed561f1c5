"""``validate``: train, stop, resume, reshape and convert, and compare what must be equal at each step.

There are three levels of comparison.

- *States*: what a fresh process has loaded equals what the other process had when it saved, by the sha256 of every
  weight, master and optimizer state on every rank. After a change of layout the two checkpoints are compared tensor by
  tensor.
- *Bitwise*: a run that was stopped and resumed has the losses, gradient norms and final states of one that was not,
  with dropout on.
- *Calibrated*: another layout sums in another order, so curves may differ by twice as much as the curves of
  uninterrupted runs in different layouts do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.convert.merge import merge
from dsconv.engine.checkpoints import latest
from dsconv.engine.comparing import compare_checkpoints, compare_logits, compare_states
from dsconv.engine.matrix import COLUMNS, FAULTS, Scenario, scenarios
from dsconv.engine.models import open_source
from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.reference_runs import DROPOUT, ReferenceRuns, Run
from dsconv.engine.validation_page import write_validation_page
from dsconv.engine.validation_report import Cell, ValidationReport, write_report
from dsconv.errors import DsconvError, MissingPackageError, UsageError, require_packages

# Curves may differ by at least this part of the loss: fp32 sums in another order, bf16 weights rounded differently.
FLOORS = {"fp32": 2.0**-20, "bf16": 2.0**-14}
LOGITS = {"fp32": 2.0**-16, "bf16": 2.0**-5}  # parts of the largest logit, where ranks compute parts of the model


Verdict = tuple[str, bool | None, dict[str, Any]]  # level, passed, evidence


class Validation:
    """Run the cells of ``scenarios``.

    Args:
        folder: The folder for the runs.
        options: What the runs have in common.
        scenarios: The rows of the table.
        fault: The fault to inject into each resumed run; None injects none.
        began: Called with the name of each run that starts.
        done: Called with each cell that is finished.
    """

    def __init__(
        self,
        folder: Path,
        options: RunOptions,
        scenarios: list[Scenario],
        fault: str | None = None,
        began: Callable[[str], None] = lambda name: None,
        done: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self.half = options.steps // 2
        self.runs = ReferenceRuns(folder, options, self.half, began)
        self.scenarios, self.fault, self.done = scenarios, fault, done
        self.folder = folder
        self.cells: list[Cell] = []
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.references: dict[str, dict[str, list[float]]] = {}

    def run(self) -> list[Cell]:
        """Run every cell and return them."""
        for scenario in self.scenarios:
            for column in COLUMNS:
                # Faults are injected into runs that resume. A conversion does not resume.
                if self.fault is None or column not in ("convert", "load back"):
                    self.check(scenario, column)
        return self.cells

    def check(self, scenario: Scenario, column: str) -> None:
        """Run one cell."""
        checks: dict[str, Callable[[], Verdict]] = {
            "in place": lambda: self._in_place(scenario),
            "convert": lambda: self._convert(scenario),
            "load back": lambda: self._load_back(scenario),
        }
        began = time.monotonic()
        try:
            level, passed, evidence = checks.get(column, lambda: self._elsewhere(scenario, column))()
        except DsconvError as error:  # a run that cannot be resumed has failed
            level, passed, evidence = "ran", False, {"error": f"{type(error).__name__}: {error}"}
        name = f"{scenario.name}: {column}"
        layout, dtype = scenario.layout.label(), scenario.dtype
        cell = Cell(name, scenario.name, column, layout, dtype, passed, level, evidence)
        cell.seconds = time.monotonic() - began
        self.cells.append(cell)
        self.done(cell)

    def _in_place(self, scenario: Scenario) -> Verdict:
        whole = self.runs.whole(scenario, scenario.layout, DROPOUT)
        first = self.runs.first_half(scenario)
        second = self.runs.second_half(scenario, self.fault)
        self._keep(scenario, "uninterrupted", whole)
        self._keep(scenario, "resumed in place", second, whole)
        evidence: dict[str, Any] = {}
        evidence["states saved and loaded that differ"] = compare_states(
            first.digests / "end", second.digests / "start"
        )
        evidence["states at the end that differ"] = compare_states(whole.digests / "end", second.digests / "end")
        for key in ("loss", "grad_norm", "lr"):
            pairs = zip(whole.metrics, first.metrics[: self.half] + second.metrics[self.half :], strict=False)
            evidence[f"steps whose {key} differs"] = [
                a["step"] for a, b in pairs if a[key] != b[key] or a["step"] != b["step"]
            ]
        evidence["steps taken"] = [len(whole.metrics), len(second.metrics)]
        compared = sum(len(names) for rank in _states(whole) for names in rank.values())
        passed = bool(compared) and evidence["steps taken"][0] == evidence["steps taken"][1] == self.runs.options.steps
        passed = passed and not any(value for key, value in evidence.items() if "differ" in key)
        return "states, bitwise", passed, {"states compared": compared, **evidence}

    def _elsewhere(self, scenario: Scenario, column: str) -> Verdict:
        target = scenario.targets[column]
        if isinstance(target, str):
            return "–", None, {"why not": target}
        source = self.runs.whole(scenario, scenario.layout, 0.0)
        reference = self.runs.whole(scenario, target, 0.0)
        resumed = self.runs.elsewhere(scenario, target, self.fault)
        self._keep(scenario, f"{column}: {target.label()}", resumed, reference)
        apart = self._apart(scenario, target)
        floor = FLOORS[scenario.dtype] * max(source.curve("loss"))
        tolerance = max(2 * apart, floor)
        distance = _distance(resumed, reference)
        compared, differing = compare_checkpoints(source.run_folder, self.half, resumed.digests / "resaved")
        evidence = {
            "resumed as": target.label(),
            "tensors compared": compared,
            "tensors that differ": differing,
            "largest distance of losses": distance,
            "tolerance": tolerance,
            "distance of uninterrupted runs": apart,
            "floor": floor,
        }
        close = math.isfinite(distance) and distance <= tolerance
        return "states, calibrated", compared > 0 and not differing and close, evidence

    def _apart(self, scenario: Scenario, target: Layout) -> float:
        """Return the largest distance between two uninterrupted runs, without dropout, over all layouts.

        They are the runs with the scenario's dtype and settings.
        """
        layouts = {scenario.layout, target}
        for other in self.scenarios:
            if (other.dtype, other.settings) == (scenario.dtype, scenario.settings):
                layouts |= {other.layout}
        runs = [self.runs.whole(scenario, layout, 0.0) for layout in sorted(layouts, key=Layout.label)]
        return max(_distance(a, b) for a in runs for b in runs)

    def _convert(self, scenario: Scenario) -> Verdict:
        whole = self.runs.whole(scenario, scenario.layout, 0.0)
        merged = self.folder / f"merged-{scenario.name}"
        report = merge(latest(whole.run_folder), merged, verify_output=True, fsync=False, force=True)
        evidence: dict[str, Any] = {"tensors": report.tensors, "parameters": report.parameters}
        exact = scenario.layout.tp * scenario.layout.pp * scenario.layout.cp == 1
        evidence |= compare_logits(whole.digests, merged, scenario.dtype)
        limit = 0.0 if exact else LOGITS[scenario.dtype]
        evidence["largest difference allowed"] = limit
        found = evidence.get("largest difference of logits")
        passed = report.verified and (found is None or found <= limit)
        return "bit for bit" if exact else "masters bit for bit, logits calibrated", passed, evidence

    def _load_back(self, scenario: Scenario) -> Verdict:
        if scenario.dtype != "fp32" and scenario.layout.tp > 1:
            return (
                "–",
                None,
                {"why not": "an engine that shards a 16-bit model makes its masters from the 16-bit weights"},
            )
        merged = self.folder / f"merged-{scenario.name}"
        if not merged.is_dir():
            return "ran", False, {"error": "the conversion failed"}
        whole, loaded = self.runs.whole(scenario, scenario.layout, 0.0), self.runs.loaded(scenario, merged)
        kinds = ("weight", "fp32")
        differing = compare_states(whole.digests / "end", loaded.digests / "end", kinds)
        compared = sum(len(rank.get(kind, {})) for rank in _states(loaded) for kind in kinds)
        return (
            "bit for bit",
            compared > 0 and not differing,
            {"states compared": compared, "states that differ": differing},
        )

    def _keep(self, scenario: Scenario, name: str, run: Run, reference: Run | None = None) -> None:
        """Keep the losses of a run, and of the uninterrupted one that it is compared with."""
        self.curves.setdefault(scenario.name, {})[name] = run.curve("loss")
        if reference is not None:
            self.references.setdefault(scenario.name, {})[name] = reference.curve("loss")


def validate(
    model: str,
    report_folder: Path,
    *,
    nproc: int,
    quick: bool = False,
    cells: tuple[str, ...] = (),
    fault: str | None = None,
    steps: int = 8,
    seq_len: int = 32,
    seed: int = 0,
    began: Callable[[str], None] = lambda name: None,
    done: Callable[[Cell], None] = lambda cell: None,
) -> ValidationReport:
    """Run the cells and write REPORT/report.json, report.md, report.html and curves.png.

    The runs themselves are kept in REPORT/runs.

    Args:
        model: A folder, a Hub id or a configuration of a causal language model.
        report_folder: The folder REPORT.
        nproc: Ranks of each run, an even number.
        quick: Run a few rows only.
        cells: Names of the rows to run (see ``matrix.scenarios``); all if empty.
        fault: A fault to inject into each resumed run. Validation must then fail.
        steps: Steps of a run, a multiple of 4.
        seq_len: Tokens of a sample.
        seed: The seed of weights, data and dropout.
        began: Called with the name of each run that starts.
        done: Called with each cell that is finished.

    Returns:
        The report that was written.

    Raises:
        UsageError: An argument is not one of the values above.
        DsconvError: The model cannot be opened.
    """
    began_at = time.monotonic()
    require_packages("validation", "train", "transformers", "deepspeed")
    chosen = scenarios(nproc, quick, cells)
    if fault is not None and fault not in FAULTS:
        raise UsageError(f"--sabotage {fault}: expected one of {', '.join(FAULTS)}")
    if steps < 4 or steps % 4:
        raise UsageError(
            f"--steps {steps}: expected a multiple of 4, since runs save halfway and a quarter of the way before that"
        )
    options = RunOptions(model, "", steps, Layout(nproc=nproc), seq_len=seq_len, batch_size=2 * nproc, seed=seed)
    open_source(options, False)  # fails here, before anything runs, if the model cannot be read
    validation = Validation(report_folder / "runs", options, chosen, fault, began, done)
    found = validation.run()
    passed = all(cell.passed is not False for cell in found)
    report = ValidationReport(
        model,
        nproc,
        steps,
        steps // 2,
        fault,
        passed,
        found,
        validation.curves,
        _versions(),
        time.monotonic() - began_at,
        references=validation.references,
    )
    try:
        write_validation_page(report_folder / "report.html", report)
    except MissingPackageError as error:
        report.warnings.append(str(error))
    write_report(report_folder, report)
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"dsconv": __version__}
    for package in ("torch", "deepspeed", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _states(run: Run) -> list[dict[str, dict[str, str]]]:
    """Return the digests of the run's states at its end, a mapping for each rank."""
    from dsconv.engine.state_digests import read_states

    return read_states(run.digests / "end")


def _distance(a: Run, b: Run) -> float:
    """Return the largest difference of the losses at one step.

    It is infinite if the curves have different lengths or a loss is not finite.
    """
    left, right = a.curve("loss"), b.curve("loss")
    if not left or len(left) != len(right) or not all(map(math.isfinite, [*left, *right])):
        return math.inf
    return max(abs(x - y) for x, y in zip(left, right, strict=True))
