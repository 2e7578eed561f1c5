"""Weights straight into ZeRO-3 partitions: no full parameter is read, built or sent.

Under ZeRO-3 a rank keeps ``ds_tensor``, elements [r × n, (r + 1) × n) of the flattened parameter, n = ceil(numel /
world) (DeepSpeed 0.19.8 ``runtime/zero/partition_parameters.py`` ``_partition_param``): one range of the checkpoint's
bytes. ``deepspeed.zero.Init`` builds each parameter in full, broadcasts it and cuts it up; here it only gets its
partition.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.errors import UnsupportedError
from dsconv.loaders.agreement import agreement
from dsconv.loaders.models import config_folder, model_class_of, read_config, refuse_quantized
from dsconv.loaders.partitions import allocate_partition
from dsconv.loaders.swapping import check_nvme
from dsconv.zero_utils.config import DSConfig

if TYPE_CHECKING:
    import torch


def load_zero3(
    source: str | os.PathLike[str] | Checkpoint,
    ds_config: str | os.PathLike[str] | dict[str, Any] | DSConfig,
    *,
    model_class: Any = None,
    config: Any = None,
    dtype: Any = None,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    tag: str | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """A transformers model whose parameters are ZeRO-3 partitions, for ``deepspeed.initialize(model=model,
    config=ds_config)``.

    ``source`` is any checkpoint that ``open_checkpoint`` reads, with a ``config.json`` in its folder or the parent, or
    ``config``, a transformers configuration. ``model_class`` defaults to the architecture that the configuration names;
    an Auto class works too. Every rank of the job must call it; each reads its own bytes only. Missing weights are
    initialised as ``from_pretrained`` does, unless ``strict``. ``model.load_report`` is the ``LoadReport``.

    The model is built as transformers builds it under ``HfDeepSpeedConfig``, with the same dtype (the one of
    ``ds_config``; ``dtype`` is that of tensors which ZeRO does not convert). Raises InconsistentCheckpointError (with
    ``strict``, or a shape that differs), UnsupportedError, RankFailedError where another rank failed, and what
    ``open_checkpoint`` raises.
    """
    began = time.monotonic()
    settings = DSConfig.read(ds_config)
    if not settings.is_zero3:
        raise UnsupportedError(
            f"{settings.source} says ZeRO stage {settings.stage}: load_zero3 needs stage 3; for others load with"
            " from_pretrained"
        )
    _refuse_quantizing(settings)
    with agreement("load_zero3"):
        _check_offload(settings.get("zero_optimization"))
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag)
        folder = config_folder(checkpoint)
        if config is None:
            config = read_config(checkpoint, folder)
        refuse_quantized(config, checkpoint)
        kind = model_class_of(model_class, config)
    from dsconv.loaders.mapping import leave_out_ties, match
    from dsconv.loaders.stream import fill_model, finish_transformers, print_once

    with _hf_zero3(settings):
        with agreement("load_zero3"):
            model = _build(kind, config, dtype)
        with agreement("load_zero3"):
            matched = match(model, checkpoint)
            leave_out_ties(model, matched)
            report = fill_model(
                model,
                checkpoint,
                matched,
                strict=strict,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                workers=workers,
                progress=progress,
            )
        finish_transformers(model, matched, folder)
    report.seconds = time.monotonic() - began
    model.load_report = report
    print_once(report)
    return model


def _refuse_quantizing(settings: DSConfig) -> None:
    quantizing = {**settings.get("zero_optimization"), **(settings.get("weight_quantization") or {})}
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "quantized_initialization"):
        if quantizing.get(key):
            raise UnsupportedError(
                f"ds_config sets {key}: load_zero3 does not quantize; switch it off, or load with from_pretrained"
            )


def _check_offload(zero: dict[str, Any]) -> None:
    """Raise UnsupportedError where partitions are to lie on NVMe and DeepSpeed cannot put them there."""
    if (zero.get("offload_param") or {}).get("device") != "nvme":
        return
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise UnsupportedError(
            "zero_hpz_partition_size with offload_param to nvme: DeepSpeed has no secondary partitions there"
        )
    if not zero["offload_param"].get("nvme_path"):
        raise UnsupportedError("offload_param to nvme needs nvme_path, a folder on the disk")
    check_nvme(str(zero["offload_param"]["nvme_path"]))


@contextmanager
def _hf_zero3(settings: DSConfig) -> Iterator[None]:
    """transformers knows of ZeRO-3 while this is open, as it does while a script keeps an ``HfDeepSpeedConfig``."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    keep = integration.HfDeepSpeedConfig(settings.to_dict())
    try:
        yield
    finally:
        del keep
        integration._hf_deepspeed_config_weak_ref = before


def _build(kind: Any, config: Any, dtype: Any) -> Any:
    """The model, as ``from_pretrained`` builds it (5.24 ``modeling_utils.py``), with partitions in place of
    parameters.
    """
    import copy

    import deepspeed
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    contexts = kind.get_init_context(dtype, False, False, None)
    with ExitStack() as stack:
        for context in contexts:
            if isinstance(context, deepspeed.zero.Init):
                context._zero_init_param = _partition_only(context)
                # The parameters keep the Init: deepspeed.initialize converts with it what is added later, as adapters,
                # with its values.
                stack.callback(delattr, context, "_zero_init_param")
            stack.enter_context(context)
        return kind(copy.deepcopy(config))


def _partition_only(init: Any) -> Callable[[torch.Tensor], None]:
    """What replaces ``Init._zero_init_param``, which would broadcast a parameter from rank 0 and cut it up."""

    def dress(param: Any) -> None:
        from deepspeed.runtime.zero.partition_parameters import free_param

        init._convert_to_deepspeed_param(param)
        allocate_partition(init, param)
        free_param(param)

    return dress
