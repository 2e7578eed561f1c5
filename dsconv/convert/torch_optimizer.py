"""The optimizer of a DeepSpeed run as ``torch.optim`` keeps it: parameter groups, step counts, and what has no place.

DeepSpeed's masters, ``exp_avg`` and ``exp_avg_sq`` mean what torch's parameters and states of the same names mean. The
groups differ: DeepSpeed's own Adam keeps fewer settings than ``torch/optim/adam.py`` ``Adam``, whose loader requires
all of them, and whether weight decay is decoupled stands in the run's configuration (DeepSpeed ``runtime/engine.py``
``_configure_basic_optimizer``). torch counts steps in a float32 tensor of each parameter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.checkpoint.pickles.values import Instance, safe_repr
from dsconv.errors import UnsupportedError
from dsconv.text import quote

PAIR = frozenset({"exp_avg", "exp_avg_sq"})
AMSGRAD = "max_exp_avg_sq"
DECOUPLED = "decoupled_weight_decay"
ADAMS = ("adam", "adamw")
# What torch's Adam and AdamW keep beside lr, betas, eps and weight_decay, as DeepSpeed's own Adam works.
SETTINGS: Mapping[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
OF_LAMB = ("max_coeff", "min_coeff")  # DeepSpeed ``ops/lamb/fused_lamb.py``, whose states are called as Adam's


@dataclass(frozen=True)
class TorchOptimizer:
    """What torch's ``Optimizer.state_dict`` holds beside the states.

    Attributes:
        groups: The hyperparameters of each group, with the names of its parameters under ``params``.
        steps: The step count of each parameter that has one.
        warnings: What the user has to know.
    """

    groups: list[dict[str, Any]]
    steps: dict[str, SmallTensor]
    warnings: list[str]


def torch_optimizer(training: Training, path: Path) -> TorchOptimizer:
    """Return the groups and step counts of ``training`` as torch keeps them.

    Args:
        training: The optimizer's side of a checkpoint.
        path: The checkpoint, for messages.

    Raises:
        UnsupportedError: The checkpoint does not say something that torch requires, or keeps what torch has no place
            for.
    """
    if training.left_out:
        names = ", ".join(map(quote, training.left_out))
        raise UnsupportedError(
            f"{path}: the optimizer keeps {names}, which is not of one value a weight and has no place in torch's state"
            " dict. Without --optimizer the weights are converted alone"
        )
    if not any(training.states.values()):
        raise UnsupportedError(
            f"{path}: the optimizer keeps no state of any parameter (as SGD without momentum, or before the first"
            " step). Without --optimizer the weights are converted alone"
        )
    if len(training.members) != len(training.param_groups) or not training.members:
        raise UnsupportedError(
            f"{path}: the checkpoint does not say which parameters are in which of its {len(training.param_groups)}"
            " parameter groups, or its ranks disagree. Without --optimizer the weights are converted alone"
        )
    if any(set(group) <= {"params"} for group in training.param_groups):
        raise UnsupportedError(
            f"{path}: the optimizer was saved without its hyperparameters (elastic_checkpoint), which torch's loader"
            " requires: resume the run in DeepSpeed with elastic_checkpoint off, save, and convert that checkpoint"
        )
    warnings: list[str] = []
    kept = {state for of in training.states.values() for state in of}
    is_adam = kept >= PAIR and kept <= PAIR | {AMSGRAD} and not _is_other(training)
    groups = []
    for number, (group, members) in enumerate(zip(training.param_groups, training.members, strict=True)):
        where = f"{path}: parameter group {number} of the optimizer"
        refuse_objects(group, where)
        values = {key: value for key, value in group.items() if key != "params"}
        if is_adam:
            values = _as_adam(values, training, AMSGRAD in kept, where, warnings)
        groups.append({**values, "params": list(members)})
    if not is_adam:
        kind = training.optimizer.get("type")
        warnings.append(
            f"the optimizer{f' ({quote(str(kind))})' if kind else ''} keeps {', '.join(sorted(kept))}: states and"
            " hyperparameters are written under their names, and only an optimizer that has the same takes them"
        )
    steps = {}
    for name, states in training.states.items():
        step = training.steps.get(name)
        if step is not None:
            steps[name] = _as_step(step, f"{path}: the step count of {quote(name)}")
        elif is_adam and any(entry.numel for entry in states.values()):
            raise UnsupportedError(
                f"{path}: the checkpoint holds no step count of {quote(name)}, which Adam needs to go on"
            )
    return TorchOptimizer(groups, steps, warnings)


def _is_other(training: Training) -> bool:
    """Return whether this is no Adam, though its states are called as Adam's."""
    kind = training.optimizer.get("type")
    named = isinstance(kind, str) and not kind.lower().replace("_", "").endswith(ADAMS)
    return named or any(key in group for group in training.param_groups for key in OF_LAMB)


def _as_adam(
    group: dict[str, Any], training: Training, amsgrad: bool, where: str, warnings: list[str]
) -> dict[str, Any]:
    """Return a group of Adam with every setting that torch's loader requires."""
    if group.get("bias_correction") is False:
        raise UnsupportedError(
            f"{where} has bias_correction off, and torch's Adam always corrects the bias: it cannot go on with these"
            " states. Without --optimizer the weights are converted alone"
        )
    if group.get("amsgrad") and not amsgrad:
        raise UnsupportedError(
            f"{where} has amsgrad on, and the checkpoint holds no {AMSGRAD!r}: DeepSpeed's ds_to_universal leaves it"
            " out. Convert the checkpoint that it was made from"
        )
    missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
    if missing:
        raise UnsupportedError(f"{where} has no {missing[0]}, which Adam needs to go on")
    result = {**SETTINGS, "amsgrad": amsgrad, **group}
    if DECOUPLED not in group:
        decoupled = _is_decoupled(training.optimizer)
        if decoupled is None and group["weight_decay"]:
            warnings.append(
                "the checkpoint does not say whether weight decay is decoupled: go on with torch's AdamW if it was"
                " (DeepSpeed's own Adam by default), else with Adam"
            )
        result[DECOUPLED] = bool(decoupled)  # AdamW sets it itself when it loads
    return result


def _is_decoupled(config: Mapping[str, Any]) -> bool | None:
    """Return whether the run's Adam decouples weight decay; None where the configuration does not say."""
    kind = str(config.get("type") or "").lower()
    params = config.get("params")
    if kind not in ADAMS:
        return None
    return kind == "adamw" or bool(params.get("adam_w_mode", True) if isinstance(params, dict) else True)


def refuse_objects(value: Any, where: str) -> None:
    """Raise UnsupportedError where a value holds an object, which a reader would have to import a class for."""
    if isinstance(value, Instance):
        raise UnsupportedError(f"{where} holds {safe_repr(value)}, which torch's state dict has no place for")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        refuse_objects(inner, where)


def _as_step(step: Any, where: str) -> SmallTensor:
    """Return a step count as torch's optimizers keep it (``torch/optim/optimizer.py`` ``_get_scalar_dtype``)."""
    number = step.number if isinstance(step, SmallTensor) else step
    number = number if isinstance(number, (int, float)) else None
    data = struct.pack("<f", number) if number is not None and abs(number) < 1 << 24 else b""
    if number is None or not data or struct.unpack("<f", data)[0] != number:
        raise UnsupportedError(f"{where} is {safe_repr(step)}, which torch's float32 counter cannot hold")
    return SmallTensor(BY_NAME["float32"], (), data)
