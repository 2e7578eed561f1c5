"""The transformers model of a run: a folder, a Hub id or a configuration, of a causal language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.sidecars import find_sidecars
from dsconv.engine.checkpoints import FOLDER
from dsconv.engine.files import write_file
from dsconv.engine.options import RunOptions
from dsconv.errors import CheckpointNotFoundError, UnsupportedError, UsageError
from dsconv.loaders.models import config_folder

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Source:
    """What ``MODEL`` is: its configuration, and a checkpoint of its weights where it has any."""

    config: Any
    checkpoint: Checkpoint | None
    folder: Path | None

    def identity(self) -> dict[str, Any]:
        """What tells one model from another when a checkpoint is resumed."""
        text = self.config.get_text_config()
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return {"model_type": self.config.model_type, **{name: getattr(text, name, None) for name in sizes}}


def open_source(options: RunOptions, resumed: bool) -> Source:
    """``options.model``; of a run that is ``resumed``, the configuration that it keeps: its weights are the
    checkpoint's.

    Raises CheckpointNotFoundError, UnsupportedError, and what ``open_checkpoint`` raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    own = Path(options.output_dir) / FOLDER
    path = own if resumed and (own / "config.json").is_file() else Path(options.model)
    checkpoint, folder = None, None
    if path.suffix == ".json" and path.is_file():
        config = _read(AutoConfig, str(path))
    elif resumed or (path.is_dir() and (path / "config.json").is_file() and not _has_weights(path)):
        config, folder = _read(AutoConfig, str(path)), path
    else:
        checkpoint = open_checkpoint(options.model)
        folder = config_folder(checkpoint)
        if folder is None:
            raise CheckpointNotFoundError(
                f"{options.model} has no config.json, in it or in its parent: the model cannot be built"
            )
        config = _read(AutoConfig, str(folder))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"{options.model} is a {config.model_type}: the engine trains causal language models")
    text = config.get_text_config()
    if options.dropout is not None:
        for name, value in vars(text).items():
            if name.endswith(("dropout", "_pdrop", "dropout_prob")) and isinstance(value, (int, float)):
                setattr(text, name, options.dropout)
    longest = getattr(text, "max_position_embeddings", None) or options.seq_len
    if options.seq_len > longest:
        raise UsageError(f"--seq-len {options.seq_len} is longer than the {longest} positions that {options.model} has")
    config.use_cache = False
    return Source(config, checkpoint, folder)


def keep_source(source: Source, run: Path) -> None:
    """The configuration and what goes with it (tokenizer, …) beside the run's checkpoints, which makes them
    loadable.
    """
    target = run / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    if source.folder is not None:
        for path in find_sidecars(None, [source.folder]):
            write_file(target / path.name, path.read_bytes())
    kept = copy.deepcopy(source.config)
    kept.use_cache = True
    kept.save_pretrained(target)


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
    """The whole model in memory, with the source's weights, or such as transformers draws them for ``seed``.

    ``weights`` False leaves out the source's: a checkpoint of the run comes after. Every rank builds the same.
    """
    from transformers import AutoModelForCausalLM

    from dsconv.loaders.stream import stream_into

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, attn_implementation="sdpa")
    if weights and source.checkpoint is not None:
        stream_into(model, source.checkpoint, strict=False)
    return model.train()
