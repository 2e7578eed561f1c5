"""``load_zero3``: load weights straight into ZeRO-3 partitions. No full parameter is read, built or sent.

Under ZeRO-3 a rank keeps ``ds_tensor``, elements [r × n, (r + 1) × n) of the flattened parameter, n = ceil(numel /
world) (DeepSpeed ``runtime/zero/partition_parameters.py`` ``_partition_param``): one range of the checkpoint's
bytes. ``deepspeed.zero.Init`` builds each parameter in full, broadcasts it and cuts it up; here it only gets its
partition.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.errors import UnsupportedError, require_packages
from dsconv.loaders.agreement import agreement
from dsconv.loaders.fingerprint import fingerprint
from dsconv.loaders.models import config_folder, model_class_of, read_config, refuse_quantized
from dsconv.loaders.partitions import allocate_partition
from dsconv.loaders.swapping import check_nvme
from dsconv.names.choosing import as_hf
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
    item: str | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Load a transformers model whose parameters are ZeRO-3 partitions.

    The model is ready for ``deepspeed.initialize(model=model, config=ds_config)``. It is built as transformers builds
    it under ``HfDeepSpeedConfig``, with the dtype of ``ds_config``. Every rank of the job must call this; each reads
    only its own bytes. Missing weights are initialised as ``from_pretrained`` does, unless ``strict``.

    Args:
        source: Any checkpoint that ``open_checkpoint`` reads: a path, a URL, the id of a model on the Hub, or an open
            checkpoint. A ``config.json`` lies in its folder or the parent, unless ``config`` is given.
        ds_config: The DeepSpeed configuration, with ZeRO stage 3.
        model_class: The class to build, or an Auto class; by default the architecture that the configuration names.
        config: A transformers configuration.
        dtype: The dtype of tensors that ZeRO does not convert.
        strict: Require every tensor to match.
        ignore_mismatched_sizes: Initialise tensors whose shapes differ, instead of raising.
        tag: The checkpoint to read, if ``source`` holds several.
        item: The key of the model to read, if the checkpoint holds several.
        workers: Reading threads.
        progress: Called with ("load", bytes done, bytes in all), from any thread.

    Returns:
        The model in evaluation mode; ``model.load_report`` is the ``LoadReport``.

    Raises:
        InconsistentCheckpointError: A shape differs, with ``strict`` a tensor is missing or unexpected, or the ranks do
            not read copies of one checkpoint.
        UnsupportedError: The model, the configuration or the checkpoint is of an unsupported kind.
        RankFailedError: Another rank failed.
        DsconvError: ``open_checkpoint`` failed.
    """
    began = time.monotonic()
    require_packages("load_zero3", "train", "deepspeed", "transformers")
    settings = DSConfig.read(ds_config)
    if not settings.is_zero3:
        raise UnsupportedError(
            f"{settings.source} has ZeRO stage {settings.stage}: load_zero3 needs stage 3; use from_pretrained for"
            " other stages"
        )
    _refuse_quantizing(settings)
    with agreement("load_zero3") as told:
        _check_offload(settings.get("zero_optimization"))
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, item=item)
        folder = config_folder(checkpoint)
        if config is None:
            config = read_config(checkpoint, folder)
        refuse_quantized(config, checkpoint)
        checkpoint = as_hf(checkpoint, config)
        kind = model_class_of(model_class, config)
        told.fingerprint = fingerprint(checkpoint, kind.__name__)
    from dsconv.loaders.mapping import leave_out_ties, match
    from dsconv.loaders.stream import FillOptions, fill_model, finish_transformers, print_once

    how = FillOptions(strict, ignore_mismatched_sizes, workers, progress)
    with _hf_zero3(settings):
        with agreement("load_zero3"):
            model = _build(kind, config, dtype)
        with agreement("load_zero3"):
            matched = match(model, checkpoint)
            leave_out_ties(model, matched)
            report = fill_model(model, checkpoint, matched, how)
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
                f"ds_config sets {key}: load_zero3 does not quantize; turn it off, or load with from_pretrained"
            )


def _check_offload(zero: dict[str, Any]) -> None:
    """Raise UnsupportedError if partitions are to be kept on NVMe and DeepSpeed cannot put them there."""
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
    """Let transformers know of ZeRO-3, as it does while a script keeps an ``HfDeepSpeedConfig``."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    keep = integration.HfDeepSpeedConfig(settings.to_dict())
    try:
        yield
    finally:
        del keep
        integration._hf_deepspeed_config_weak_ref = before


def _build(kind: Any, config: Any, dtype: Any) -> Any:
    """Build the model as ``from_pretrained`` does (5.24 ``modeling_utils.py``), with partitions for parameters."""
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
                # The parameters keep the Init: deepspeed.initialize uses it to convert what is added later, such as
                # adapters, with its values.
                stack.callback(delattr, context, "_zero_init_param")
            stack.enter_context(context)
        return kind(copy.deepcopy(config))


def _partition_only(init: Any) -> Callable[[torch.Tensor], None]:
    """Replace ``Init._zero_init_param``, which would broadcast a parameter from rank 0 and cut it up."""

    def dress(param: Any) -> None:
        from deepspeed.runtime.zero.partition_parameters import free_param

        init._convert_to_deepspeed_param(param)
        allocate_partition(init, param)
        free_param(param)

    return dress
