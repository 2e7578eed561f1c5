"""The weight, fp32 master and optimizer states that a DeepSpeed engine holds of each parameter on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.checkpoint.pickles.values import Instance
from dsconv.convert.universal_plan import training_of
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.text import quote


def local_states(engine: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (name, state, this rank's part without padding) in the model's order; see ``Backend.local_states``.

    ZeRO-3: partitions (DeepSpeed ``stage3.py`` ``_get_fp32_opt_state_partition``). ZeRO-1 and 2: fragments of a
    flat partition (``utils/tensor_fragment.py``). Without ZeRO: whole, from the optimizer itself.
    """
    stage = engine.zero_optimization_stage()
    whole = _whole_masters(engine) if stage == 0 else {}
    flats = _flat_masters(engine) if stage in (0, 1, 2) else {}
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            yield from _partitions(name, parameter)
            continue
        yield name, "weight", parameter.detach()
        if getattr(parameter, "_hp_mapping", None) is not None:
            yield from _fragments(name, parameter, _inner(engine).state.get(flats[id(parameter)], {}))
        elif stage == 0:  # in stages 1 and 2 another rank holds it
            master = whole.get(id(parameter), parameter)
            if parameter.requires_grad:
                yield name, "fp32", master.detach()
                for key, value in sorted(_inner(engine).state.get(master, {}).items()):
                    if torch.is_tensor(value) and value.numel() == master.numel():
                        yield name, key, value.detach()


def _inner(engine: Any) -> Any:
    """Return torch's optimizer inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _partitions(name: str, parameter: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
    held = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
    yield name, "weight", parameter.ds_tensor.detach().flatten()[:held]
    stage3 = getattr(parameter, "_z3_optimizer", None)
    if stage3 is None or not parameter.requires_grad:
        return
    for state in ("fp32", *sorted(_stage3_keys(stage3))):
        key = None if state == "fp32" else state
        found, _ = stage3._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        if found is not None:
            yield name, state, found.detach().flatten()[:held]


def _stage3_keys(stage3: Any) -> set[str]:
    states = stage3.optimizer.state.values()
    return {key for state in states for key, value in state.items() if torch.is_tensor(value) and value.dim()}


def _fragments(name: str, parameter: Any, states: dict[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    mapping = parameter._hp_mapping
    where = mapping.get_hp_fragment_address()
    yield name, "fp32", mapping.get_hp_fragment().detach()
    for key, value in sorted(states.items()):
        if torch.is_tensor(value) and value.dim():
            yield name, key, value.detach().narrow(0, where.start, where.numel)


def _flat_masters(engine: Any) -> dict[int, torch.Tensor]:
    """Return, by the id of a parameter, the flat partition that holds this rank's part of its master."""
    optimizer = engine.optimizer
    found: dict[int, torch.Tensor] = {}
    for low, high in (
        ("bit16_groups", "single_partition_of_fp32_groups"),
        ("bf16_groups", "fp32_groups_flat_partition"),
    ):
        for parameters, flat in zip(getattr(optimizer, low, ()), getattr(optimizer, high, ()), strict=True):
            found |= {id(parameter): flat for parameter in parameters}
    return found


def _whole_masters(engine: Any) -> dict[int, torch.Tensor]:
    """Return the masters of a 16-bit optimizer without ZeRO, by the id of the parameter.

    They are tensors (DeepSpeed ``fp16/unfused_optimizer.py``), or views of a group's flat one
    (``fp16/fused_optimizer.py``).
    """
    optimizer = engine.optimizer
    found: dict[int, torch.Tensor] = {}
    for index, lows in enumerate(getattr(optimizer, "fp16_groups", ())):
        if hasattr(optimizer, "fp32_groups"):
            highs = optimizer.fp32_groups[index]
        else:
            highs = optimizer.fp32_groups_flat[index].split([low.numel() for low in lows])
        found |= {id(low): high for low, high in zip(lows, highs, strict=True)}
    return found


def fill_whole_masters(engine: Any, checkpoint: Checkpoint) -> None:
    """Fill the masters of a 16-bit optimizer without ZeRO from a checkpoint of the model's weights."""
    whole = _whole_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if name in checkpoint and id(parameter) in whole:
            master = whole[id(parameter)]
            master.detach().copy_(checkpoint[name].read().reshape(master.shape))


def take_over(engine: Any, checkpoint: Checkpoint) -> None:
    """Load ``checkpoint``, of any layout, into an engine without ZeRO, whose every rank holds the whole model.

    Sets what ``engine.load_checkpoint`` sets (DeepSpeed ``engine.py`` ``_load_checkpoint``): weights, masters,
    buffers, the optimizer's states and hyperparameters, the schedule, the loss scaler and the counters.

    Raises:
        UnsupportedError: The optimizer's states cannot be assigned to parameters.
        TensorNotFoundError: The checkpoint lacks a parameter.
        InconsistentCheckpointError: A parameter has another shape.
    """
    training = training_of(checkpoint)
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        raise UnsupportedError(
            f"{checkpoint.path}: DeepSpeed's fused optimizer without ZeRO keeps no states of single parameters: use"
            " --zero-stage 1, or torch's AdamW"
        )
    whole, inner = _whole_masters(engine), _inner(engine)
    for name, parameter in engine.module.named_parameters():
        entry = checkpoint[name]
        if (entry.shape or (1,)) != (tuple(parameter.shape) or (1,)):  # stage 3 has no 0-d parameters
            raise InconsistentCheckpointError(
                f"{checkpoint.path}: {quote(name)} has shape {list(entry.shape)}, but {list(parameter.shape)} in the"
                " model: the"
                " checkpoint was saved from another model"
            )
        master = whole.get(id(parameter), parameter)
        value = entry.read().reshape(parameter.shape)
        for tensor in (parameter, master):
            tensor.detach().copy_(value)
        if entry.name not in training.states:  # frozen
            continue
        inner.state[master] = {
            key: state.read().reshape(master.shape).to(master.device)
            for key, state in training.states[entry.name].items()
        }
        if entry.name in training.steps:
            inner.state[master]["step"] = torch.tensor(_number(training.steps[entry.name]), dtype=torch.float32)
    for name, buffer in engine.module.named_buffers():
        if name in checkpoint:
            buffer.copy_(checkpoint[name].read().reshape(buffer.shape))
    for group, kept in zip(inner.param_groups, training.param_groups, strict=True):
        group.update({key: _number(value) for key, value in kept.items() if key in group and key != "params"})
    _take_over_counters(engine, training)


def _take_over_counters(engine: Any, training: Training) -> None:
    scaler, own = training.settings.get("loss_scaler"), getattr(engine.optimizer, "loss_scale_config", None)
    if isinstance(scaler, Instance) and own is not None:
        for key in ("cur_scale", "cur_iter", "last_overflow_iter"):
            setattr(own, key, scaler.get(key, getattr(own, key)))
    counters = training.counters()
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(counters["lr_scheduler"])
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, counters[key])


def _number(value: Any) -> Any:
    """Return a setting as a number; some optimizers keep it as a 0-d tensor."""
    if not isinstance(value, SmallTensor):
        return value
    return torch.frombuffer(bytearray(value.data), dtype=getattr(torch, value.dtype.name)).item()
