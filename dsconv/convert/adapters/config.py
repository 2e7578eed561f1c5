"""Read adapter_config.json or verl's file in its place, and change in it what PEFT changes when it saves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.convert.adapters.methods import ATTRIBUTES, PROMPTS, slot
from dsconv.convert.sidecars import read_json, require_readable
from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import quote

CONFIG = "adapter_config.json"
VERL_META = "lora_train_meta.json"  # verl 0.9.1 utils/checkpoint/fsdp_checkpoint_manager.py: r, lora_alpha, task_type
MAX_SIZE = 1 << 53  # of a number: larger ones are no sizes
DEFAULT = "default"  # the name that PEFT gives an adapter; others are saved in a subfolder of their name


def read_config(
    checkpoint: Checkpoint, folders: Iterable[Path], adapter: str, state: Mapping[str, TensorEntry]
) -> tuple[dict[str, Any], bytes]:
    """Return the adapter's configuration, and the bytes of the file to write.

    Args:
        checkpoint: What the adapter lies in.
        folders: Where the file may lie.
        adapter: The adapter's name; a folder of this name comes first.
        state: The entries by name, which complete verl's three settings.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        MalformedError: It is not an object of JSON, or has no method.
        UnsupportedError: It has a method that dsconv does not know.
        InconsistentCheckpointError: verl's rank is not that of the weights.
    """
    places = [place for folder in folders for place in (folder / adapter, folder, folder / "lora_adapter")]
    for place in places:
        require_readable(place, (CONFIG, VERL_META))
        if any((place / name).is_file() for name in (CONFIG, VERL_META)):
            break
    if (path := next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)) is not None:
        data = path.read_bytes()  # which says so where it must not be read
        config = read_json(path)
        if not isinstance(config, dict):
            raise MalformedError(f"{path}: not a JSON object")
        if config.get("inference_mode") is False:  # peft_model.py save_pretrained sets it while it saves
            config["inference_mode"] = True
            data = json.dumps(config, indent=2, sort_keys=True).encode()
    elif (path := next((place / VERL_META for place in places if (place / VERL_META).is_file()), None)) is not None:
        config = _from_verl(path, state)
        data = json.dumps(config, indent=2, sort_keys=True).encode()
    else:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: no {CONFIG} beside the checkpoint; it holds what the weights do not (alpha, base"
            " model). Name the folder that has it with --config-from (PeftModel.save_pretrained writes it)"
        )
    _check_types(path, config)
    kind = config["peft_type"]
    if kind not in ATTRIBUTES and kind not in PROMPTS:
        raise UnsupportedError(f"{path}: peft_type is {quote(kind)}, a method that dsconv does not know")
    return config, data


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raise MalformedError unless the fields that dsconv uses have the types that PEFT writes."""
    for name, (fits, expected) in FIELDS.items():
        if name in config and not fits(config[name]):
            raise MalformedError(f"{path}: {name} is {safe_repr(config[name])}; expected {expected}")
    if not isinstance(config.get("peft_type"), str):
        raise MalformedError(f"{path}: peft_type is {safe_repr(config.get('peft_type'))}; expected a method's name")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < MAX_SIZE


def _is_list(of: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(one) is of for one in value)


def _is_dict(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _or_none(*fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(one(value) for one in fits)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_ROWS = _is_list(int)
# What is used of an adapter_config.json, with the values that PEFT writes there.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_text, "a method's name"),
    "r": (_or_none(_is_size), "a rank"),
    "lora_alpha": (_or_none(_is_number), "a number"),
    "rank_pattern": (_or_none(_is_dict(_is_size), _is_dict(_is_list(bool))), "ranks by layer"),
    "alpha_pattern": (_or_none(_is_dict(_is_number)), "numbers by layer"),
    "target_modules": (_or_none(_is_text, _is_list(str)), "names of modules"),
    "target_parameters": (_or_none(_is_list(str)), "names of parameters"),
    "trainable_token_indices": (_or_none(_ROWS, _is_dict(_ROWS)), "rows, or rows by module"),
    "base_model_name_or_path": (_or_none(_is_text), "a text"),
    "bias": (_or_none(_is_text, _is_flag), "a text"),
    "init_lora_weights": (_or_none(_is_text, _is_flag), "a text or a flag"),
    **dict.fromkeys(("num_vectors", "topk", "token_dim", "encoder_num_layers"), (_or_none(_is_size), "a size")),
    **dict.fromkeys(("opt_projection_epsilon", "opt_projection_format_epsilon"), (_or_none(_is_number), "a number")),
    "cpt_tokens_type_mask": (_or_none(_ROWS), "a list of integers"),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "save_projection", "save_only_topk_weights"),
        (_or_none(_is_flag), "true or false"),
    ),
}


def _from_verl(path: Path, state: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """Return the LoraConfig that verl trained with: its file gives the numbers, and the weights' names give the
    modules.
    """
    meta = read_json(path)
    rank, alpha = (meta.get("r"), meta.get("lora_alpha")) if isinstance(meta, dict) else (None, None)
    if type(rank) is not int or type(alpha) is not int:
        raise MalformedError(f"{path}: r and lora_alpha should be integers: {str(meta)[:120]!r}")
    layers: dict[str, int] = {}
    for name, entry in state.items():
        at = slot(name, ATTRIBUTES["LORA"])
        if at is None:
            continue
        parts = name.split(".")
        layer = ".".join(parts[:at]).removeprefix("base_model.model.")
        found = entry.shape[0] if parts[at] in ("lora_A", "lora_embedding_A") else layers.get(layer, rank)
        layers[layer] = found
        if found != rank:
            raise InconsistentCheckpointError(f"{path}: r is {rank}, and {name} has rank {found}")
    return {
        "peft_type": "LORA",
        "task_type": meta.get("task_type") if isinstance(meta.get("task_type"), str) else "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(layers, state),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _targets(layers: Iterable[str], state: Iterable[str]) -> list[str]:
    """Return the last part of each layer's name, or the whole name if another module has the same last part."""
    adapted = set(layers)
    modules = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer.weight").removesuffix(".weight")
        for name in state
        if slot(name) is None
    }
    others = {module.rpartition(".")[2] for module in modules - adapted}
    return sorted({layer if layer.rpartition(".")[2] in others else layer.rpartition(".")[2] for layer in adapted})
