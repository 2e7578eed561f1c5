"""Read directories of torch.distributed.checkpoint (DCP): ``.metadata`` and ``__R_N.distcp``.

FSDP1 (sharded state dicts), FSDP2, HSDP, tensor parallelism and any mesh of these are saved in this form, by
``dcp.save``, accelerate and the Trainer (``pytorch_model_fsdp_0/``), torchtitan (``step-N/``), Megatron-core
(``iter_NNNNNNN/``), NeMo Automodel (``epoch_E_step_S/model/``) and others. A chunk is a box of its tensor, even where
FSDP2 and TP both cut one dimension (``_StridedShard``): DCP writes the box that a rank's share is, and refuses to save
a share that is not a box (torch ``default_planner.py`` ``_validate_global_plan``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import CONFIG, MARKERS, find_config
from dsconv.checkpoint.formats.checks import check_not_hollow
from dsconv.checkpoint.formats.dcp import safetensors_shards
from dsconv.checkpoint.formats.dcp.metadata import read_metadata
from dsconv.checkpoint.formats.dcp.steps import (
    STEP,
    find_step,
    folders_around,
    hub_folder,
    is_dcp,
    is_run,
    is_unfinished,
    model_folders,
    refuse_unfinished,
    step_of,
)
from dsconv.checkpoint.formats.huggingface import safetensors
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.roots import Root
from dsconv.errors import CheckpointNotFoundError, SeveralModelsError


def detect(root: Root, tag: str | None) -> bool:
    """Return whether the folder is a DCP directory, or holds one (a model or steps) and no weights of its own."""
    path: Path = root.path
    if not path.is_dir():
        return False
    if tag is not None:
        return STEP.fullmatch(tag) is not None and is_run(path)
    if is_dcp(path):
        return True
    return not safetensors.holds_weights(path) and bool(
        model_folders(path) or is_unfinished(path) or _in_model_folder(path) or is_run(path)
    )


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the map of a DCP directory.

    Args:
        root: The directory, or a folder around it: a step, a run's folder of steps.
        tag: The step to take (``step-N``, ``checkpoint-N``, ``iter_N``, ``epoch_E_step_S``); by default the newest.
        item: The key of the model to take, if there are several.

    Raises:
        CheckpointNotFoundError: The step or the item does not exist.
        SeveralModelsError: There are several models, and ``item`` is None.
        MissingShardError: A file is missing, or the save has no ``.metadata``.
        DsconvError: What ``read_metadata``, ``choose`` and ``entries_of`` raise.
    """
    from dsconv.checkpoint.formats.dcp.chunks import entries_of, files_of
    from dsconv.checkpoint.formats.dcp.names import choose, leaves_of
    from dsconv.checkpoint.formats.dcp.training import Model, optimizers_of, read_training
    from dsconv.checkpoint.formats.dcp.values import Directory

    path: Path = root.path
    top, warnings = path, tuple[str, ...]()
    if tag is not None or not (model_folders(path) or is_unfinished(path) or _in_model_folder(path)):
        found = find_step(path, tag)
        top, warnings = found.top, found.warnings
    refuse_unfinished(top)
    folders = model_folders(top)
    if not folders:
        return _read_hub_form(root, top, warnings)
    folder, item = _pick(top, folders, item)
    near = list(dict.fromkeys([top, folder, *folders_around(folder)]))
    marker = find_config(near, MARKERS)
    config_folder = marker.parent if marker is not None else None
    config = marker if marker is not None and marker.name == CONFIG else None
    metadata = read_metadata(folder)
    leaves = leaves_of(metadata)
    names = choose(leaves, folder, config, item)
    root.fetch(folder / name for name in files_of(metadata, names.chosen))
    entries, more = entries_of(metadata, names.chosen, folder)
    more += check_not_hollow(entries, folder, [*near, folder.absolute().parent])
    info: dict[str, Any] = {"tag": top.name} if top != path else {}
    if names.removed:
        info["removed_prefixes"] = names.removed
    if names.left_out:
        info["left_out"] = dict(sorted(names.left_out.items()))
    if len(folders) > 1:
        info |= {"item": folder.name, "models": {each.name: len(read_metadata(each).tensors) for each in folders}}
    elif len(names.models) > 1 or item is not None:
        info |= {"item": names.key, "models": names.models}
    stored = {".".join(leaves[flat].path[len(names.path) :]): name for flat, name in names.chosen.items()}
    directory = Directory(folder, metadata, leaves, names.holders)
    others = tuple(key for key in names.models if key != names.key)
    model = Model(entries, stored, names.path, directory, top, _step(folder), config, others)
    open_optimizers, no_training = optimizers_of(directory, names, len(folders))
    return Checkpoint(
        path,
        "DCP",
        entries,
        folder=path if top != path else config_folder or top,
        step=_step(folder),
        world={"ranks": metadata.ranks} if metadata.ranks else {},
        info=info,
        warnings=(*warnings, *names.warnings, *more),
        sources=(*metadata.files, *(folder / name for name in files_of(metadata, names.chosen))),
        training=partial(read_training, model, open_optimizers, root.fetch) if open_optimizers is not None else None,
        no_training=no_training,
    )


def _in_model_folder(path: Path) -> bool:
    """Return whether a folder is NeMo Automodel's step in the Hub's form: weights in ``model/`` beside ``optim/``."""
    inner = hub_folder(path)
    return inner is not None and inner != path and (path / "optim").is_dir()


def _pick(top: Path, folders: list[Path], item: str | None) -> tuple[Path, str | None]:
    """Return the folder of the model, and the item that is wanted from it."""
    if len(folders) == 1:
        return folders[0], item
    if item is None:
        raise SeveralModelsError(top, {folder.name: len(read_metadata(folder).tensors) for folder in folders})
    folder = next((folder for folder in folders if folder.name == item), None)
    if folder is None:
        listed = ", ".join(folder.name for folder in folders)
        raise CheckpointNotFoundError(f"{top}: no model is called {item!r:.100}; it holds {listed}")
    return folder, None


def _read_hub_form(root: Root, top: Path, warnings: tuple[str, ...]) -> Checkpoint:
    """Read a step that was saved in the Hub's form: safetensors, or DCP's own shards of them."""
    folder = hub_folder(top)
    if folder is None:
        raise CheckpointNotFoundError(f"{top}: no model in it")
    path: Path = root.path
    kind = safetensors_shards if safetensors_shards.holds_shards(folder) else safetensors
    found = kind.read_folder(folder, root.fetch)
    config = find_config([folder, *folders_around(folder), top])
    return Checkpoint(
        path,
        found.format,
        found,
        folder=path if top != path else config.parent if config is not None else top,
        step=_step(folder),
        world=found.world,
        info=({"tag": top.name} if top != path else {}) | found.info,
        warnings=(*warnings, *found.warnings),
        sources=found.sources,
    )


def _step(folder: Path) -> int | None:
    """Return the step in the name of the folder, or of a folder around it."""
    here = folder.absolute()
    names = (part.name for part in (here, here.parent, here.parent.parent))
    return next((step for name in names if (step := step_of(name)) is not None), None)
