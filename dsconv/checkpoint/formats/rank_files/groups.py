"""Find the files of one save among the rank files of a folder, by their names.

The names are those of verl 0.6 ``utils/checkpoint/fsdp_checkpoint_manager.py``, accelerate ``utils/fsdp_utils.py``
and plain scripts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.checks import RANK_FILE
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, SeveralModelsError

VERL = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
ACCELERATE = re.compile(r"(pytorch_model_fsdp(?:_\d+)?)_rank(\d+)\.bin")
NOT_MODELS = re.compile(r"optim|extra_state|scheduler|rng|random|dataloader|trainer", re.IGNORECASE)
ROLES = ("actor", "critic")  # verl's folders in global_step_N
MAX_RANK_DIGITS = 7
MAX_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class Group:
    """The files of one save. ``world`` is the number of ranks in their names; None if the names have none."""

    kind: str
    name: str
    files: dict[int, Path]
    world: int | None = None


def is_rank_file(path: Path) -> bool:
    """Return whether a file is one rank's of several.

    A name such as ``lora_rank_16.pt`` may mean something else, so the ranks must begin with 0 where the names do not
    say how many there are.
    """
    return any(
        path in group.files.values() and (group.world is not None or 0 in group.files)
        for group in groups_in(path.parent).values()
    )


def homes_in(path: Path) -> list[Path]:
    """Return the folders with rank files: ``path``, or those of verl's roles in it."""
    if not path.is_dir():
        return []
    if groups_in(path):
        return [path]
    return [folder for folder in (path / role for role in ROLES) if folder.is_dir() and groups_in(folder)]


def pick_home(path: Path, item: str | None) -> tuple[Path, str | None]:
    """Return the folder with the rank files that are meant, and the item that is wanted of what they hold.

    Args:
        path: The folder that the user named.
        item: The role (``actor``, ``critic``) that is wanted, if there are several.

    Raises:
        SeveralModelsError: There are several roles, and ``item`` is None.
        CheckpointNotFoundError: The role does not exist.
    """
    homes = homes_in(path)
    if len(homes) < 2:
        return (homes[0] if homes else path), item
    if item is None:
        raise SeveralModelsError(path, {home.name: 0 for home in homes})
    for home in homes:
        if home.name == item:
            return home, None
    raise CheckpointNotFoundError(
        f"{path}: no model is called {safe_repr(item)}; it holds {', '.join(home.name for home in homes)}"
    )


def groups_in(folder: Path) -> dict[str, Group]:
    """Return the rank files of models in a folder, grouped by save."""
    groups: dict[str, Group] = {}
    for path in sorted(folder.iterdir()):
        for pattern, kind in (
            (VERL, "verl rank files"),
            (ACCELERATE, "accelerate rank files"),
            (RANK_FILE, "rank files"),
        ):
            match = pattern.fullmatch(path.name)
            if match is None or len(match[2]) > MAX_RANK_DIGITS or NOT_MODELS.search(path.name):
                continue
            world = int(match[1]) if pattern is VERL else None
            name = f"model_world_size_{world}" if pattern is VERL else match[1].rstrip("_.-") or "rank"
            files = groups.setdefault(name, Group(kind, name, {}, world)).files
            if int(match[2]) in files:
                raise InconsistentCheckpointError(
                    f"{path} and {files[int(match[2])].name} both claim rank {int(match[2])}; keep one of them"
                )
            files[int(match[2])] = path
            break
    return groups


def choose_group(path: Path, home: Path, item: str | None, warnings: list[str]) -> tuple[Group, str | None]:
    """Return the files of one save, and the item that is wanted of what they hold.

    Args:
        path: What the user named: the folder, or one file of the save that is meant.
        home: The folder with the files.
        item: The name of the group that is wanted, if there are several.
        warnings: Warnings are added.

    Raises:
        InconsistentCheckpointError: There are several saves, and nothing says which is meant.
    """
    groups = groups_in(home)
    chosen = [group for group in groups.values() if path in group.files.values()] or list(groups.values())
    if len(chosen) == 1:
        return chosen[0], item
    if item in groups:
        return groups[item], None
    recorded = _verl_world(home)
    last = [group for group in chosen if group.world is not None and group.world == recorded]
    if last:
        others = ", ".join(group.name for group in chosen if group is not last[0])
        warnings.append(
            f"ignored the files of {others}: fsdp_config.json says that {recorded} ranks wrote the last save"
        )
        return last[0], item
    raise InconsistentCheckpointError(
        f"{home}: rank files of {len(groups)} saves: {', '.join(groups)}. Choose one with --item, such as --item"
        f" {next(iter(groups))}, or name a file of it, such as {next(iter(chosen[0].files.values())).name}, in place"
        " of the folder"
    )


def _verl_world(folder: Path) -> Any:
    settings = folder / "fsdp_config.json"
    try:
        if settings.stat().st_size > MAX_SETTINGS_BYTES:
            return None
        world = load_json(settings.read_bytes()).get("world_size")
    except (OSError, ValueError, AttributeError):
        return None
    return world if type(world) is int else None
