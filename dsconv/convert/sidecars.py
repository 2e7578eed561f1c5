"""The files beside the weights that ``from_pretrained`` needs: configuration, tokenizer, processor, custom code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.storage.local import read_small
from dsconv.errors import CheckpointNotFoundError

PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "vocab-*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template*",
    "normalizer.json",
    "sentence_bert_config.json",
    "modules.json",
)
MARKERS = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
MAX_JSON_BYTES = 256 << 20  # a manifest of a million tensors
MAX_SIDECAR_BYTES = 200 << 20  # the largest tokenizer known is 35 MB


def find_sidecars(config_from: Path | None, folders: list[Path]) -> list[Path]:
    """Return the files to copy: those of ``config_from``, or of the first of ``folders`` that has a configuration.

    Raises:
        CheckpointNotFoundError: ``config_from`` has none.
    """
    if config_from is not None:
        if not any((config_from / marker).is_file() for marker in MARKERS):
            raise CheckpointNotFoundError(
                f"{config_from}: --config-from names a folder without config.json or tokenizer files"
            )
        return _of(config_from)
    for folder in folders:
        if any((folder / marker).is_file() for marker in MARKERS):
            return _of(folder)
    return []


def _of(folder: Path) -> list[Path]:
    found = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    config = found.get("config.json")
    for name in _custom_code(config) if config else ():
        if (folder / name).is_file():
            found[name] = folder / name
    return [path for _, path in sorted(found.items()) if path.stat().st_size <= MAX_SIDECAR_BYTES]


def _custom_code(config: Path) -> list[str]:
    """Return the modules that ``auto_map`` names in the same folder (``modeling_x.XModel`` → ``modeling_x.py``)."""
    data = read_json(config)
    auto_map = data.get("auto_map") if isinstance(data, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = {name.split(".")[0] for name in flat if isinstance(name, str) and "--" not in name}
    return [f"{module}.py" for module in sorted(modules) if module.isidentifier()]


def read_json(path: Path) -> Any:
    """Return the file's JSON; None where it holds none, must not be read, or is larger than any manifest."""
    try:
        return json.loads(read_small(path, MAX_JSON_BYTES))
    except (CheckpointNotFoundError, OSError, ValueError, RecursionError):
        return None


def with_dtype(data: bytes, dtype: DType | None) -> bytes:
    """Return a config.json that names the dtype of the weights beside it, so that from_pretrained loads them as they
    are.

    Only a ``dtype`` or ``torch_dtype`` that is there is changed, also in nested configurations. The rest keeps its
    meaning.
    """
    if dtype is None:
        return data
    try:
        config = json.loads(data)
        if not isinstance(config, dict) or not _set_dtype(config, dtype.name):
            return data
        return (json.dumps(config, indent=2) + "\n").encode()
    except (ValueError, RecursionError):  # no JSON, or nested deeper than any configuration
        return data


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value in BY_NAME and value != name:
            config[key] = name
            changed = True
        elif isinstance(value, dict):
            changed |= _set_dtype(value, name)
    return changed


def untied(data: bytes) -> bytes:
    """Return a config.json that does not tie the embeddings, whose weights are apart now.

    peft ``tuners/tuners_utils.py`` (``_unload_and_optionally_merge``) does the same.
    """
    try:
        config = json.loads(data)
        if not isinstance(config, dict) or config.get("tie_word_embeddings") is False:
            return data
        return (json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n").encode()
    except (ValueError, RecursionError):  # no JSON, or nested deeper than any configuration
        return data
