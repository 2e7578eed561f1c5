"""Find the configuration of a checkpoint's model: one rule for every format and destination.

Trainers put ``config.json`` beside the weights, one level up (the Trainer's run folder, the folder of a DeepSpeed tag),
or in a folder inside: verl writes ``huggingface/`` and NeMo Automodel ``.hf_metadata/``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.errors import CheckpointNotFoundError, MalformedError

CONFIG = "config.json"
# Any of these files marks a folder that from_pretrained is meant to load.
MARKERS = (CONFIG, "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
MAX_CONFIG_BYTES = 8 << 20  # the largest known config.json has about 100 kB
INSIDE = ("huggingface", ".hf_metadata")


def find_config(folders: Iterable[Path], names: str | Iterable[str] = CONFIG) -> Path | None:
    """Return the first of the files ``names`` that lies in or near ``folders``.

    Each folder is searched in turn, first the folder itself and then its subfolders ``INSIDE``. The parent of the last
    folder comes at the end.

    Args:
        folders: The folders to search, the most likely one first.
        names: One file name, or several, of which any one is enough.

    Returns:
        The path of the file, or None if there is none.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    return next(
        (folder / name for folder in config_folders(folders) for name in wanted if (folder / name).is_file()), None
    )


def config_folders(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that ``find_config`` searches for ``folders``, in its order and without repetition."""
    given = list(folders)
    searched = [near for folder in given for near in (folder, *(folder / name for name in INSIDE))]
    if given:
        searched.append(given[-1].absolute().parent)
    return list(dict.fromkeys(searched))


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a config.json, or None if it is not one, or is larger than any configuration."""
    try:
        return load_config(path)
    except (CheckpointNotFoundError, MalformedError, OSError):
        return None


def load_config(path: Path) -> dict[str, Any]:
    """Return the JSON object of a config.json.

    Raises:
        MalformedError: It is not one, or is larger than any configuration.
        CheckpointNotFoundError: It does not exist.
        UnsafeError: A link leads to it from another folder.
        RemoteError: A store or the Hub cannot be reached.
    """
    data = read_small(path, MAX_CONFIG_BYTES)
    try:
        found = load_json(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise MalformedError(f"{path}: not a JSON object")
    return found
