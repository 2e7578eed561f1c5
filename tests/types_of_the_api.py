"""What a type checker says of a script that uses dsconv. mypy checks this file (``make types``), and nothing runs it.

mypy reports a ``type: ignore`` that it does not need, so each of them shows a fault that it finds in a user's script.
The repository's settings skip torch's own types. Where they are read, ``dtype="int8"`` is a fault too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import assert_type

import dsconv


def merge_and_read_the_report(run: Path, dtype: torch.dtype) -> None:
    report = dsconv.merge(run, "out", dtype="bf16")
    assert_type(report, dsconv.MergeReport)
    assert_type(report.tensors, int)
    assert_type(report.loadable, bool | None)
    assert_type(report.missing, list[str])
    assert_type(report.warnings, list[str])
    dsconv.merge(run, dtype=dtype, weights="16bit", names="hf")
    dsconv.merge(run, dtype=torch.bfloat16)
    dsconv.to_dcp(run, "out", dtype="float32", names="torchtitan")
    chosen: Literal["fp16", "bf16"] = "fp16" if report.nonfinite else "bf16"
    dsconv.merge(run, dtype=chosen)


def read_other_reports(a: Path, b: Path) -> None:
    assert_type(dsconv.verify(a, b, allow_cast=True).equal, bool)
    assert_type([distance.name for distance in dsconv.diff(a, b).tensors], list[str])
    assert_type(dsconv.push(a, "org/model", private=True).commit, str | None)
    assert_type(dsconv.to_universal(a, b).tensors, int)
    checkpoint = dsconv.open_checkpoint(a)
    assert_type(checkpoint["w"].shape, tuple[int, ...])
    assert_type([entry.role for entry in checkpoint.values()], list[str])


def load_into_models(mesh: Any, config: dict[str, Any]) -> None:
    dsconv.load_zero3("org/model", ds_config=config)
    dsconv.load_tp("org/model", device_mesh=mesh)
    assert_type(dsconv.stream_into(torch.nn.Linear(2, 2), "run").bytes_read, int)


def catch_errors(run: Path) -> str:
    try:
        return str(dsconv.open_checkpoint(run).format)
    except dsconv.errors.MissingShardError as error:
        return str(error)
    except dsconv.DsconvError as error:
        return f"{error.exit_code}: {error}"


def mistakes_that_are_found(run: Path) -> None:
    dsconv.merge(run, dtpye="bf16")  # type: ignore[call-arg]
    dsconv.merge(run, weights="16-bit")  # type: ignore[arg-type]
    dsconv.merge(run, names="torchtitan")  # type: ignore[arg-type]
    dsconv.mrege(run)  # type: ignore[attr-defined]
    dsconv.merge(run).missin  # type: ignore[attr-defined]  # noqa: B018
    dsconv.errors.MisingShardError  # type: ignore[attr-defined]  # noqa: B018
