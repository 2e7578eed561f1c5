"""What a training run needs to go on beside the weights: the optimizer's states and settings.

A format that can tell gives a ``Checkpoint`` a function that makes a ``Training`` when asked. The states of a parameter
are ``TensorEntry``s of the parameter's own shape and layout, so a destination treats them as it treats weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.dtypes import DType
from dsconv.checkpoint.tensormap import TensorEntry


@dataclass(frozen=True)
class SmallTensor:
    """A tensor whose bytes (row-major, little-endian) were read along with the metadata: a step counter, a learning rate."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Training:
    """The optimizer of a checkpoint.

    ``states``: {parameter: {state, such as exp_avg: its entry}}, each entry named ``parameter/state``.
    ``steps``: {parameter: its step counter}, a SmallTensor or a number; absent where the optimizer keeps none.
    ``param_groups``: the optimizer's groups of hyperparameters; ``settings``: what else the optimizer's wrapper saved (loss
    scaler, clipping, …). Both are plain values, SmallTensors, and Instances of classes of DeepSpeed.
    ``module``: tensors of the model states that no parameter of ``states`` stands for: frozen weights, buffers, tied names.
    ``model_files``: the model-states files, that of rank 0 first.
    """

    stage: int
    states: Mapping[str, Mapping[str, TensorEntry]]
    steps: Mapping[str, Any]
    param_groups: list[dict[str, Any]]
    settings: dict[str, Any]
    module: Mapping[str, TensorEntry]
    model_files: tuple[Path, ...]
    universal_info: Mapping[str, Any] = field(default_factory=dict)
    deepspeed_version: str | None = None
    warnings: tuple[str, ...] = ()
