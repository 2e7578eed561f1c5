"""Find what is wrong with a DeepSpeed config, without DeepSpeed, by its rules.

An ``error`` means that DeepSpeed refuses the config or cannot do what it says; a ``warning``, that it runs but a key
has no effect or another than it seems to have; ``info`` is worth knowing. ``docs/config.md`` lists the rules.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from dsconv.zero_utils import config_keys as keys
from dsconv.zero_utils.config_auto import AUTO_KEYS, autos
from dsconv.zero_utils.config_keys import SECTIONS, lookup

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
ZERO = "zero_optimization"
MAX_KEY_LENGTH = 80  # of a misspelt key; twice the longest known one
TIMEOUT_FIX = (
    "Remove it. What is read: deepspeed.init_distributed(timeout=timedelta(…)), the environment variable"
    " DEEPSPEED_TIMEOUT (minutes, default 10), or TrainingArguments(ddp_timeout=…) (seconds, default 1800)."
)


@dataclass(frozen=True)
class Finding:
    """One finding: its severity, the dotted key, what is wrong, and what to do."""

    severity: Severity
    key: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.key}: {self.message} {self.fix}"


def lint(config: Mapping[str, Any], world_size: int | None = None) -> list[Finding]:
    """Return all findings in the order of the rules. ``world_size`` is the number of processes."""
    rules = (_keys(config), _values(config), _zero(config), _precision(config), _optimizer(config), _scheduler(config))
    return [finding for rule in (*rules, _batch(config, world_size), _parallel(config)) for finding in rule]


# Keys ----------------------------------------------------------------------------------------------------------------


def _keys(config: Mapping[str, Any], section: str = "") -> Iterator[Finding]:
    """Find unknown, removed and deprecated keys, and sections that are not objects."""
    known = SECTIONS[section]
    for name, value in config.items():
        key = f"{section}.{name}" if section else str(name)
        if key in keys.REMOVED:
            yield Finding(
                "error", key, "DeepSpeed 0.19.8 removed it, and refuses a config that has it.", keys.REMOVED[key]
            )
        elif key == "communication_timeout":
            yield Finding("warning", key, "Nothing reads it, so the timeout is not changed.", TIMEOUT_FIX)
        elif name not in known.keys:
            if known.strict or not str(name).startswith("_"):  # "_comment" is how notes are written
                yield _unknown(str(name), key, section)
        elif key in SECTIONS and not isinstance(value, Mapping):
            if not (key == ZERO and isinstance(value, bool)) and not (value is None and key in _MAY_BE_NULL):
                yield Finding(
                    "error",
                    key,
                    f"It is {_shown(value)}; expected an object.",
                    f'Write "{name}": {{…}}, or remove it.',
                )
        else:
            if key in keys.DEPRECATED:
                yield Finding("warning", key, "It is deprecated.", keys.DEPRECATED[key])
            if key in SECTIONS:
                yield from _keys(value, key)


_MAY_BE_NULL = frozenset(
    f"{ZERO}.{name}" for name in ("offload_param", "offload_optimizer", "zenflow", "leaf_module")
) | {"aio", "bf16", "checkpoint.writer", "autotuning.model_info"}


def _unknown(name: str, key: str, section: str) -> Finding:
    nearest = keys.RENAMED.get(key) or _nearest(name, section)
    fix = f"Write {nearest}." if nearest else "Remove it."
    where = section or "the top level"
    if SECTIONS[section].strict:
        return Finding("error", key, f"DeepSpeed refuses a key that it does not know in {where}.", fix)
    if nearest:
        return Finding("error", key, f"DeepSpeed reads no such key at {where}, and silently ignores it.", fix)
    return Finding(
        "warning",
        key,
        f"DeepSpeed reads no such key at {where}, and silently ignores it.",
        "Remove it, unless it is yours.",
    )


def _nearest(name: str, section: str) -> str | None:
    """Return the key that was meant: the same spelling here or in another section, or the closest one here."""
    plain = name.lower().replace("-", "_")
    if len(plain) > MAX_KEY_LENGTH:
        return None
    here = SECTIONS[section].keys
    if plain in here:
        return plain
    for other, known in SECTIONS.items():  # the first sections are those that are met most
        if plain in known.keys and other != section and len(plain) > 6:  # not enabled, device, type, …, which many have
            return f"{other}.{plain}" if other else f"{plain}, at the top level"
    close = difflib.get_close_matches(plain, sorted(here), n=1, cutoff=0.7)
    if close:
        return close[0]
    close = difflib.get_close_matches(plain, sorted(SECTIONS[ZERO].keys), n=1, cutoff=0.85)
    return f"{ZERO}.{close[0]}" if close else None


def _values(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find values that a key does not take, and "auto" where nothing fills it in."""
    for key, choices in keys.CHOICES.items():
        value = lookup(config, key)
        folds = key not in ("scheduler.type", "torch_autocast.dtype") and not key.endswith(".device")
        if value is None or value == "auto":
            continue
        if (value.lower() if isinstance(value, str) and folds else value) not in choices:
            yield Finding("error", key, f"It is {_shown(value)}.", f"Write one of: {', '.join(choices[:7])}.")
    for key in autos(config):
        section = key.rpartition(".")[0]
        if key in AUTO_KEYS or key in _AUTO_IS_A_VALUE or section in _AUTO_IS_A_VALUE:
            continue
        if section in SECTIONS and SECTIONS[section].strict:
            yield Finding(
                "info",
                key,
                'Nobody fills "auto" in here, so DeepSpeed takes its default.',
                "Write a value, or remove it.",
            )
        elif section in (*SECTIONS, "optimizer.params", "scheduler.params"):
            yield Finding(
                "warning",
                key,
                'Nobody fills "auto" in here, so DeepSpeed gets the word itself.',
                "Write a value, or remove it.",
            )


# Where "auto" is a value of DeepSpeed's own, or is filled by accelerate (utils/dataclasses.py DeepSpeedPlugin).
_AUTO_IS_A_VALUE = frozenset(
    f"""pipeline.stages data_types.keep_in_fp32_modules expert_parallel {ZERO}.zenflow {ZERO}.stage
    {ZERO}.offload_param.device {ZERO}.offload_optimizer.device {ZERO}.offload_param.nvme_path
    {ZERO}.offload_optimizer.nvme_path {ZERO}.stage3_gather_16bit_weights_on_model_save""".split()
)


# ZeRO ----------------------------------------------------------------------------------------------------------------


def stage_of(config: Mapping[str, Any]) -> int | None:
    """Return the ZeRO stage of a config, 0 if it asks for none, None if the value is not a stage."""
    zero = config.get(ZERO, {})
    if isinstance(zero, bool):  # the form of before 0.3 (runtime/zero/config.py read_zero_config_deprecated)
        return int(zero)
    stage = lookup(zero, "stage", 0)
    if stage == "auto":  # pydantic models leave "auto" out (runtime/config_utils.py), so the default holds
        return 0
    return int(stage) if _is_number(stage) and stage in (0, 1, 2, 3) else None


def _zero(config: Mapping[str, Any]) -> Iterator[Finding]:
    zero, stage = config.get(ZERO, {}), stage_of(config)
    if isinstance(zero, bool):
        fix = f'Write "{ZERO}": {{"stage": {int(zero)}}}.'
        yield Finding("warning", ZERO, "true and false are deprecated, and transformers cannot read them.", fix)
    if stage is None:
        yield Finding(
            "error", f"{ZERO}.stage", f"It is {_shown(lookup(zero, 'stage'))}.", "Write 0, 1, 2 or 3, as a number."
        )
    if not isinstance(zero, Mapping) or stage is None:
        return
    yield from _offload(zero, stage)
    for name, value in zero.items():
        key = f"{ZERO}.{name}"
        if name in keys.ONLY_STAGE3 and stage != 3 and value not in (None, False):
            yield Finding(
                "warning",
                key,
                f"It belongs to stage 3; at stage {stage} it has no effect.",
                "Set stage 3, or remove it.",
            )
        if name in keys.ONLY_STAGES_1_2 and stage == 3:
            yield Finding("info", key, "It belongs to stages 1 and 2; at stage 3 it has no effect.", "Remove it.")
    if zero.get("compute_grad_norm") is False and stage not in (1, 2):
        yield Finding(
            "error", f"{ZERO}.compute_grad_norm", f"false needs stage 1 or 2, and the stage is {stage}.", "Remove it."
        )
    if zero.get("elastic_checkpoint") is True:
        fix = "Remove it; dsconv to-universal and checkpoint.load_universal resume on any number of ranks."
        yield Finding("warning", f"{ZERO}.elastic_checkpoint", "It is an old format, which stage 3 does not have.", fix)
    if zero.get("legacy_stage1") is True:
        yield Finding("error", f"{ZERO}.legacy_stage1", "DeepSpeed since 0.5.9 refuses it.", "Remove it.")
    if config.get("gradient_allreduce_op") == "sum" and (
        stage == 3 or zero.get("zenflow") or lookup(config, "compile.deepcompile")
    ):
        fix = "Remove it, or change the other."
        yield Finding(
            "error", "gradient_allreduce_op", '"sum" works with neither stage 3, ZenFlow nor DeepCompile.', fix
        )


def _offload(zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        key, device = f"{ZERO}.{name}", lookup(zero, f"{name}.device", "none")
        if device not in ("cpu", "nvme"):
            continue
        if stage < lowest:
            fix = f"Set {ZERO}.stage to {'1, 2 or 3' if lowest == 1 else '3'}, or remove it."
            yield Finding(
                "error", key, f"It asks for offload to {device}, but stage {stage} does not offload that.", fix
            )
        elif device == "nvme" and stage < 3:
            fix = f'Set {ZERO}.stage to 3, or write "device": "cpu".'
            yield Finding(
                "error",
                f"{key}.device",
                f"Only stage 3 offloads to NVMe; stage {stage} takes the CPU's memory instead.",
                fix,
            )
        if device == "nvme" and lookup(zero, f"{name}.nvme_path") is None:
            yield Finding(
                "error", f"{key}.nvme_path", 'It is missing, and "device" is "nvme".', "Name a folder of the NVMe disk."
            )
    for option, off in (("ratio", 1.0), ("super_offload", False)):
        if lookup(zero, f"offload_optimizer.{option}", off) not in (off, "auto") and stage != 3:
            key = f"{ZERO}.offload_optimizer.{option}"
            severity: Severity = "error" if option == "ratio" else "warning"
            yield Finding(severity, key, f"It needs stage 3, and the stage is {stage}.", "Set stage 3, or remove it.")
    for name in ("cpu_offload", "cpu_offload_param"):
        if zero.get(name) is True and stage < (1 if name == "cpu_offload" else 3):
            yield Finding(
                "error", f"{ZERO}.{name}", f"Stage {stage} does not offload that.", "Set a stage, or remove it."
            )


# Precision, optimizer, scheduler -------------------------------------------------------------------------------------


def _precision(config: Mapping[str, Any]) -> Iterator[Finding]:
    stage = stage_of(config)
    bf16 = "bf16" if "bf16" in config else "bfloat16"
    on = [name for name in ("fp16", bf16) if lookup(config, f"{name}.enabled") is True]
    if len(on) == 2:
        yield Finding(
            "error",
            "fp16.enabled",
            f"{on[1]}.enabled is true too; a run has one precision.",
            "Set one of them to false.",
        )
    for name in (
        "fp16.fp16_master_weights_and_grads",
        f"{bf16}.bf16_master_weights_and_grads",
        f"{bf16}.bf16_optimizer_states",
    ):
        if lookup(config, name) is True and stage == 0:
            yield Finding("error", name, "It needs ZeRO stage 1, 2 or 3.", f"Set {ZERO}.stage, or remove it.")
    if (
        lookup(config, f"{bf16}.bf16_optimizer_states") is True
        and lookup(config, f"{bf16}.bf16_master_weights_and_grads") is not True
    ):
        fix = f"Set {bf16}.bf16_master_weights_and_grads to true."
        yield Finding("error", f"{bf16}.bf16_optimizer_states", "It needs bf16_master_weights_and_grads.", fix)
    asked = lookup(config, "data_types.param_dtype")
    running = {"fp16": "fp16", bf16: "bf16"}[on[0]] if on else "fp32"
    if isinstance(asked, str) and running not in _aliases(asked):
        message = f"It is {_shown(asked)}, and the run is in {running}."
        yield Finding("error", "data_types.param_dtype", message, "Remove it: fp16.enabled and bf16.enabled decide.")


def _aliases(dtype: str) -> str:
    plain = dtype.removeprefix("torch.")
    return {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}.get(plain, plain)


def _optimizer(config: Mapping[str, Any]) -> Iterator[Finding]:
    name = lookup(config, "optimizer.type")
    if lookup(config, "optimizer.params.max_grad_norm") is not None:
        fix = "Write gradient_clipping, at the top level."
        yield Finding("error", "optimizer.params.max_grad_norm", "DeepSpeed refuses it in an optimizer.", fix)
    if not isinstance(name, str):
        if lookup(config, "optimizer.params") is not None:
            fix = f"Name one: {', '.join(keys.DEEPSPEED_OPTIMIZERS)}, or a class of torch.optim."
            yield Finding("warning", "optimizer.type", "It is missing, so optimizer.params is not read.", fix)
        return
    plain = name.lower()
    if plain in keys.REMOVED_OPTIMIZERS:
        yield Finding(
            "error",
            "optimizer.type",
            f"DeepSpeed 0.19.8 has no 1-bit optimizers such as {name}.",
            "Write AdamW or Lamb.",
        )
    elif plain not in keys.DEEPSPEED_OPTIMIZERS and name not in keys.TORCH_OPTIMIZERS:
        close = difflib.get_close_matches(plain, [known.lower() for known in _OPTIMIZERS], n=1)
        fix = (
            f"Write {next(known for known in _OPTIMIZERS if known.lower() == close[0])}."
            if close
            else "Name one that exists."
        )
        yield Finding("error", "optimizer.type", f"Neither DeepSpeed nor torch.optim has the optimizer {name!r}.", fix)
    elif (
        plain not in keys.ZERO_OPTIMIZERS
        and (stage_of(config) or 0) > 0
        and config.get("zero_allow_untested_optimizer") is not True
    ):
        fix = "Set zero_allow_untested_optimizer to true, at the top level, or use AdamW."
        yield Finding("error", "optimizer.type", f"ZeRO refuses {name} unless untested optimizers are allowed.", fix)
    if plain == "lamb" and (
        lookup(config, "fp16.enabled") is not True or lookup(config, "fp16.loss_scale", 0) not in (0, "auto")
    ):
        fix = "Set fp16.enabled, and fp16.loss_scale to 0; or use AdamW."
        yield Finding("error", "optimizer.type", "Lamb needs fp16 with dynamic loss scaling.", fix)


_OPTIMIZERS = (*keys.TORCH_OPTIMIZERS, "Lamb", "Lion", "MuAdam", "MuAdamW", "MuSGD")


def _scheduler(config: Mapping[str, Any]) -> Iterator[Finding]:
    name, params = lookup(config, "scheduler.type"), lookup(config, "scheduler.params", {})
    if not isinstance(name, str) or name not in keys.SCHEDULER_PARAMS or not isinstance(params, Mapping):
        return
    known, needed = keys.SCHEDULER_PARAMS[name]
    for param in params:
        if param not in known:
            close = difflib.get_close_matches(str(param), sorted(known), n=1, cutoff=0.6)
            fix = f"Write {close[0]}." if close else "Remove it."
            yield Finding("error", f"scheduler.params.{param}", f"{name} takes no such argument.", fix)
    for param in sorted(needed - set(params)):
        yield Finding(
            "error",
            f"scheduler.params.{param}",
            f"{name} needs it.",
            "Set it (the Trainer fills total_num_steps if it is auto).",
        )
    steps = params.get("warmup_num_steps")
    if steps is not None and steps != "auto" and (type(steps) is not int or steps <= 0):
        yield Finding(
            "error", "scheduler.params.warmup_num_steps", f"It is {_shown(steps)}.", "Write a whole number above 0."
        )


# Batch sizes and parallelism -----------------------------------------------------------------------------------------


def _batch(config: Mapping[str, Any], world_size: int | None) -> Iterator[Finding]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sizes: list[Any] = [config.get(name) for name in names]
    whole, micro, steps = sizes
    if whole is None and micro is None:
        fix = 'Set one of them; "auto" where a Trainer fills it.'
        yield Finding("error", names[1], "DeepSpeed needs train_micro_batch_size_per_gpu or train_batch_size.", fix)
    for name, size in zip(names, sizes, strict=True):
        if size not in (None, "auto") and not (_is_number(size) and size > 0 and size % 1 == 0):
            yield Finding("error", name, f"It is {_shown(size)}.", "Write a whole number above 0.")
            return
    if not _is_number(whole):
        return
    ranks = None if world_size is None else _data_ranks(config, world_size)
    known = [number for number in (micro, steps, ranks) if _is_number(number)]
    product = math.prod(known)
    if len(known) == 3 and whole != product:
        message = f"{whole} is not micro-batch {micro} × accumulation steps {steps} × ranks {ranks} = {product}."
        yield Finding("error", names[0], message, f"Set it to {product}, or remove it: DeepSpeed multiplies.")
    elif whole % product:
        given = [
            f"{what} {n}"
            for what, n in (("micro-batch", micro), ("accumulation steps", steps), ("ranks", ranks))
            if n in known
        ]
        message = f"{whole} is not a multiple of {' × '.join(given)} = {product}."
        yield Finding("error", names[0], message, f"Set a multiple of {product}, or remove it: DeepSpeed multiplies.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _data_ranks(config: Mapping[str, Any], world_size: int) -> int:
    """Return the ranks that see different samples: all but those of sequence and tensor parallelism
    (runtime/config.py).
    """
    for key in ("sequence_parallel_size", "tensor_parallel.autotp_size"):
        size = lookup(config, key)
        if isinstance(size, int) and size > 1:
            world_size //= size
    return world_size


def _parallel(config: Mapping[str, Any]) -> Iterator[Finding]:
    stage = stage_of(config)
    if isinstance(config.get("pipeline"), Mapping) and stage is not None and stage >= 2:
        fix = f"Set {ZERO}.stage to 0 or 1, or remove the pipeline."
        yield Finding(
            "error", "pipeline", f"Pipeline parallelism works with ZeRO-1 at most, and the stage is {stage}.", fix
        )
    if config.get("managed_gradient_accumulation") is False:
        overlaps = lookup(config, f"{ZERO}.overlap_comm") is True and stage in (0, 1)
        rivals = {
            "pipeline": "pipeline" in config,
            "compile.deepcompile": lookup(config, "compile.deepcompile") is True,
        }
        for rival in [key for key, there in {**rivals, f"{ZERO}.overlap_comm": overlaps}.items() if there]:
            message = f"false does not work with {rival}" + (" below stage 2." if rival.startswith(ZERO) else ".")
            yield Finding("error", "managed_gradient_accumulation", message, "Remove one of them.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
