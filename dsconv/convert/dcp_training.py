"""Where a model and its optimizer go in a DCP checkpoint, as each trainer's own loader looks for them.

A ``Layout`` says it. They were read from the trainers: torch's ``torch/distributed/checkpoint/state_dict.py``
(``get_state_dict``: the optimizer's ``state`` by parameter names, and ``param_groups``), and accelerate's
``accelerate/utils/fsdp_utils.py`` (``load_fsdp_model``, ``load_fsdp_optimizer``: a DCP directory each) and
``accelerate/checkpointing.py`` (``load_accelerator_state``: ``scheduler.bin``), and torchtitan's 0.3
``components/optimizer/utils.py`` (``get_flat_optim_state_dict``: dotted keys, the hyperparameters of each parameter),
``components/optimizer/lr_scheduler.py`` and ``trainer.py`` (``Trainer.state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.checkpoint.pickles.values import Instance
from dsconv.convert.dcp_layout import ROOT, DcpPlan, Item, KeyPath, Value, leaves, make_dcp_plan
from dsconv.convert.dcp_output import SCHEDULER
from dsconv.convert.torch_optimizer import TorchOptimizer, refuse_objects
from dsconv.convert.torch_writer import TorchArchive

TORCH = "torch"
ACCELERATE = "accelerate"
TITAN = "torchtitan"
LAYOUTS = (TORCH, ACCELERATE, TITAN)
STATE = "state"
GROUPS = "param_groups"
COUNTERS = "counters"  # dsconv's own: what the engine kept and no optimizer of torch's does


@dataclass(frozen=True)
class Layout:
    """Where things go in the output.

    Attributes:
        name: What users call it.
        model: The keys before each name of the model.
        optimizer: The keys before what torch's optimizer holds.
        counters: The keys before what the engine counted.
        model_folder: The DCP directory of the model, with a slash behind it; "" for the output itself.
        optimizer_folder: That of the optimizer and the counters, which may be the same one.
    """

    name: str
    model: KeyPath
    optimizer: KeyPath
    counters: KeyPath
    model_folder: str = ""
    optimizer_folder: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether the optimizer is stored in dotted keys, with the hyperparameters of each parameter."""
        return self.name == TITAN


@dataclass(frozen=True)
class DcpContents:
    """What is written: DCP directories, small files beside them, and what the user has to know."""

    plans: list[DcpPlan]
    beside: dict[str, bytes]
    warnings: list[str]


def layout_of(name: str, prefix: KeyPath) -> Layout:
    """Return the layout called ``name``; ``prefix`` goes before the keys of both the model and the optimizer."""
    if name == ACCELERATE:
        folders = ("pytorch_model_fsdp_0/", "optimizer_0/")
        return Layout(name, (*prefix, "model"), (*prefix, "optimizer"), (*prefix, COUNTERS), *folders)
    if name == TITAN:
        return Layout(name, (), ("optimizer",), (COUNTERS,))
    return Layout(name, (*prefix, "model"), (*prefix, "optim"), (*prefix, COUNTERS))


def model_items(checkpoint: Checkpoint, before: KeyPath, extra_names: Mapping[str, list[str]]) -> Iterator[Item]:
    """Yield the tensors of the model, each under all of its names.

    Args:
        checkpoint: The source.
        before: The keys before each name.
        extra_names: Further names of each tensor, by its own name.
    """
    for entry in checkpoint.values():
        names = dict.fromkeys((entry.name, *entry.aliases, *extra_names.get(entry.name, ())))
        yield Item(entry, tuple((*before, name) for name in names))


def contents_with_optimizer(
    checkpoint: Checkpoint,
    training: Training,
    optimizer: TorchOptimizer,
    layout: Layout,
    max_file_bytes: int,
    extra_names: Mapping[str, list[str]],
) -> DcpContents:
    """Lay out the model and its optimizer.

    Args:
        checkpoint: The source.
        training: Its optimizer.
        optimizer: What torch holds of that beside the states.
        layout: Where both go.
        max_file_bytes: The size of a file, which only a file of a single chunk exceeds.
        extra_names: Further names of each tensor, by its own name.

    Raises:
        MalformedError: Two tensors would have one name.
        UnsupportedError: A counter is no plain value.
    """
    plan = partial(make_dcp_plan, source=checkpoint.path, dtype=None, max_file_bytes=max_file_bytes)
    counters = _counters(training)
    refuse_objects(counters, f"{checkpoint.path}: what the engine counted")
    model = model_items(checkpoint, layout.model, extra_names)
    states = _state_items(training, layout)
    if layout.is_flat:
        values = chain(_flat_values(training, optimizer, layout.optimizer), _titan_counters(counters))
    else:
        values = chain(
            _optimizer_values(optimizer, layout.optimizer),
            _empty_values(checkpoint, training, optimizer, layout.optimizer),
        )
    values = chain(values, leaves(counters, layout.counters))
    if layout.model_folder == layout.optimizer_folder:
        plans = [plan(chain(model, states), values, folder=layout.model_folder)]
    else:
        plans = [plan(model, (), folder=layout.model_folder), plan(states, values, folder=layout.optimizer_folder)]
    beside, warnings = _scheduler(counters) if layout.name == ACCELERATE else ({}, [])
    if layout.name == TITAN:
        warnings += _titan_warnings(optimizer)
    return DcpContents(plans, beside, warnings)


def _state_items(training: Training, layout: Layout) -> Iterator[Item]:
    for name, states in training.states.items():
        for state, entry in states.items():
            path: KeyPath = (f"{STATE}.{name}.{state}",) if layout.is_flat else (STATE, name, state)
            yield Item(entry, ((*layout.optimizer, *path),))


def _optimizer_values(optimizer: TorchOptimizer, before: KeyPath) -> Iterator[Value]:
    """Yield the step counts and the hyperparameters."""
    for name, step in optimizer.steps.items():
        yield Value(step, (*before, STATE, name, "step"))
    for number, group in enumerate(optimizer.groups):
        yield from leaves(group, (*before, GROUPS, number))


def _flat_values(training: Training, optimizer: TorchOptimizer, before: KeyPath) -> Iterator[Value]:
    """Yield the step counts and the hyperparameters in torchtitan's form."""
    for name, step in optimizer.steps.items():
        yield Value(step, (*before, f"{STATE}.{name}.step"))
    params = training.optimizer.get("params")
    base = params.get("lr") if isinstance(params, dict) else None
    for group in optimizer.groups:
        kind = "fused" if group.get("fused") else "foreach" if group.get("foreach") else "for-loop"
        settings = {key: value for key, value in group.items() if key != "params"}
        # torchtitan asks for both and reads neither again: its schedule keeps the learning rates of its own config.
        settings.setdefault("initial_lr", base if isinstance(base, (int, float)) else group.get("lr"))
        settings.setdefault("implementation", kind)
        for name in group["params"]:
            for key, value in settings.items():
                yield from leaves(value, (*before, f"{GROUPS}.{name}.{key}"))


def _titan_counters(counters: Mapping[str, Any]) -> Iterator[Value]:
    """Yield the counters of torchtitan's trainer. Its schedule counts the optimizer's steps."""
    step = int(counters.get("global_steps") or 0)
    yield Value(step, ("train_state", "step"))
    yield Value(0, ("train_state", "ntokens_seen"))
    yield Value(step - int(counters.get("skipped_steps") or 0), ("lr_scheduler", "last_epoch"))


def _titan_warnings(optimizer: TorchOptimizer) -> list[str]:
    text = (
        "torchtitan counts tokens (train_state.ntokens_seen) and keeps the position in its data, which the checkpoint"
        " does not hold: tokens are counted from 0, and exclude_from_loading must name dataloader"
    )
    found = [text]
    if len(optimizer.groups) > 1:
        found.append(
            f"the run has {len(optimizer.groups)} parameter groups: torchtitan's configuration must have the same ones,"
            " for it takes the hyperparameters of the first parameter of each of its own"
        )
    return found


def _empty_values(
    checkpoint: Checkpoint, training: Training, optimizer: TorchOptimizer, before: KeyPath
) -> Iterator[Value]:
    """Yield the states of parameters without elements. DeepSpeed may keep none, and torch's loader asks for them."""
    dtypes = {state: entry.dtype for states in training.states.values() for state, entry in states.items()}
    step = next(iter(optimizer.steps.values()), None)
    for name, entry in checkpoint.items():
        if entry.role == "buffer" or entry.numel:
            continue
        for state in dtypes.keys() - training.states.get(name, {}).keys():
            yield Value(SmallTensor(dtypes[state], entry.shape, b""), (*before, STATE, name, state))
        if step is not None and name not in optimizer.steps:
            yield Value(step, (*before, STATE, name, "step"))


def _counters(training: Training) -> dict[str, Any]:
    """Return what the engine counted, its schedule and its loss scale, which no optimizer of torch's keeps."""
    found = {**training.counters()}
    scaler = training.settings.get("loss_scaler")
    if not isinstance(scaler, Instance):
        return found
    scale = scaler.get("cur_scale")
    is_used = scaler.get("dynamic") or scale != 1  # a run in bf16 or fp32 keeps one that does nothing
    return {**found, "loss_scale": scale} if is_used and scale is not None else found


def _scheduler(counters: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """Return accelerate's file of the schedule, and a warning where it is not one that torch could go on with."""
    state = counters.get("lr_scheduler")
    if not isinstance(state, dict):
        return {}, []
    if "last_epoch" in state:
        return {SCHEDULER: TorchArchive(ROOT, state).whole()}, []
    kept = ", ".join(sorted(map(str, state)))
    warning = (
        f"the run's schedule is DeepSpeed's own ({kept}), which torch's cannot take over:"
        f" there is no {SCHEDULER}. The learning rates are in the parameter groups, the schedule in {COUNTERS}"
    )
    return {}, [warning]
