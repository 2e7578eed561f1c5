"""Which transformers model a checkpoint is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.errors import CheckpointNotFoundError, UnsupportedError


def config_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder whose config.json describes the checkpoint's model: its own, or the parent."""
    near = (checkpoint.path, checkpoint.folder, checkpoint.folder.parent)
    return next((folder for folder in near if (folder / "config.json").is_file()), None)


def read_config(checkpoint: Checkpoint, folder: Path | None) -> Any:
    """The transformers configuration in ``folder``; raises CheckpointNotFoundError where there is none."""
    from transformers import AutoConfig

    if folder is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: no config.json there or in the parent: pass config=AutoConfig.from_pretrained(…)"
        )
    return AutoConfig.from_pretrained(str(folder))


def refuse_quantized(config: Any, checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError where the configuration says that the weights are quantized: their bytes are not the
    model's values.

    transformers 5.24 ``quantizers/auto.py`` ``get_hf_quantizer`` goes by the same field.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise UnsupportedError(
        f"{checkpoint.path}: the configuration says that the weights are quantized"
        f" ({getattr(method, 'value', method)}), which is not loaded: use from_pretrained, or, where the weights are"
        " not quantized, pass config= without its quantization_config"
    )


def model_class_of(model_class: Any, config: Any) -> Any:
    """The class to build: given, chosen by an Auto class, or named by the configuration.

    A configuration that names none, as one that was never saved with a model, is a language model's where its kind has
    one.
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
        f"the configuration names the architecture {name!r}, which transformers does not have: pass model_class="
    )
