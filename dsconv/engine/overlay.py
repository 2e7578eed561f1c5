"""Lay the user's DeepSpeed configuration over the one that a run makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsconv.engine.options import RunOptions
from dsconv.errors import UsageError

AUTO = "auto"


def without_flags(options: RunOptions) -> RunOptions:
    """Return ``options`` without the entries of ``ds_config`` that flags set, so that the layout can change later.

    "auto", which transformers fills in, is removed everywhere.

    Raises:
        UsageError: An entry contradicts its flag.
    """
    layout = options.layout
    if options.ds_config and layout.backend != "deepspeed":
        raise UsageError(f"--ds-config needs --backend deepspeed, but the run has --backend {layout.backend}")
    said: dict[tuple[str, ...], tuple[Any, str]] = {
        ("zero_optimization", "stage"): (layout.zero_stage, "--zero-stage"),
        ("tensor_parallel", "autotp_size"): (layout.tp, "--tp"),
        ("train_batch_size",): (options.batch_size, "--batch-size"),
        ("train_micro_batch_size_per_gpu",): (options.micro_batch, "--micro-batch"),
        ("gradient_accumulation_steps",): (options.accumulation, "--batch-size over --micro-batch and the ranks"),
        ("bf16", "enabled"): (options.dtype == "bf16", "--dtype"),
        ("fp16", "enabled"): (options.dtype == "fp16", "--dtype"),
    }

    def kept(config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        out = {}
        for key, value in config.items():
            here = (*path, key)
            if value == AUTO:
                continue
            if any(owned[:-1] == here for owned in said) and not isinstance(value, Mapping):
                raise UsageError(f"--ds-config: {key} is {value!r}; expected an object")
            if here in said:
                wanted, flag = said[here]
                if value != wanted:
                    raise UsageError(
                        f"--ds-config: {'.'.join(here)} is {value!r}, but {flag} makes it {wanted!r}: remove the entry"
                        f" or change {flag}"
                    )
                continue
            out[key] = kept(value, here) if isinstance(value, Mapping) else value
        return out

    return replace(options, ds_config=kept(options.ds_config, ()))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid over it, key by key at every depth."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out
