"""``load_tp``: load a transformers model, tensor-parallel by its own plan; each rank reads only its slices."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.errors import UnsupportedError, require_packages
from dsconv.loaders.agreement import agreement
from dsconv.loaders.fingerprint import fingerprint
from dsconv.loaders.models import config_folder, model_class_of, read_config, refuse_quantized
from dsconv.names.choosing import as_hf
from dsconv.text import count


def load_tp(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    device_mesh: Any = None,
    tp_plan: str | dict[str, str] = "auto",
    model_class: Any = None,
    config: Any = None,
    dtype: Any = None,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    tag: str | None = None,
    item: str | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Load a transformers model, sharded as ``from_pretrained(distributed_config=…)`` shards it.

    Every rank of the mesh must call it; each reads only its slices.

    Args:
        source: A checkpoint, as for ``load_zero3``.
        device_mesh: A mesh with one dimension, or with one named ``tp``; by default all ranks.
        tp_plan: "auto" for the model's own plan, or a dict that overrides parts of it.
        model_class: The class to build, as for ``load_zero3``.
        config: The configuration, as for ``load_zero3``.
        dtype: The dtype of the weights; by default the configuration's, else the checkpoint's.
        strict, ignore_mismatched_sizes, tag, item, workers, progress: As for ``load_zero3``.

    Returns:
        The model in evaluation mode; ``model.load_report`` is the ``LoadReport``.

    Raises:
        InconsistentCheckpointError: A shape differs, with ``strict`` a tensor is missing or unexpected, or the ranks do
            not read copies of one checkpoint.
        UnsupportedError: The model, the mesh or the checkpoint is of an unsupported kind.
        RankFailedError: Another rank failed.
        DsconvError: ``open_checkpoint`` failed.
    """
    require_packages("load_tp", "train", "transformers")
    import torch
    from transformers.distributed import DistributedConfig

    began = time.monotonic()
    with agreement("load_tp") as told:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item)
        folder = config_folder(checkpoint)
        config = copy.deepcopy(read_config(checkpoint, folder) if config is None else config)
        refuse_quantized(config, checkpoint)
        checkpoint = as_hf(checkpoint, config)
        kind = model_class_of(model_class, config)
        told.fingerprint = fingerprint(checkpoint, kind.__name__)
        size = _tp_size(device_mesh)
        settings = DistributedConfig(tp_plan=None if tp_plan == "auto" else tp_plan, tp_size=size) if size > 1 else None
        wanted = _dtype(dtype, config, checkpoint)
    if settings is not None:
        manager = _mesh_manager(kind, settings, device_mesh)
        config.distributed_config = settings
    with agreement("load_tp"):
        with ExitStack() as stack:
            for context in kind.get_init_context(wanted, False, False, None):
                stack.enter_context(context)
            model = kind(config)
        plan = model._get_dtype_plan(wanted)
        if settings is not None:
            model = kind.maybe_distribute_model(model, settings, manager)
        device = manager.get_mesh("tp").device_type if settings is not None else "cpu"
        if device != "cpu":
            device = torch.device(device, getattr(torch, device).current_device())
        from dsconv.loaders.mapping import leave_out_ties, match
        from dsconv.loaders.stream import FillOptions, fill_model, finish_transformers, print_once

        how = FillOptions(strict, ignore_mismatched_sizes, workers, progress)
        matched = match(model, checkpoint)
        leave_out_ties(model, matched)
        _give_memory(model, matched.sources, plan, device)
        report = fill_model(model, checkpoint, matched, how)
    finish_transformers(model, matched, folder, {"": device})
    report.seconds = time.monotonic() - began
    model.load_report = report
    print_once(report)
    return model


def _tp_size(device_mesh: Any) -> int:
    import torch.distributed as dist

    if device_mesh is None:
        return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    return int(device_mesh.shape[_tp_dim(device_mesh)])


def _tp_dim(device_mesh: Any) -> int:
    names = device_mesh.mesh_dim_names or ()
    if "tp" in names:
        return int(names.index("tp"))
    if device_mesh.ndim != 1:
        raise UnsupportedError(
            f"device_mesh has {count(device_mesh.ndim, 'dimension')} and none named 'tp': name it with mesh_dim_names"
        )
    return 0


def _mesh_manager(kind: Any, settings: Any, device_mesh: Any) -> Any:
    """Return transformers' meshes (5.24 ``distributed/utils.py``): its own, or the caller's in the same form."""
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.utils import TransformersDeviceMesh

    if device_mesh is None:
        return kind.prepare_distribute_model(settings)[2]
    ranks = device_mesh.mesh.movedim(_tp_dim(device_mesh), -1)
    ranks = ranks.reshape(1, -1, 1, ranks.shape[-1])
    dense = DeviceMesh(device_mesh.device_type, ranks, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    return TransformersDeviceMesh(
        dense, DeviceMesh(device_mesh.device_type, ranks, mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
    )


def _dtype(dtype: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """Return the dtype that ``from_pretrained`` takes: the given, the configuration's, or the first float's."""
    import torch

    if dtype is None or dtype == "auto":
        first = next((entry.dtype.name for entry in checkpoint.values() if entry.dtype.floating), "float32")
        dtype = getattr(config, "dtype", None) or first
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _give_memory(model: Any, sources: dict[str, Any], plan: dict[str, Any], device: Any) -> None:
    """Move what will be filled from the meta device into memory: this rank's shard, in the plan's dtype."""
    import torch
    from transformers.core_model_loading import build_glob_alternation
    from transformers.distributed.sharding_utils import _dtensor_from_local_like
    from transformers.modeling_utils import _load_parameter_into_model

    pattern, names, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in sources:
            continue
        found = pattern.search(name) if pattern is not None else None
        dtype = plan[names[found.lastgroup]] if found is not None and tensor.is_floating_point() else tensor.dtype
        sharded = hasattr(tensor, "placements")
        local = torch.empty((tensor.to_local() if sharded else tensor).shape, dtype=dtype, device=device)
        value: Any = _dtensor_from_local_like(local, tensor) if sharded else local
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        _load_parameter_into_model(model, name, value)
