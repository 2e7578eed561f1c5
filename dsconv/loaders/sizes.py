"""The sizes of a model's parameters, from its configuration alone.

The model is built on the meta device; no weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsconv.checkpoint.config_files import find_config
from dsconv.checkpoint.storage import hub
from dsconv.errors import CheckpointNotFoundError, UnsupportedError, require_packages
from dsconv.loaders.models import model_class_of
from dsconv.urls import local_path
from dsconv.zero_utils.activations import Decoder
from dsconv.zero_utils.memory import ModelSizes


def model_sizes(source: str, revision: str | None = None) -> ModelSizes:
    """Return the sizes of a model's parameters.

    Args:
        source: A config.json, a folder that has one (or whose parent has), or the id of a model on the Hub. Only the
            config.json is downloaded from the Hub.
        revision: A branch, tag or commit of the model on the Hub.

    Raises:
        CheckpointNotFoundError: There is no config.json.
        UnsupportedError: transformers cannot build a model of this configuration.
        RemoteError: The Hub cannot be read.
    """
    require_packages("building the model", "train", "transformers")
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    path = _config_path(source, revision)
    try:
        config = AutoConfig.from_pretrained(str(path))
        with torch.device("meta"):
            model = model_class_of(None, config)(config)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - transformers fails in many ways on a bad configuration
        said = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"{path}: transformers cannot build a model of this configuration: {type(error).__name__}: {said}"
        ) from None
    return sizes_of(model, source)


def sizes_of(model: Any, name: str) -> ModelSizes:
    """Return the sizes of a transformers model's parameters.

    AutoTP (DeepSpeed ``module_inject/auto_tp.py``) shards the matrices of linear layers, including the output
    head's, and an embedding only if it is tied to the head. The few biases that it shards are counted as whole, and
    every shard as even.
    """
    cut = {id(p) for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False)}
    parameters = tuple((p.numel(), p.dim() > 1 and id(p) in cut) for p in model.parameters())
    largest = max((sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()), default=0)
    return ModelSizes(name, parameters, largest, _decoder(model))


def _decoder(model: Any) -> Decoder | None:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return None

    def size(*names: str) -> int:
        return next((value for name in names if type(value := getattr(config, name, None)) is int), 0)

    hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    if not (hidden and heads and layers):
        return None
    names = [name.lower() for name, _ in model.named_parameters()]
    inner = size("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    experts = size("num_experts_per_tok")
    if experts:
        shared = size("shared_expert_intermediate_size") or size("n_shared_experts") * size("moe_intermediate_size")
        inner = experts * (size("moe_intermediate_size") or inner) + shared
    return Decoder(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=size("num_key_value_heads") or heads,
        head_dim=size("head_dim") or hidden // heads,
        inner=inner,
        vocabulary=size("vocab_size"),
        gated=any("gate_proj" in name or "gate_up" in name or ".w3" in name for name in names),
        rms_norm=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        query_key_norm=any(name.endswith("q_norm.weight") for name in names),
    )


def _config_path(source: str, revision: str | None) -> Path:
    if hub.lies_on_hub(source):
        return hub.fetch_config(source.removeprefix(hub.SCHEME), revision)
    path = local_path(source, "the model's configuration")
    if path.is_file():
        if path.suffix != ".json":
            raise UnsupportedError(
                f"{path} is not a configuration: give a config.json, the folder that holds it, or a Hub id"
            )
        return path
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path}: no such file or folder")
    found = find_config([path])
    if found is not None:
        return found
    raise CheckpointNotFoundError(f"{path}: neither it nor its parent has a config.json, which gives the model's sizes")
