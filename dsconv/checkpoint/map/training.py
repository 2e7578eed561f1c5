"""What a training run needs to go on beside the weights: the optimizer's states and settings.

A format that can tell gives a ``Checkpoint`` a function that makes a ``Training`` when asked. The states of a parameter
are ``TensorEntry``s of the parameter's own shape and layout, so a destination treats them as it treats weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry


@dataclass(frozen=True)
class SmallTensor:
    """A tensor whose bytes (row-major, little-endian) were read along with the metadata: a step counter, a learning
    rate.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class SubParams:
    """A parameter of several others: ``shape`` is the view that was cut, along ``dim``; ``patterns`` are all that
    have it.
    """

    pattern: str
    shape: tuple[Any, ...]
    dim: int
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class ShardRule:
    """How tensor parallelism cuts a parameter, by what the trainer saved: who loads it at another degree must know.

    ``dim``: along which dimension; None where it is not cut, or by a rule of the layer's own. ``halves``: two parts of
    equal width, each cut by itself; ``parts``: any number of them. ``view``: the shape that was cut, where the
    parameter itself may have several dimensions of it as one. ``vocabulary``: its rows may be padded; ``rows``: how
    many are not padding.
    """

    dim: int | None = 0
    halves: bool = False
    parts: SubParams | None = None
    view: Any = None
    vocabulary: bool = False
    rows: Any = None


def whole_rows(name: str) -> ShardRule:
    """Of a trainer that saved nothing about its parameters."""
    return ShardRule()


@dataclass(frozen=True)
class Training:
    """The optimizer of a checkpoint.

    ``states``: {parameter: {state, such as exp_avg: its entry}}, each entry named ``parameter/state``. ``steps``:
    {parameter: its step counter}, a SmallTensor or a number; absent where the optimizer keeps none. ``param_groups``:
    the optimizer's groups of hyperparameters; ``settings``: what else the optimizer's wrapper saved (loss scaler,
    clipping, …). Both are plain values, SmallTensors, and Instances of classes of DeepSpeed. ``module``: tensors of the
    model states that no parameter of ``states`` stands for: frozen weights, buffers, tied names. ``counters``: makes
    the engine's own (global_steps, global_samples, skipped_steps, and the state of the lr_scheduler), as far as the
    model states have them; it may raise UnsupportedError. ``model_files``: the model-states files, that of rank 0
    first. ``cut``: how a parameter is cut, by its name; it may raise UnsupportedError or MalformedError.
    """

    stage: int
    states: Mapping[str, Mapping[str, TensorEntry]]
    steps: Mapping[str, Any]
    param_groups: list[dict[str, Any]]
    settings: dict[str, Any]
    module: Mapping[str, TensorEntry]
    model_files: tuple[Path, ...]
    counters: Callable[[], Mapping[str, Any]]
    cut: Callable[[str], ShardRule] = whole_rows
    deepspeed_version: str | None = None
    warnings: tuple[str, ...] = ()
