"""A model's hidden size, of its ``config.json``: what the "auto" sizes of a DeepSpeed config depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage import hub
from dsconv.errors import CheckpointNotFoundError, MalformedError, UnsupportedError
from dsconv.zero_utils.config_auto import hidden_size_of


def read_hidden_size(model: str, revision: str | None = None) -> int:
    """The hidden size of ``model``: a folder, a ``config.json``, or a repository of the Hub, of which only that is
    downloaded.

    Many configurations call it otherwise (``n_embd``, ``d_model``) or leave out what is their class's default, so
    transformers is asked where it is installed and knows the model; no code of the repository is run. Raises
    CheckpointNotFoundError, MalformedError, RemoteError as ``open_checkpoint`` does, and UnsupportedError for a
    configuration that states no size.
    """
    path = Path(model)
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointNotFoundError(f"{path}: the model's configuration cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
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
    """The configuration as transformers understands it; None where it is not installed, or does not know the model."""
    try:
        from transformers import AutoConfig, logging
    except ImportError:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception:  # noqa: BLE001 - what a configuration can be is anybody's
        return None
    finally:
        logging.set_verbosity(verbosity)
