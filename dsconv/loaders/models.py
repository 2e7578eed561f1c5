"""Find the transformers configuration and class of a checkpoint's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import CONFIG, MAX_CONFIG_BYTES, find_config
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.local import read_small
from dsconv.errors import CheckpointNotFoundError, UnsupportedError
from dsconv.text import quote


def config_folder(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of the config.json that describes the checkpoint's model, or None (see ``find_config``)."""
    found = find_config([checkpoint.path, checkpoint.folder])
    return None if found is None else found.parent


def read_config(checkpoint: Checkpoint, folder: Path | None) -> Any:
    """Return the transformers configuration in ``folder``. Raises CheckpointNotFoundError if ``folder`` is None."""
    from transformers import AutoConfig

    if folder is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: neither it nor its parent has a config.json: pass config=AutoConfig.from_pretrained(…)"
        )
    read_small(folder / CONFIG, MAX_CONFIG_BYTES)  # holds it to the rules for links and sizes, which transformers lacks
    return AutoConfig.from_pretrained(str(folder))


def refuse_quantized(config: Any, checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError if the configuration says that the weights are quantized.

    The bytes of quantized weights are not the model's values.

    transformers ``quantizers/auto.py`` ``get_hf_quantizer`` goes by the same field.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise UnsupportedError(
        f"{checkpoint.path}: the configuration says that the weights are quantized"
        f" ({getattr(method, 'value', method)}), and quantized weights cannot be loaded here: use from_pretrained. If"
        " they are not quantized, pass config= without its quantization_config"
    )


def model_class_of(model_class: Any, config: Any) -> Any:
    """Return the class to build: the given one, an Auto class's choice, or the one that the configuration names.

    A configuration that was never saved with a model names no class. It gives its family's language model, if there is
    one.

    Raises:
        UnsupportedError: transformers does not have the class.
    """
    import transformers

    if model_class is not None:
        mapping = getattr(model_class, "_model_mapping", None)
        return mapping[type(config)] if mapping is not None else model_class
    name = (getattr(config, "architectures", None) or [None])[0]
    if isinstance(name, str) and hasattr(transformers, name):
        return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if name is None and type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UnsupportedError(
        f"the configuration names the architecture {quote(name)}, which transformers does not have: pass model_class="
    )
