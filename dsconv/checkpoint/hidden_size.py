"""A model's hidden size, which the "auto" sizes of a DeepSpeed config follow from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import MAX_CONFIG_BYTES
from dsconv.checkpoint.storage import hub
from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, UnsupportedError
from dsconv.urls import local_path
from dsconv.zero_utils.config_auto import hidden_size_of


def read_hidden_size(model: str, revision: str | None = None) -> int:
    """Return the hidden size that a model's ``config.json`` states.

    Many configurations give it another name (``n_embd``, ``d_model``), or leave it out if it is their class's default.
    So transformers is asked if it is installed and knows the model; it runs no code from the repository.

    Args:
        model: A folder with a ``config.json``, that file, or a repository of the Hub, from which only that file is
            downloaded.
        revision: A branch, tag or commit of the Hub.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        MalformedError: The file is not JSON, or no object.
        RemoteError: The Hub or the network fails.
        UnsupportedError: The configuration states no size.
    """
    path = local_path(model, "the model's configuration")
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        if path.name != "config.json" and hub.is_repo(model):
            path = hub.fetch_config(model, revision)
        else:
            raise CheckpointNotFoundError(
                f"{path}: no such file; --model is a folder with config.json, that file, or org/model"
            )
    try:
        config = load_json(read_small(path, MAX_CONFIG_BYTES))
    except DsconvError:
        raise
    except ValueError as error:
        raise MalformedError(f"{path}: the model's configuration is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise MalformedError(f"{path}: the model's configuration is {type(config).__name__}; expected an object")
    size = (
        hidden_size_of({"hidden_size": config.get("hidden_size")})
        or hidden_size_of(_known_to_transformers(path))
        or hidden_size_of(config)
    )
    if size is None:
        raise UnsupportedError(
            f"{path}: neither hidden_size nor hidden_sizes, there or in text_config; write numbers in place of the "
            '"auto" sizes of zero_optimization'
        )
    return size


def _known_to_transformers(path: Path) -> Any:
    """Return the configuration as transformers reads it; None if it is not installed or does not know the model."""
    try:
        from transformers import AutoConfig, logging
    except ImportError:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception:  # noqa: BLE001 - a configuration can make transformers raise anything
        return None
    finally:
        logging.set_verbosity(verbosity)
