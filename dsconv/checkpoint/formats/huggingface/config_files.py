"""Where the configuration of a model lies, and what it says: the one search for config.json that all formats share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG = "config.json"
# Any of these marks a folder as the one that from_pretrained was or will be pointed at.
MARKERS = (CONFIG, "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
MAX_CONFIG_BYTES = 8 << 20  # the largest config.json known has some 100 kB


def find_config(folders: Iterable[Path]) -> Path | None:
    """Return the config.json of the first of ``folders`` that has one; None where none has."""
    return next((path for folder in folders if (path := folder / CONFIG).is_file()), None)


def find_model_folder(folders: Iterable[Path]) -> Path | None:
    """Return the first of ``folders`` that holds a configuration or a tokenizer; None where none does."""
    return next((folder for folder in folders if any((folder / name).is_file() for name in MARKERS)), None)


def read_config(path: Path) -> dict[str, Any] | None:
    """Read a config.json; None where it cannot be read, is not a JSON object, or is larger than any configuration."""
    try:
        data = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
