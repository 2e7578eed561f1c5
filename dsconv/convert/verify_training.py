"""Compare the optimizers of two checkpoints of any formats: states byte by byte, step counts, hyperparameters.

The formats keep the same things in other forms. DeepSpeed counts steps in a number, torch in a tensor of each
parameter; torchtitan keeps hyperparameters of each parameter, others of groups. So counts are compared as numbers, and
the hyperparameters of each parameter with those of the same parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.convert.compare import CompareOptions, Difference, VerifyReport, compare
from dsconv.convert.universal_plan import training_of
from dsconv.errors import UnsupportedError

PARAMS = "params"
# How a step is computed, and not what: torch/optim/adam.py.
IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# The values that say the same as nothing does. DeepSpeed's own Adam always corrects the bias unless told not to.
NEUTRAL: Mapping[str, Any] = {"amsgrad": False, "maximize": False, "bias_correction": True}
DECOUPLED = "decoupled_weight_decay"  # DeepSpeed keeps it in the run's configuration only
ABSENT = object()


def compare_training(first: Checkpoint, second: Checkpoint, options: CompareOptions, report: VerifyReport) -> None:
    """Compare the optimizers of two checkpoints, and add what differs to the report.

    Counters of the run and the state of a learning-rate schedule are not compared.

    Args:
        first: The one checkpoint.
        second: The other one.
        options: How to compare; ``renamed`` names parameters too.
        report: That of the weights.

    Raises:
        UnsupportedError: One of them holds no optimizer states that are read.
    """
    one, two = (training_of(checkpoint, "a comparison of optimizers") for checkpoint in (first, second))
    for checkpoint, training in ((first, one), (second, two)):
        if not any(training.states.values()) and not training.steps:
            raise UnsupportedError(f"{checkpoint.path}: its optimizer keeps no state of any parameter to compare")
        report.differences += [
            Difference(name, f"not of one value a weight in {checkpoint.path}, and not compared")
            for name in training.left_out
        ]
    names = {name: _in_first(name, second, first, options) for name in two.states if second[name].numel}
    states_a, states_b = _entries(one), _entries(two)
    renamed = {f"{name}/{state}": f"{own}/{state}" for name, own in names.items() for state in two.states[name]}
    found = compare(
        Checkpoint(first.path, first.format, states_a),
        Checkpoint(second.path, second.format, states_b),
        replace(options, renamed=renamed, left_out=()),
    )
    report.states = found.compared
    report.nbytes += found.nbytes
    report.cast += found.cast
    report.differences += found.differences
    report.differences += _steps(one, two, names)
    report.differences += _settings(one, two, names)


def _entries(training: Training) -> dict[str, TensorEntry]:
    """Return the states; those of parameters without elements are left out, as some formats do."""
    return {entry.name: entry for states in training.states.values() for entry in states.values() if entry.numel}


def _in_first(name: str, second: Checkpoint, first: Checkpoint, options: CompareOptions) -> str:
    """Return what the first checkpoint calls a parameter of the second."""
    given = options.renamed.get(name, name)
    aliases = second[name].aliases if name in second else ()
    return next((first[one].name for one in (given, *aliases) if one in first), given)


def _steps(one: Training, two: Training, names: Mapping[str, str]) -> list[Difference]:
    found = []
    for name, other in names.items():
        a, b = _number(one.steps.get(other)), _number(two.steps.get(name))
        if a != b and (other in one.states or b is not None):
            found.append(Difference(f"{name}/step", f"{_shown(a)} and {_shown(b)}"))
    return found


def _number(step: Any) -> Any:
    return step.number if isinstance(step, SmallTensor) else step


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT or value is None else f"{value}"[:80]


def _settings(one: Training, two: Training, names: Mapping[str, str]) -> list[Difference]:
    """Return where the hyperparameters of parameters differ, each setting once, with the first parameter."""
    a, b = _by_parameter(one), _by_parameter(two)
    if a is None or b is None:
        if a is b and one.param_groups == two.param_groups:
            return []
        return [Difference("param_groups", "which parameters are in which is not known; not compared")]
    found: dict[str, Difference] = {}
    for name, other in names.items():
        left, right = a.get(other, {}), b.get(name, {})
        for key in (*left, *(key for key in right if key not in left)):
            if key in IMPLEMENTATION or key in found or (key == DECOUPLED and _undecided(left, right)):
                continue
            x, y = (side.get(key, NEUTRAL.get(key, ABSENT)) for side in (left, right))
            if not _same(x, y):
                found[key] = Difference(f"{name}: {key}", f"{_shown(x)} and {_shown(y)}")
    return list(found.values())


def _by_parameter(training: Training) -> dict[str, dict[str, Any]] | None:
    """Return the hyperparameters of each parameter; None where the checkpoint does not say whose they are."""
    if len(training.members) != len(training.param_groups):
        return None
    settings = [{k: v for k, v in group.items() if k != PARAMS} for group in training.param_groups]
    return {name: of for of, group in zip(settings, training.members, strict=True) for name in group}


def _undecided(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Return whether weight decay may be decoupled or not: one side does not say, or there is none."""
    return (
        DECOUPLED not in left or DECOUPLED not in right or not (left.get("weight_decay") or right.get("weight_decay"))
    )


def _same(a: Any, b: Any) -> bool:
    a, b = _number(a), _number(b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b
