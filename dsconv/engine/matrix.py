"""What validation runs: layouts and dtypes for rows, what is done with their checkpoints for columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dsconv.engine.options import Layout
from dsconv.errors import UsageError

COLUMNS = ("in place", "another world", "another stage", "convert", "load back")
SABOTAGES = ("drop-exp-avg", "reset-rng", "skip-batch", "swap-shards", "stale-latest")


@dataclass(frozen=True)
class Row:
    """A layout and dtype. ``targets``: the layout of the columns that resume elsewhere, or why there is none."""

    name: str
    layout: Layout
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Layout | str] = field(default_factory=dict)


def rows(nproc: int, quick: bool, wanted: tuple[str, ...] = ()) -> list[Row]:
    """The rows for ``nproc`` ranks; ``wanted`` picks some by name. Raises UsageError for a name that is none."""
    found = {row.name: row for row in (_quick(nproc) if quick and not wanted else _all(nproc))}
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise UsageError(f"--cells {','.join(unknown)}: with {nproc} ranks there are {', '.join(found)}")
    return [found[name] for name in wanted or found]


def _quick(nproc: int) -> list[Row]:
    names = ("zero1-bf16", "zero3-fp32", "tp2-fp32", "native-fp32")
    return [row for row in _all(nproc) if row.name in names]


def _all(nproc: int) -> list[Row]:
    if nproc < 2 or nproc % 2:
        raise UsageError(f"--nproc {nproc}: validation takes an even number of ranks, 2 or more")
    base = Layout(nproc=nproc)
    made = [_zero(base, stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")]
    made.append(replace(_zero(base, 3, "fp32"), name="zero3-offload-fp32", settings={"offload": "cpu"}))
    made.append(
        replace(_zero(base, 2, "bf16"), name="zero2-checkpointing-bf16", settings={"activation_checkpointing": True})
    )
    half = {"another world": replace(base, zero_stage=1, nproc=nproc // 2)}
    made += [
        Row(
            "tp2-fp32",
            replace(base, tp=2, zero_stage=1),
            "fp32",
            {},
            {**half, "another stage": replace(base, zero_stage=3)},
        ),
        Row(
            "tp2-zero3-fp32",
            replace(base, tp=2, zero_stage=3),
            "fp32",
            {},
            {**half, "another stage": replace(base, zero_stage=2)},
        ),
        Row(
            "pp2-fp32",
            replace(base, pp=2, zero_stage=1),
            "fp32",
            {},
            {**half, "another stage": replace(base, zero_stage=2)},
        ),
        Row(
            "pp2-bf16",
            replace(base, pp=2, zero_stage=1),
            "bf16",
            {},
            {**half, "another stage": replace(base, zero_stage=3)},
        ),
        Row(
            "sp2-fp32",
            replace(base, sp=2, zero_stage=3),
            "fp32",
            {},
            {**half, "another stage": replace(base, zero_stage=1)},
        ),
    ]
    native = replace(base, backend="native", zero_stage=0)
    none = "FSDP2 has no stages"
    other = replace(native, nproc=nproc // 2, fsdp=nproc > 2)
    made.append(
        Row("native-fp32", native, "fp32", {}, {"another world": other, "another stage": replace(native, tp=2)})
    )
    made.append(Row("native-bf16", native, "bf16", {}, {"another world": other, "another stage": none}))
    made.append(
        Row(
            "native-ddp-fp32",
            replace(native, fsdp=False),
            "fp32",
            {},
            {"another world": other, "another stage": native},
        )
    )
    if nproc >= 4:
        made.append(
            Row("native-tp2-fp32", replace(native, tp=2), "fp32", {}, {"another world": other, "another stage": native})
        )
    return made


def _zero(base: Layout, stage: int, dtype: str) -> Row:
    layout = replace(base, zero_stage=stage)
    other = replace(layout, nproc=base.nproc // 2)
    stages = replace(layout, zero_stage=(3, 0, 1, 1)[stage])
    return Row(f"zero{stage}-{dtype}", layout, dtype, {}, {"another world": other, "another stage": stages})
