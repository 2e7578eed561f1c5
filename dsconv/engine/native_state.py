"""Save and load a native run as a DCP directory of tensors: model, optimizer, schedule, and a hook's state.

It holds no objects, so loading unpickles only ``.metadata``, after dsconv's own reader has checked it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dsconv.checkpoint.opening import open_checkpoint
from dsconv.errors import InconsistentCheckpointError


class NativeRun(Protocol):
    """What is saved and loaded of one rank of a native run; ``NativeBackend`` is one."""

    config: Any
    device: torch.device
    hook: Any
    model: Any
    module: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any

    def schedule(self, taken: int) -> None:
        """Set the schedule after ``taken`` steps."""


def save(backend: NativeRun, folder: Path) -> None:
    """Write this rank's part. Raises OSError."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    model, optimizer = _states(backend)
    state: dict[str, Any] = {"model": model, "optimizer": _tensors(optimizer)}
    state["lr_scheduler"] = {"last_epoch": torch.tensor(backend.scheduler.last_epoch)}
    hook = backend.hook.state() if backend.hook is not None else {}
    if hook:
        state["hook"] = {f"rank-{dist.get_rank()}": hook}
    try:
        # The engine syncs the whole folder before it is put in place.
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=False))
    except CheckpointException as error:  # a BaseException
        raise OSError(_reason(error)) from None
    if dist.get_rank() == 0:  # last, since the others would wait in DCP for a rank that failed earlier
        backend.config.save_pretrained(folder)  # lets `dsconv merge` make a model of the checkpoint


def load(backend: NativeRun, checkpoint: Path) -> None:
    """Load a checkpoint of any layout; DCP reads what this rank holds of each tensor.

    Raises:
        InconsistentCheckpointError: The checkpoint was saved from another model.
        DsconvError: ``open_checkpoint`` failed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    open_checkpoint(checkpoint)  # refuses unsafe metadata, and names what is missing or damaged
    model, optimizer = _states(backend)
    schedule = torch.tensor(0)
    state: dict[str, Any] = {"model": model, "optimizer": _tensors(optimizer), "lr_scheduler": {"last_epoch": schedule}}
    hook = _hook_space(backend, dcp.FileSystemReader(checkpoint).read_metadata())
    if hook:
        state["hook"] = {f"rank-{dist.get_rank()}": hook}
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except CheckpointException as error:
        raise InconsistentCheckpointError(f"{checkpoint}: {_reason(error)}") from None
    set_state_dict(
        backend.model,
        backend.optimizer,
        model_state_dict=model,
        optim_state_dict={**optimizer, **state["optimizer"]},
        options=StateDictOptions(flatten_optimizer_state_dict=True, strict=False),
    )
    backend.schedule(int(schedule))
    if hook and backend.hook is not None:
        backend.hook.restore(hook, backend.device)


def _states(backend: NativeRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of the model, tied weights once, and of the optimizer, by the names of parameters."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = get_state_dict(
        backend.model, backend.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    tied = {name for name, _ in backend.module.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in backend.module.named_parameters()}
    return {name: tensor for name, tensor in model.items() if name not in tied}, dict(optimizer)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a state. The settings come from the run's own options."""
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


def _hook_space(backend: NativeRun, metadata: Any) -> dict[str, torch.Tensor]:
    """Allocate memory for what the hook kept on this rank; empty if it kept nothing or the number of ranks differs."""
    if backend.hook is None or backend.hook.powersgd is None:
        return {}
    start = "hook.rank-"
    ranks = {
        int(name.removeprefix(start).partition(".")[0])
        for name in metadata.state_dict_metadata
        if name.startswith(start)
    }
    if len(ranks) != dist.get_world_size():
        return {}
    mine = f"{start}{dist.get_rank()}."
    return {
        name.removeprefix(mine): torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in metadata.state_dict_metadata.items()
        if name.startswith(mine)
    }


def _reason(error: Any) -> str:
    """Return the failure of the lowest rank in one line."""
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure}".splitlines()[0]
