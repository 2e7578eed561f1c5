"""The table that validation fills: a row for each layout and dtype, a column for each thing done with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dsconv.engine.options import Layout
from dsconv.errors import UsageError
from dsconv.text import count

COLUMNS = ("in place", "another world", "another stage", "convert", "load back")
FAULTS = ("drop-exp-avg", "reset-rng", "skip-batch", "swap-shards", "stale-latest")


@dataclass(frozen=True)
class Scenario:
    """A layout and dtype to validate: one row of the table.

    ``settings`` are further options of the run. ``targets`` gives, for the columns that resume in another layout, that
    layout, or the reason why there is none.
    """

    name: str
    layout: Layout
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Layout | str] = field(default_factory=dict)


def scenarios(nproc: int, quick: bool, wanted: tuple[str, ...] = ()) -> list[Scenario]:
    """Return the scenarios for ``nproc`` ranks, all or those named in ``wanted``.

    Raises:
        UsageError: ``wanted`` holds an unknown name, or ``nproc`` is odd.
    """
    found = {scenario.name: scenario for scenario in (_quick(nproc) if quick and not wanted else _all(nproc))}
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise UsageError(f"--cells {','.join(unknown)}: with {count(nproc, 'rank')} the rows are {', '.join(found)}")
    return [found[name] for name in wanted or found]


def _quick(nproc: int) -> list[Scenario]:
    names = ("zero1-bf16", "zero3-fp32", "tp2-fp32", "native-fp32")
    return [scenario for scenario in _all(nproc) if scenario.name in names]


def _all(nproc: int) -> list[Scenario]:
    if nproc < 2 or nproc % 2:
        raise UsageError(f"--nproc {nproc}: validation needs an even number of ranks, at least 2")
    base = Layout(nproc=nproc)
    made = [_zero(base, stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")]
    made.append(replace(_zero(base, 3, "fp32"), name="zero3-offload-fp32", settings={"offload": "cpu"}))
    made.append(
        replace(_zero(base, 2, "bf16"), name="zero2-checkpointing-bf16", settings={"activation_checkpointing": True})
    )

    def moved(name: str, layout: Layout, dtype: str, stage: int) -> Scenario:
        targets: dict[str, Layout | str] = {**half, "another stage": replace(base, zero_stage=stage)}
        return Scenario(name, layout, dtype, {}, targets)

    half = {"another world": replace(base, zero_stage=1, nproc=nproc // 2)}
    made += [
        moved("tp2-fp32", replace(base, tp=2, zero_stage=1), "fp32", 3),
        moved("tp2-zero3-fp32", replace(base, tp=2, zero_stage=3), "fp32", 2),
        moved("pp2-fp32", replace(base, pp=2, zero_stage=1), "fp32", 2),
        moved("pp2-bf16", replace(base, pp=2, zero_stage=1), "bf16", 3),
        moved("sp2-fp32", replace(base, sp=2, zero_stage=3), "fp32", 1),
    ]
    return [*made, *_native(replace(base, backend="native", zero_stage=0))]


def _native(native: Layout) -> list[Scenario]:
    other = replace(native, nproc=native.nproc // 2, fsdp=native.nproc > 2)

    def moved(name: str, layout: Layout, dtype: str, target: Layout | str) -> Scenario:
        return Scenario(name, layout, dtype, {}, {"another world": other, "another stage": target})

    made = [
        moved("native-fp32", native, "fp32", replace(native, tp=2)),
        moved("native-bf16", native, "bf16", "FSDP2 has no stages"),
        moved("native-ddp-fp32", replace(native, fsdp=False), "fp32", native),
    ]
    if native.nproc >= 4:
        made.append(moved("native-tp2-fp32", replace(native, tp=2), "fp32", native))
    return made


def _zero(base: Layout, stage: int, dtype: str) -> Scenario:
    layout = replace(base, zero_stage=stage)
    other = replace(layout, nproc=base.nproc // 2)
    stages = replace(layout, zero_stage=(3, 0, 1, 1)[stage])
    return Scenario(f"zero{stage}-{dtype}", layout, dtype, {}, {"another world": other, "another stage": stages})
