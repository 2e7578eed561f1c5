"""Open and build the causal language model of a run, from a folder, a Hub id or a configuration."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.folders import opened
from dsconv.convert.sidecars import find_sidecars
from dsconv.engine.checkpoints import FOLDER
from dsconv.engine.options import RunOptions
from dsconv.errors import CheckpointNotFoundError, OutputError, SeveralModelsError, UnsupportedError, UsageError
from dsconv.loaders.models import config_folder
from dsconv.urls import local_path

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Source:
    """A model: its configuration, the checkpoint of its weights if it has any, and the folder of its sidecars."""

    config: Any
    checkpoint: Checkpoint | None
    folder: Path | None

    def identity(self) -> dict[str, Any]:
        """Return the sizes that must agree when a checkpoint is resumed."""
        text = self.config.get_text_config()
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return {"model_type": self.config.model_type, **{name: getattr(text, name, None) for name in sizes}}


def open_source(options: RunOptions, resumed: bool) -> Source:
    """Open ``options.model``. A run that is ``resumed`` uses the configuration that it keeps, and no weights.

    Raises:
        CheckpointNotFoundError: There is no config.json.
        UnsupportedError: The model is not a causal language model, or transformers cannot read its configuration.
        UsageError: The options do not fit the model.
        DsconvError: ``open_checkpoint`` failed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    own = Path(options.output_dir) / FOLDER
    path = own if resumed and (own / "config.json").is_file() else local_path(options.model, "MODEL")
    checkpoint, folder = None, None
    if path.suffix == ".json" and path.is_file():
        config = _read(AutoConfig, str(path))
    elif resumed or (path.is_dir() and (path / "config.json").is_file() and not _has_weights(path)):
        config, folder = _read(AutoConfig, str(path)), path
    else:
        try:
            checkpoint = open_checkpoint(options.model)
        except SeveralModelsError as several:
            advice = "merge one with dsconv merge and --item, and train the merged folder"
            raise SeveralModelsError(several.where, several.models, advice) from None
        folder = config_folder(checkpoint)
        if folder is None:
            raise CheckpointNotFoundError(
                f"{options.model}: neither it nor its parent has a config.json, so the model cannot be built"
            )
        config = _read(AutoConfig, str(folder))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"{options.model} is a {config.model_type} model, but the engine trains causal language models only"
        )
    text = config.get_text_config()
    if options.dropout is not None:
        for name, value in vars(text).items():
            if name.endswith(("dropout", "_pdrop", "dropout_prob")) and isinstance(value, (int, float)):
                setattr(text, name, options.dropout)
    longest = getattr(text, "max_position_embeddings", None) or options.seq_len
    if options.seq_len > longest:
        raise UsageError(
            f"--seq-len {options.seq_len} is longer than {options.model} allows: it has {longest} positions"
        )
    config.use_cache = False
    return Source(config, checkpoint, folder)


def keep_source(source: Source, run: Path) -> None:
    """Write the configuration and its sidecars (tokenizer, …) beside the run's checkpoints, so that they are
    loadable. Raises OutputError where a link has the name of one of them, or of their folder.
    """
    files: dict[str, bytes] = {}
    if source.folder is not None:
        files |= {path.name: path.read_bytes() for path in find_sidecars(None, [source.folder]).files}
    kept = copy.deepcopy(source.config)
    kept.use_cache = True
    with tempfile.TemporaryDirectory(prefix="dsconv-config-") as made:  # transformers would follow links
        kept.save_pretrained(made)
        files |= {path.name: path.read_bytes() for path in Path(made).iterdir()}
    try:
        with opened(run, make=True) as root, root.inner(FOLDER, make=True) as folder:
            for name, data in files.items():
                folder.replace_file(name, data)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{run / FOLDER}: the configuration cannot be written: {error.strerror}") from None


def _has_weights(folder: Path) -> bool:
    return (
        any(path.suffix in (".safetensors", ".bin", ".pt", ".distcp") for path in folder.iterdir())
        or (folder / "latest").is_file()
    )


def _read(auto: Any, path: str) -> Any:
    try:
        return auto.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise UnsupportedError(
            f"{path}: transformers cannot read the configuration: {str(error).splitlines()[0]}"
        ) from None


def build(source: Source, seed: int, dtype: torch.dtype, weights: bool) -> Any:
    """Build the whole model in memory. Every rank builds the same.

    Args:
        source: The model.
        seed: The seed of weights that transformers draws.
        dtype: The dtype of the parameters.
        weights: Whether to load the source's weights; not if a checkpoint of the run is loaded afterwards.
    """
    from transformers import AutoModelForCausalLM

    from dsconv.loaders.stream import stream_into

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, attn_implementation="sdpa")
    if weights and source.checkpoint is not None:
        stream_into(model, source.checkpoint, strict=False)
    return model.train()
