"""Find the model's folder in a trainer's output: a run of steps, a step, or a folder of several models.

The layouts are those of torchtitan 0.3 (``step-N/``, the last of which may be in the Hub's form), of accelerate
and the Trainer (``checkpoint-N/pytorch_model_fsdp_I/``; ``utils/constants.py`` ``FSDP_MODEL_NAME``), of Megatron-core
0.16 (``iter_NNNNNNN/`` beside ``latest_checkpointed_iteration.txt``) and of NeMo Automodel 0.7
(``epoch_E_step_S/{model,optim}/``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsconv.checkpoint.formats.dcp.metadata import FIRST_RANK_METADATA, METADATA
from dsconv.checkpoint.formats.dcp.safetensors_shards import holds_shards
from dsconv.checkpoint.formats.huggingface.safetensors import holds_weights
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import CheckpointNotFoundError, MissingShardError
from dsconv.zero_utils.tag_folder import holds_states

STEP = re.compile(r"(?:step|checkpoint|iter)[-_](?P<step>\d{1,18})|epoch_\d{1,9}_step_(?P<of_epoch>\d{1,18})")
NESTED = re.compile(r"pytorch_model_fsdp_\d+")
OPTIMIZER = re.compile(r"optimizer_\d+")
MODEL_FOLDER = "model"  # NeMo Automodel's, beside optim/
OPTIMIZER_FOLDER = "optim"
CONSOLIDATED = "consolidated"
TRACKER = "latest_checkpointed_iteration.txt"
MAX_TRACKER_BYTES = 64


@dataclass(frozen=True)
class Found:
    """A step, or a folder without steps, that holds models.

    Attributes:
        top: The step's folder, or the folder that the user named.
        warnings: What the user must know about the choice of the step.
    """

    top: Path
    warnings: tuple[str, ...] = ()


def is_dcp(folder: Path) -> bool:
    """Return whether a folder is a whole DCP directory."""
    return (folder / METADATA).is_file() or (folder / FIRST_RANK_METADATA).is_file()


def model_folders(path: Path) -> list[Path]:
    """Return the DCP directories of models in a folder: itself, accelerate's, or NeMo's ``model/``."""
    if is_dcp(path):
        return [path]
    if not path.is_dir():
        return []
    nested = sorted(p for p in path.iterdir() if NESTED.fullmatch(p.name) and is_dcp(p))
    return nested or [p for p in (path / MODEL_FOLDER,) if is_dcp(p)]


def optimizer_folders(folder: Path) -> list[Path]:
    """Return the DCP directories of optimizers beside a model's: accelerate's, or NeMo's ``optim/``."""
    if NESTED.fullmatch(folder.name):
        return sorted(p for p in folder.parent.iterdir() if OPTIMIZER.fullmatch(p.name) and is_dcp(p))
    optimizer = folder.parent / OPTIMIZER_FOLDER
    return [optimizer] if folder.name == MODEL_FOLDER and is_dcp(optimizer) else []


def hub_folder(path: Path) -> Path | None:
    """Return the folder of a step that is in the Hub's form, or DCP's own shards of safetensors; None for neither."""
    for folder in (path, path / MODEL_FOLDER, path / MODEL_FOLDER / CONSOLIDATED):
        if folder.is_dir() and (holds_weights(folder) or holds_shards(folder)):
            return folder
    return None


def is_unfinished(path: Path) -> bool:
    """Return whether a folder, or the models in it, hold ``.distcp`` files and no ``.metadata``."""
    return bool(_headless(path))


def _headless(path: Path) -> list[Path]:
    if not path.is_dir() or model_folders(path):
        return []
    inside = [p for p in path.iterdir() if NESTED.fullmatch(p.name) or p.name == MODEL_FOLDER]
    return [folder for folder in (path, *inside) if folder.is_dir() and any(folder.glob("*.distcp"))]


def refuse_unfinished(path: Path) -> None:
    """Raise MissingShardError if the files of a save lie without the metadata that makes them a checkpoint."""
    for folder in _headless(path):
        count = sum(1 for _ in folder.glob("*.distcp"))
        raise MissingShardError(
            f"{folder}: no {METADATA} beside its {count} .distcp files. It is written last and its name is hidden: the"
            " save did not finish, or the file was left behind when the folder was copied. Copy it from where the run"
            " saved"
        )


def step_of(name: str) -> int | None:
    """Return the step in the name of a folder; None for a name of another kind."""
    match = STEP.fullmatch(name)
    return int(match["step"] or match["of_epoch"]) if match else None


def steps_in(path: Path) -> list[tuple[int, Path]]:
    """Return the folders of steps in a run's folder, whole or not, in order."""
    found = ((step_of(p.name), p) for p in path.iterdir() if STEP.fullmatch(p.name) and p.is_dir())
    return sorted((step, folder) for step, folder in found if step is not None)


def is_whole(folder: Path) -> bool:
    """Return whether a step counts: it has ``.metadata``, or weights in the Hub's form. DeepSpeed's do not count."""
    return bool(model_folders(folder)) or (not _is_deepspeed(folder) and hub_folder(folder) is not None)


def _is_deepspeed(folder: Path) -> bool:
    inside = [folder, *(p for p in folder.iterdir() if p.name.startswith("global_step"))]
    return (folder / "latest").is_file() or any(map(holds_states, inside))


def is_run(path: Path) -> bool:
    """Return whether a folder holds steps of which one is whole, or unfinished DCP."""
    steps = steps_in(path)
    if any(_is_deepspeed(folder) for _, folder in steps):
        return any(model_folders(folder) for _, folder in steps)
    return any(is_whole(folder) or is_unfinished(folder) for _, folder in steps)


def find_step(path: Path, tag: str | None) -> Found:
    """Choose the step of a run's folder.

    Args:
        path: The run's folder.
        tag: The name of the step's folder; None for the newest that is whole, or the one that Megatron's tracker names.

    Raises:
        CheckpointNotFoundError: There is no whole step of that name.
        MissingShardError: The step lacks its ``.metadata``.
    """
    steps = steps_in(path)
    whole = [(step, folder) for step, folder in steps if is_whole(folder)]
    if tag is not None:
        refuse_unfinished(path / tag)
        if path / tag not in [folder for _, folder in whole]:
            listed = ", ".join(folder.name for _, folder in whole)
            raise CheckpointNotFoundError(
                f"{path}: no checkpoint of tag {safe_repr(tag)}; choose one with --tag, or give its folder: {listed}"
            )
        return Found(path / tag)
    if not whole:
        for _, folder in reversed(steps):
            refuse_unfinished(folder)
        raise CheckpointNotFoundError(f"{path}: no step in it is whole")
    step, folder = whole[-1]
    same = [other.name for number, other in whole if number == step]
    if len(same) > 1:
        raise CheckpointNotFoundError(
            f"{path}: {' and '.join(same)} are the same step; choose one with --tag, or give its folder"
        )
    warnings = []
    tracked = _tracked(path)
    named = [(number, found) for number, found in whole if number == tracked]
    if tracked is not None and not named:
        warnings.append(f"{path / TRACKER} names iteration {tracked}, which is not whole; took {folder.name}")
    elif named and named[0][0] != step:
        warnings.append(f"{folder.name} is newer than iteration {tracked}, which {TRACKER} names; took the latter")
        step, folder = named[0]
    unfinished = [number for number, other in steps if number > step and (number, other) not in whole]
    if unfinished:
        warnings.append(
            f"{path.name} holds step {max(unfinished)} without {METADATA}: its save did not finish, or the hidden file"
            f" was not copied; took step {step}"
        )
    return Found(folder, tuple(warnings))


def _tracked(path: Path) -> int | None:
    tracker = path / TRACKER
    if not tracker.is_file() or tracker.stat().st_size > MAX_TRACKER_BYTES:
        return None
    text = tracker.read_bytes().strip()
    return int(text) if text.isdigit() else None


def folders_around(folder: Path) -> Iterator[Path]:
    """Yield the folders around one, as long as the name says that it is part of something larger."""
    inner = folder.absolute()
    while STEP.fullmatch(inner.name) or NESTED.fullmatch(inner.name) or inner.name in (MODEL_FOLDER, CONSOLIDATED):
        inner = inner.parent
        yield inner
