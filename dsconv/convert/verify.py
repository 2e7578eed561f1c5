"""``verify``: are two checkpoints, of any formats, equal tensor by tensor, byte by byte?"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dsconv.checkpoint.config_files import find_config as config_near
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME, OUTPUTS, DType
from dsconv.checkpoint.opening import open_two
from dsconv.convert.compare import CompareOptions, VerifyReport, compare
from dsconv.convert.filters import Filters
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.plan import find_config
from dsconv.convert.progress import Progress
from dsconv.convert.sidecars import MAX_MANIFEST_BYTES, read_json
from dsconv.convert.verify_training import compare_training
from dsconv.errors import UsageError
from dsconv.names.choosing import names_of, with_hf_names
from dsconv.names.marks import HF


def verify(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    allow_cast: bool = False,
    subset: bool = False,
    revision: str | None = None,
    item: str | None = None,
    item_b: str | None = None,
    follow_links: bool = False,
    renamed: Mapping[str, str] | None = None,
    optimizer: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare every tensor of ``a`` and ``b`` as raw bytes, streaming, in two blocks of memory.

    A tied name counts as present under each of its names.

    Args:
        a: a path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        b: the other one.
        allow_cast: a float of another dtype in ``b`` must be ``a``'s, cast once to nearest even.
        subset: tensors that only ``a`` has are not differences.
        revision: that of the one, or of both, that lie on the Hub.
        item: the key of the model to compare, where ``a`` or ``b`` holds several.
        item_b: the key of the model of ``b``, where it is another.
        follow_links: read what links lead to that leave the folders.
        renamed: {name in ``b``: name in ``a``}. Without it the filters that the manifest of ``b`` keeps are followed
            (``--include``, ``--exclude``, ``--strip-prefix``, ``--rename``), and Hugging Face's names are given to
            ``a`` where the merge of ``b`` gave them (``--names``).
        optimizer: compare the optimizers too: states, step counts and hyperparameters (``verify_training.py``).
        progress: called with ("verify", bytes done, bytes in all).

    Raises:
        DsconvError: what ``open_checkpoint`` raises. UnsupportedError where one holds no optimizer that is read.
    """
    first, second = open_two(a, b, revision=revision, item=item, item_b=item_b, follow_links=follow_links)
    options = CompareOptions(allow_cast, subset, renamed or {}, progress=progress)
    if renamed is not None:
        return _compared(first, second, options, optimizer)
    manifest = read_json(second.path / MANIFEST, MAX_MANIFEST_BYTES) if second.path.is_dir() else None
    noted: dict[str, Any] = manifest if isinstance(manifest, dict) else {}
    if _gave_hf_names(noted) and names_of(first):
        first = with_hf_names(first, find_config([second.path]))
    if (dtype := _dequantized_to(noted)) is not None:
        from dsconv.convert.fp8 import dequantized

        first = dequantized(first, config_near([first.path, first.folder]), dtype)
    filters, names, left_out = _noted(first, noted)
    report = _compared(first, second, replace(options, renamed=names, left_out=left_out), optimizer)
    report.filters = filters
    return report


def _compared(first: Checkpoint, second: Checkpoint, options: CompareOptions, optimizer: bool) -> VerifyReport:
    report = compare(first, second, options)
    if optimizer:
        compare_training(first, second, options, report)
    return report


def _gave_hf_names(manifest: Mapping[str, Any]) -> bool:
    """Return whether the merge that wrote a manifest gave the tensors Hugging Face's names."""
    source = manifest.get("source")
    names = source.get("names") if isinstance(source, dict) else None
    return isinstance(names, dict) and names.get("to") == HF


def _dequantized_to(manifest: Mapping[str, Any]) -> DType | None:
    """Return the dtype that FP8 weights were given in the merge that wrote a manifest; None where it gave none."""
    source = manifest.get("source")
    name = source.get("dequantized") if isinstance(source, dict) else None
    return BY_NAME.get(name) if isinstance(name, str) and name in OUTPUTS else None


def _noted(
    first: Checkpoint, manifest: Mapping[str, Any]
) -> tuple[dict[str, list[str]] | None, Mapping[str, str], Collection[str]]:
    """Return the filters that the manifest of a merge keeps, the names it gave, and what it left out."""
    filters = Filters.read(manifest.get("filters"))
    if not filters:
        return None, {}, ()
    try:
        left_out = {old for old, new in filters.names(first).items() if new is None}
    except UsageError:
        return None, {}, ()  # of another source: every difference is shown
    tensors = manifest.get("tensors")
    noted = tensors.items() if isinstance(tensors, dict) else ()
    sources = {name: item.get("source") for name, item in noted if isinstance(item, dict)}
    names = {name: source for name, source in sources.items() if isinstance(source, str)}
    return filters.to_dict(), names, left_out
