"""The files beside the weights that ``from_pretrained`` needs: configuration, tokenizer, processor, custom code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import MAX_CONFIG_BYTES
from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.storage.local import MAX_SMALL_BYTES, is_remote, read_small, why_unread
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, MalformedError

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
DECISIVE = ("config.json", "adapter_config.json")  # without them nothing says what the weights are of
MAX_MANIFEST_BYTES = 256 << 20  # a manifest of a million tensors
MAX_SIDECAR_BYTES = MAX_SMALL_BYTES


@dataclass
class Sidecars:
    """The files to copy, and {name: why} of those that are left out although they lie there."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_sidecars(config_from: Path | None, folders: list[Path]) -> Sidecars:
    """Return the files to copy: those of ``config_from``, or of the first of ``folders`` that has a configuration.

    Raises:
        CheckpointNotFoundError: ``config_from`` has none.
        MalformedError: A configuration lies there and cannot be read. Another folder's is not taken in its place.
    """
    found = Sidecars()
    for folder in [config_from] if config_from is not None else folders:
        require_readable(folder, DECISIVE)
        for path in _matching(folder):
            if why := why_unread(path, MAX_SIDECAR_BYTES):
                found.left_out.setdefault(path.name, why)
        if any((folder / marker).is_file() for marker in MARKERS):
            found.files = [path for path in _matching(folder) if path.is_file() and path.name not in found.left_out]
            return found
    if config_from is not None:
        raise CheckpointNotFoundError(
            f"{config_from}: --config-from names a folder without config.json or tokenizer files"
        )
    return found


def require_readable(folder: Path, names: tuple[str, ...]) -> None:
    """Raise MalformedError if one of the configurations ``names`` lies in ``folder`` and cannot be read."""
    for name in names:
        if why := why_unread(folder / name, MAX_CONFIG_BYTES):
            raise MalformedError(
                f"{folder / name}: {why}. It should say what the weights are of: replace it, or name the model's own"
                " folder with --config-from"
            )


def _matching(folder: Path) -> list[Path]:
    """Return what the patterns and the configuration's ``auto_map`` name in a folder, but folders without a suffix."""
    found = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern)}
    config = folder / "config.json"
    for name in _custom_code(config) if config.is_file() else ():
        if (folder / name).exists() or (not is_remote(folder) and (folder / name).is_symlink()):
            found[name] = folder / name
    return [path for _, path in sorted(found.items()) if path.suffix or not path.is_dir()]


def _custom_code(config: Path) -> list[str]:
    """Return the modules that ``auto_map`` names in the same folder (``modeling_x.XModel`` → ``modeling_x.py``)."""
    data = read_json(config)
    auto_map = data.get("auto_map") if isinstance(data, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = {name.split(".")[0] for name in flat if isinstance(name, str) and "--" not in name}
    return [f"{module}.py" for module in sorted(modules) if module.isidentifier()]


def read_json(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """Return the file's JSON, or None if it holds none, must not be read, or is larger than ``limit_bytes``."""
    try:
        return load_json(read_small(path, limit_bytes))
    except (CheckpointNotFoundError, OSError, ValueError):
        return None


def with_dtype(data: bytes, dtype: DType | None) -> bytes:
    """Return a config.json with the dtype of the weights beside it, so that from_pretrained loads them unchanged.

    Only an existing ``dtype`` or ``torch_dtype`` is changed, also in nested configurations. The rest keeps its meaning.
    """
    if dtype is None:
        return data
    try:
        config = load_json(data)
        if not isinstance(config, dict) or not _set_dtype(config, dtype.name):
            return data
        return (json.dumps(config, indent=2) + "\n").encode()
    except ValueError:  # no JSON, or nested deeper than any configuration
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


def with_vocabulary(data: bytes, path: Path, old: int, new: int) -> bytes:
    """Return a config.json whose vocabulary has ``new`` tokens in the place of ``old``.

    transformers ``modeling_utils.py`` ``resize_token_embeddings`` does the same.

    Raises:
        InconsistentCheckpointError: Its vocabulary has another size, so what was resized is no embedding.
    """
    try:
        config = load_json(data)
    except ValueError:  # no JSON, or nested deeper than any configuration
        config = None
    places = [config, config.get("text_config")] if isinstance(config, dict) else []
    fitting = [place for place in places if isinstance(place, dict) and place.get("vocab_size") in (old, new)]
    for place in fitting:
        place["vocab_size"] = new
    if not fitting:
        raise InconsistentCheckpointError(
            f"{path}: the adapter has tensors of {new} rows where the base has {old}, and no vocab_size here is {old}:"
            " the adapter belongs to another base"
        )
    return (json.dumps(config, indent=2) + "\n").encode()


def untied(data: bytes) -> bytes:
    """Return a config.json that does not tie the embeddings, whose weights are apart now.

    peft ``tuners/tuners_utils.py`` (``_unload_and_optionally_merge``) does the same.
    """
    try:
        config = load_json(data)
        if not isinstance(config, dict) or config.get("tie_word_embeddings") is False:
            return data
        return (json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n").encode()
    except ValueError:  # no JSON, or nested deeper than any configuration
        return data


def without_scheme(data: bytes) -> bytes:
    """Return a config.json that does not say any more that the weights are quantized."""
    try:
        config = load_json(data)
        if not isinstance(config, dict) or "quantization_config" not in config:
            return data
        del config["quantization_config"]
        return (json.dumps(config, indent=2) + "\n").encode()
    except ValueError:  # no JSON, or nested deeper than any configuration
        return data
