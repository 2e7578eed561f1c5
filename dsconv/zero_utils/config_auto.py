"""Fill in ``"auto"`` in a DeepSpeed config as transformers' Trainer does, and compare the values that must agree.

These are the rules of transformers ``integrations/deepspeed.py``,
``HfTrainerDeepSpeedConfig.trainer_config_process`` and ``trainer_config_finalize``, as a function of plain values:
nothing is read from, or left in, the process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsconv.zero_utils.config_keys import lookup


@dataclass(frozen=True)
class TrainingValues:
    """The values that replace "auto", under their names in ``TrainingArguments``.

    None means unknown: "auto" stays, and nothing is compared.

    Attributes:
        world_size: The number of processes.
        per_device_train_batch_size: Samples of a micro-batch on one rank.
        gradient_accumulation_steps: Micro-batches per step.
        max_grad_norm: The gradient clipping.
        learning_rate: The peak learning rate.
        adam_beta1: Adam's first decay rate.
        adam_beta2: Adam's second decay rate.
        adam_epsilon: Adam's epsilon.
        weight_decay: The weight decay.
        fp16: Whether training or full evaluation runs in fp16.
        bf16: Whether training or full evaluation runs in bf16.
        warmup_steps: Steps of warm-up, or below 1 a share of ``num_training_steps``.
        num_training_steps: Steps in all.
        hidden_size: The model's hidden size (see ``hidden_size_of``).
        save_on_each_node: Whether each node saves to its own disk.
        auto_find_batch_size: Whether the Trainer searches a batch size, so that those of the config need not agree.
    """

    world_size: int | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_grad_norm: float | None = None
    learning_rate: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    weight_decay: float | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    warmup_steps: float | None = None
    num_training_steps: int | None = None
    hidden_size: int | None = None
    save_on_each_node: bool = False
    auto_find_batch_size: bool = False

    @classmethod
    def of(cls, args: Any, *, hidden_size: int | None = None, num_training_steps: int | None = None) -> TrainingValues:
        """Return the values of a ``transformers.TrainingArguments``, or of anything with its attributes."""
        return cls(
            world_size=args.world_size,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            learning_rate=args.learning_rate,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fp16=args.fp16 or args.fp16_full_eval,
            bf16=args.bf16 or args.bf16_full_eval,
            warmup_steps=args.warmup_steps,
            num_training_steps=num_training_steps,
            hidden_size=hidden_size,
            save_on_each_node=args.save_on_each_node,
        )

    @property
    def train_batch_size(self) -> int | None:
        """Samples per step of all ranks, which DeepSpeed requires ``train_batch_size`` to be."""
        world, micro, steps = self.world_size, self.per_device_train_batch_size, self.gradient_accumulation_steps
        return None if world is None or micro is None or steps is None else world * micro * steps

    @property
    def warmup_num_steps(self) -> int | None:
        """Steps of warm-up, at least 1 (DeepSpeed 0.19.6 and later refuse 0)."""
        if self.warmup_steps is None:
            return None
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        if self.warmup_steps and self.num_training_steps is None:
            return None
        return max(1, math.ceil((self.num_training_steps or 0) * self.warmup_steps))


@dataclass(frozen=True)
class Mismatch:
    """A value of the config that differs from the one given: its key, both values, and the argument's name."""

    key: str
    found: Any
    expected: Any
    argument: str

    def __str__(self) -> str:
        return f"{self.key} is {self.found!r}, but {self.argument} is {self.expected!r}"


def fill(config: dict[str, Any], values: TrainingValues) -> list[Mismatch]:
    """Replace "auto" in ``config``, in place, and return the values that contradict ``values``.

    As in the Trainer, only existing keys are filled or compared, and the sizes of stage 3 are filled at stage 3 only.
    """
    mismatches = []
    for key, value, argument, must_match in _rules(values, lookup(config, "zero_optimization.stage") == 3):
        section, _, name = key.rpartition(".")
        node = lookup(config, section) if section else config
        if value is None or not isinstance(node, dict):
            continue
        if node.get(name) == "auto":
            node[name] = value
        elif must_match and node.get(name) is not None and node[name] != value:
            mismatches.append(Mismatch(key, node[name], value, argument))
    if values.save_on_each_node and isinstance(config.setdefault("checkpoint", {}), dict):
        config["checkpoint"]["use_node_local_storage"] = True
    return mismatches


def _rules(values: TrainingValues, stage3: bool) -> Iterator[tuple[str, Any, str, bool]]:
    """Yield (key, the value that replaces "auto", the argument that gives it, whether both must agree)."""
    batch = not values.auto_find_batch_size
    yield "train_micro_batch_size_per_gpu", values.per_device_train_batch_size, "per_device_train_batch_size", batch
    yield "gradient_accumulation_steps", values.gradient_accumulation_steps, "gradient_accumulation_steps", True
    product = "world_size × per_device_train_batch_size × gradient_accumulation_steps"
    yield "train_batch_size", values.train_batch_size, product, batch
    yield "gradient_clipping", values.max_grad_norm, "max_grad_norm", True
    yield "optimizer.params.lr", values.learning_rate, "learning_rate", True
    betas = None if values.adam_beta1 is None or values.adam_beta2 is None else [values.adam_beta1, values.adam_beta2]
    yield "optimizer.params.betas", betas, "[adam_beta1, adam_beta2]", True
    yield "optimizer.params.eps", values.adam_epsilon, "adam_epsilon", True
    yield "optimizer.params.weight_decay", values.weight_decay, "weight_decay", True
    yield "scheduler.params.warmup_min_lr", 0, "always 0", False
    yield "scheduler.params.warmup_max_lr", values.learning_rate, "learning_rate", True
    yield "fp16.enabled", values.fp16, "fp16", True
    yield "bf16.enabled", values.bf16, "bf16", True
    size = values.hidden_size
    yield "zero_optimization.reduce_bucket_size", size and size * size, "hidden_size²", False
    size = size if stage3 else None
    yield "zero_optimization.stage3_prefetch_bucket_size", size and int(0.9 * size * size), "0.9 × hidden_size²", False
    yield "zero_optimization.stage3_param_persistence_threshold", size and 10 * size, "10 × hidden_size", False
    yield "scheduler.params.total_num_steps", values.num_training_steps, "num_training_steps", True
    yield "scheduler.params.warmup_num_steps", values.warmup_num_steps, "warmup_steps", True


AUTO_KEYS = {key: argument for key, _, argument, _ in _rules(TrainingValues(), False)}
"""The keys whose "auto" the Trainer fills, and what it fills them with."""


def autos(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose value is "auto", in the order of the config."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + str(key))
    return found


def hidden_size_of(model_config: object) -> int | None:
    """Return the hidden size in a model's configuration, where the Trainer looks for it; None if there is none.

    ``model_config`` is a transformers configuration, or what its ``config.json`` holds: ``hidden_size``, the largest of
    ``hidden_sizes``, or one of these in ``text_config``.
    """
    for holder in (model_config, _attribute(model_config, "text_config")):
        size = _attribute(holder, "hidden_size")
        if size is not None:
            return int(size)
        sizes = _attribute(holder, "hidden_sizes")
        if sizes:
            return int(max(sizes))
    return None


def _attribute(holder: object, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
