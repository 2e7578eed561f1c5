"""What a training run needs to go on beside the weights: the optimizer's states and settings.

A format that can tell gives a ``Checkpoint`` a function that makes a ``Training`` when asked. The states of a parameter
are ``TensorEntry``s of the parameter's own shape and layout, so a destination treats them as it treats weights.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.text import MAX_MESSAGE, clean

_CODES = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}


@dataclass(frozen=True)
class SmallTensor:
    """A tensor whose bytes (row-major, little-endian) were read with the metadata: a step counter, a learning rate."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @property
    def number(self) -> float | int | None:
        """The one element as a number; None if it is not one of 32 or 64 bits, or not the only one."""
        code = _CODES.get(self.dtype.name)
        if code is None or len(self.data) != self.dtype.itemsize:
            return None
        found: float | int = struct.unpack(code, self.data)[0]
        return found


@dataclass(frozen=True)
class SubParams:
    """A parameter that several others make up.

    ``shape`` is the view that was cut, along ``dim``; ``patterns`` are all name patterns that have it.
    """

    pattern: str
    shape: tuple[Any, ...]
    dim: int
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class ShardRule:
    """How tensor parallelism cuts a parameter, by what the trainer saved. A loader of another degree must know it.

    ``dim`` is the dimension that is cut, or None if none is, or where the layer has a rule of its own. ``halves`` says
    that two parts of equal width are cut, each by itself; ``parts``, any number of them. ``view`` is the shape that was
    cut, several dimensions of which may be one of the parameter's. ``vocabulary`` says that rows may be padded, and
    ``rows`` how many are not padding.
    """

    dim: int | None = 0
    halves: bool = False
    parts: SubParams | None = None
    view: Any = None
    vocabulary: bool = False
    rows: Any = None


def whole_rows(name: str) -> ShardRule:
    """Return the rule for a trainer that saved nothing about its parameters: rows are cut."""
    return ShardRule()


@dataclass(frozen=True)
class Training:
    """The optimizer of a checkpoint.

    Attributes:
        stage: The ZeRO stage; 0 for a run without ZeRO, DeepSpeed's or not.
        states: {parameter: {state, such as exp_avg: its entry}}, each entry named ``parameter/state``.
        steps: {parameter: its step counter}, a SmallTensor or a number; absent where the optimizer keeps none.
        param_groups: The optimizer's groups of hyperparameters.
        settings: What else the optimizer's wrapper saved (loss scaler, clipping, …). Both this and ``param_groups`` are
            plain values, SmallTensors, and Instances of DeepSpeed's classes.
        module: Tensors of the model states that no parameter of ``states`` stands for: frozen weights, buffers, tied
            names.
        model_files: DeepSpeed's model-states files, that of rank 0 first; none for a run of another engine.
        counters: Makes the engine's own counters (global_steps, global_samples, skipped_steps, and the state of the
            lr_scheduler), as far as the model states have them; it may raise UnsupportedError.
        cut: Tells how a parameter is cut, by its name; it may raise UnsupportedError or MalformedError.
        deepspeed_version: The release that saved it, or None if that is not known.
        members: The parameters of each of ``param_groups``; empty where that is not known.
        optimizer: What the run's configuration says of its optimizer: ``type`` and ``params``; empty where it says
            nothing.
        left_out: The names of states that are not of one value a weight, which ``states`` lacks.
        stored: What the trainer's module calls each parameter that has a wrapper in its name there
            (``map/renaming.py``).
        warnings: What was found on the way.
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
    members: tuple[tuple[str, ...], ...] = ()
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "warnings", tuple(clean(text, MAX_MESSAGE) for text in self.warnings))
