"""Read directories of torch.distributed.checkpoint (DCP): ``.metadata`` and ``__R_N.distcp``.

FSDP1 (sharded state dicts), FSDP2, HSDP, tensor parallelism and any mesh of these are saved in this form, by
``dcp.save``, accelerate and the Trainer (``pytorch_model_fsdp_0/``), torchtitan (``step-N/``) and others. A chunk is a
box of its tensor, even where FSDP2 and TP both cut one dimension (``_StridedShard``): DCP writes the box that a rank's
share is, and refuses to save a share that is not a box (torch 2.13 ``default_planner.py`` ``_validate_global_plan``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.dcp.metadata import FIRST_RANK_METADATA, METADATA
from dsconv.checkpoint.formats.huggingface.config_files import find_config, find_model_folder
from dsconv.checkpoint.formats.huggingface.safetensors import holds_weights
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import CheckpointNotFoundError

STEP = re.compile(r"(?:step|checkpoint)-(?P<step>\d+)")
# accelerate 1.15 utils/constants.py FSDP_MODEL_NAME; 0 is the first model that was prepared
NESTED = re.compile(r"pytorch_model_fsdp_\d+")


def detect(root: Root, tag: str | None) -> bool:
    """Return whether the folder is a DCP directory, or holds one (a model or steps) and no weights of its own."""
    path = root.path
    if not path.is_dir():
        return False
    if tag is not None:
        return STEP.fullmatch(tag) is not None and bool(_steps(path))
    return _is_dcp(path) or (not holds_weights(path) and bool(_model_folders(path) or _steps(path)))


def read(root: Root, tag: str | None) -> Checkpoint:
    """Read the map of a DCP directory.

    Args:
        root: The directory, or a folder around it: a step, a run's folder of steps.
        tag: The step to take (``step-N``, ``checkpoint-N``); by default the newest.

    Raises:
        CheckpointNotFoundError: There is no such step, or the folder holds several models.
        DsconvError: What ``read_metadata``, ``choose`` and ``entries_of`` raise.
    """
    from dsconv.checkpoint.formats.dcp.chunks import entries_of, files_of
    from dsconv.checkpoint.formats.dcp.metadata import read_metadata
    from dsconv.checkpoint.formats.dcp.names import choose

    path: Path = root.path
    top, warnings = path, []
    if tag is not None:
        top = path / tag
        if not _model_folders(top):
            steps = ", ".join(folder.name for _, folder in sorted(_steps(path).items()))
            raise CheckpointNotFoundError(f"{path}: no checkpoint of tag {tag!r}; choose one with --tag: {steps}")
    elif not _model_folders(path):
        step, top = max(_steps(path).items())
        unfinished = [n for n, _ in _step_folders(path) if n > step]
        if unfinished:
            warnings.append(
                f"{path.name} holds step {max(unfinished)} without {METADATA}: its save did not finish; took step"
                f" {step}"
            )
    folders = _model_folders(top)
    if len(folders) > 1:
        raise CheckpointNotFoundError(f"{top} holds {len(folders)} models: give one of them, such as {folders[0]}")
    folder = folders[0]
    near = list(dict.fromkeys([top, folder, *_outer(folder)]))
    config_folder = find_model_folder(near)
    config = find_config([config_folder] if config_folder is not None else [])
    metadata = read_metadata(folder)
    names = choose(metadata.tensors, metadata.objects, metadata.paths, folder, config)
    root.fetch(folder / name for name in files_of(metadata, names.chosen))
    entries, more = entries_of(metadata, names.chosen, folder)
    info: dict[str, Any] = {"tag": top.name} if top != path else {}
    if names.removed:
        info["removed_prefixes"] = names.removed
    if names.left_out:
        info["left_out"] = dict(sorted(names.left_out.items()))
    return Checkpoint(
        path,
        "DCP",
        entries,
        folder=path if top != path else config_folder or top,
        step=_step_of(folder),
        world={"ranks": metadata.ranks} if metadata.ranks else {},
        info=info,
        warnings=(*warnings, *more),
        sources=(*metadata.files, *(folder / name for name in files_of(metadata, names.chosen))),
    )


def _is_dcp(folder: Path) -> bool:
    return (folder / METADATA).is_file() or (folder / FIRST_RANK_METADATA).is_file()


def _model_folders(path: Path) -> list[Path]:
    """Return the folder itself, or the models that accelerate has put into it."""
    if _is_dcp(path):
        return [path]
    return sorted(p for p in path.iterdir() if NESTED.fullmatch(p.name) and _is_dcp(p)) if path.is_dir() else []


def _step_folders(path: Path) -> Iterable[tuple[int, Path]]:
    return ((int(match["step"]), p) for p in path.iterdir() if (match := STEP.fullmatch(p.name)) and p.is_dir())


def _steps(path: Path) -> dict[int, Path]:
    return {step: folder for step, folder in _step_folders(path) if _model_folders(folder)}


def _outer(folder: Path) -> list[Path]:
    """Return the folders around one, as long as its name says that it is part of something larger."""
    found, inner = [], folder.absolute()
    while STEP.fullmatch(inner.name) or NESTED.fullmatch(inner.name):
        inner = inner.parent
        found.append(inner)
    return found


def _step_of(folder: Path) -> int | None:
    for part in (folder.absolute(), folder.absolute().parent):
        if match := STEP.fullmatch(part.name):
            return int(match["step"])
    return None
