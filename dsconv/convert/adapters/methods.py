"""The methods of PEFT: how each calls its parameters, which of them it saves, and under which names.

A model's state dict has the adapter's name inside (``q_proj.lora_A.default.weight``); what PEFT saves does not. The
rules are those of peft ``utils/save_and_load.py`` (``get_peft_model_state_dict``) and of the methods that have one
of their own (``tuners/*/model.py``: ``_get_adapter_state_dict`` and ``_remove_adapter_name_from_key``), applied to
names and adapter_config.json alone, so that neither peft nor torch is imported. PEFT walks the model's modules; these
rules look at names instead: a tensor belongs to a method if a part of its name begins like the method's parameters and
the adapter's name follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# What the names of a method's own parameters and buffers begin with (``prefix`` of peft's tuners/*/model.py, and the
# containers that are shared between layers).
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "LORA": ("lora_",),
    "ADALORA": ("lora_", "ranknum"),
    "ADAMSS": ("adamss_",),
    "ADAPTION_PROMPT": ("adaption_",),
    "BEFT": ("beft_",),
    "BOFT": ("boft_",),
    "C3A": ("c3a_",),
    "DEFT": ("deft_",),
    "DELORA": ("delora_",),
    "FOURIERFT": ("fourierft_",),
    "FROD": ("frod_",),
    "GLORA": ("glora_",),
    "GRALORA": ("gralora_",),
    "HIRA": ("hira_",),
    "HRA": ("hra_",),
    "IA3": ("ia3_",),
    "LILY": ("lily_",),
    "LN_TUNING": ("ln_tuning_",),
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "MISS": ("miss_",),
    "OFT": ("oft_",),
    "OSF": ("osf_",),
    "PEANUT": ("peanut_",),
    "POLY": ("poly_",),
    "PSOFT": ("psoft_",),
    "PVERA": ("pvera_",),
    "RANDLORA": ("randlora_",),
    "ROAD": ("road_",),
    "SHADOW": ("shadow_",),
    "SHIRA": ("shira_",),
    "SUPERTUNING": ("supertuning_",),
    "TINYLORA": ("tinylora_",),
    "TRAINABLE_TOKENS": ("trainable_tokens_",),
    "UNILORA": ("unilora_",),
    "VBLORA": ("vblora_",),
    "VERA": ("vera_",),
    "WAVEFT": ("waveft_",),
    "XLORA": ("internal_xlora_classifier",),
}
# Methods that train an encoder beside the model and save the embeddings that it gives.
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
UNNAMED = {"ADAPTION_PROMPT", "XLORA"}  # whose parameters do not carry the adapter's name
ALL_ATTRIBUTES = tuple(sorted({start for starts in ATTRIBUTES.values() for start in starts}))
ENCODER = "prompt_encoder"
SAVED_PROMPTS = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
MODULES = "modules_to_save"
TOKENS = "token_adapter"
DELTA = "trainable_tokens_delta"
SHADOW_CONTAINERS = ("shadow_backbone", "shadow_projection", "shadow_head", "shadow_down", "shadow_up",
                     "shadow_update_transform", "shadow_update_gate")  # fmt: skip
# What follows a parameter's name when the adapter's does not: of modules, and of GLoRA's and OSF's own parts.
_LAST_PARTS = [[name] for name in ("weight", "bias", "Xd", "Xu", "zeros", "X", "S_low", "U_low", "V_low")]


def slot(name: str, starts: tuple[str, ...] = ALL_ATTRIBUTES) -> int | None:
    """Return which part of ``name`` is a method's parameter, counted from 0, or None if none is.

    Wholly trained modules and trainable tokens beside another method are not the method's own: they give None.
    """
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part in (MODULES, TOKENS):
            return None
        if part.startswith(starts):
            return number
    return None


def is_saved_form(names: Iterable[str]) -> bool:
    """Return whether ``names`` are those that PEFT saves: parameters of a method without an adapter's name.

    accelerate and the Trainer write such names into DCP directories (accelerate ``utils/fsdp_utils.py``,
    ``adapter_only``).
    """
    found = False
    for name in names:
        if name in SAVED_PROMPTS:
            return True
        at = slot(name)
        rest = name.split(".")[at + 1 :] if at is not None else []
        if name.endswith(f".{TOKENS}.{DELTA}") or (at is not None and (not rest or rest in _LAST_PARTS)):
            if name.split(".")[-1].startswith(ATTRIBUTES["ADAPTION_PROMPT"]):
                continue  # the same in both forms
            found = True
    return found


def adapters_in(names: Iterable[str]) -> list[str]:
    """Return the names of the adapters that a model's state dict holds, sorted."""
    found = set()
    for name in names:
        parts = name.split(".")
        for number, part in enumerate(parts[:-1]):
            named = part in (MODULES, DELTA, ENCODER) or part.startswith(ALL_ATTRIBUTES)
            if named and not part.startswith(ATTRIBUTES["ADAPTION_PROMPT"] + ATTRIBUTES["XLORA"]):
                if part in ("frod_V", "frod_s_indices", "frod_s_size"):  # by layer, and then by adapter
                    found.add(parts[-1])
                else:
                    found.add(parts[number + 1])
                break
    return sorted(found)


def is_peft_model(names: Iterable[str]) -> bool:
    """Return whether ``names`` are those of a model with an adapter, or of an adapter: no plain model has such."""
    found = list(names)
    wrapped = any(name.startswith("base_model.") or ".base_layer." in name for name in found)
    encoded = any(name.startswith(f"{ENCODER}.") for name in found)
    return encoded or (wrapped and (bool(adapters_in(found)) or is_saved_form(found)))


def of_other_adapter(name: str, others: Iterable[str]) -> bool:
    """Return whether a tensor belongs to one of the adapters ``others`` (``_filter_state_dict_for_adapter_name``)."""
    return any(f".{other}." in name or name.endswith(f".{other}") for other in others)


def without_adapter(name: str, adapter: str, peft_type: str) -> str:
    """Return the name that PEFT saves a tensor under (``_remove_adapter_name_from_key`` of its method)."""
    if peft_type == "PEANUT":
        for container in ("peanut_encoders", "peanut_decoders"):
            if f".{container}.{adapter}." in name:
                return name.replace(f".{container}.{adapter}.", f".{container}.")
    if peft_type == "SHADOW":
        for container in SHADOW_CONTAINERS:
            if f"{container}.{adapter}." in name:
                return name.replace(f"{container}.{adapter}.", f"{container}.default.")
    if "." not in name:
        return name
    if name.endswith(f".{adapter}"):
        return name.removesuffix(f".{adapter}")
    start, _, last = name.rpartition(".")
    return f"{re.sub(re.escape(f'.{adapter}') + '$', '', start)}.{last}"


def own_tensors(names: Iterable[str], config: Mapping[str, Any], adapter: str) -> dict[str, str]:
    """Return {name: the name it keeps until the adapter's is removed} of what the method saves as it is.

    Args:
        names: Those of the state dict, without other adapters'.
        config: The adapter_config.json.
        adapter: The adapter's name.
    """
    kind = str(config.get("peft_type"))
    starts = ATTRIBUTES[kind]
    own = [name for name in names if slot(name, starts) is not None]
    if kind == "ADAPTION_PROMPT":
        own = [name for name in own if name.rpartition(".")[2].startswith(starts)]
    elif kind not in UNNAMED:
        own = [name for name in own if adapter in name.split(".")[1:]]
    if kind == "LORA" and config.get("use_dora"):
        end = f"lora_magnitude_vector.{adapter}.weight"
        return {name: name.removesuffix(".weight") if name.endswith(end) else name for name in own}
    if kind == "ADALORA":
        own = [name for name in own if not name.endswith(f".ranknum.{adapter}")]
    if kind in ("VERA", "PVERA"):
        shared = kind.lower()
        whole = [f"base_model.{shared}_{letter}.{adapter}" for letter in "AB"]
        own = [name for name in own if f".{shared}_A." not in name and f".{shared}_B." not in name]
        return _same(own + (whole if config.get("save_projection") else []))
    if kind == "VBLORA":
        bank = f"base_model.vblora_vector_bank.{adapter}"
        logits = [] if config.get("save_only_topk_weights") else [name for name in own if "vblora_logits" in name]
        return _same([*logits, bank])
    if kind == "UNILORA":
        kept = ("unilora_indices", "unilora_scales") if config.get("save_indices") else ()
        theta = f"base_model.unilora_theta_d.{adapter}"
        return _same([theta, *(name for name in own if any(part in name for part in kept))])
    if kind == "FROD":
        layers = (".frod_V.", ".frod_s_indices.", ".frod_s_size.", ".frod_U.")
        shared_starts = tuple(f"base_model{part}" for part in layers[:3])
        whole = [name for name in own if name.startswith(shared_starts) and name.endswith(f".{adapter}")]
        own = [name for name in own if not any(part in name for part in layers)]
        return _same(own + (whole if config.get("save_projection") else []))
    if kind == "TINYLORA":
        vectors = f"base_model.tinylora_v.{adapter}."
        kept_names = {
            name: name
            for name in own
            if ".tinylora_v." not in name and (".tinylora_P." not in name or config.get("save_projection"))
        }
        return kept_names | {
            name: "base_model.tinylora_v." + name.removeprefix(vectors) for name in own if name.startswith(vectors)
        }
    return _same(own)


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def bias_tensors(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the biases of the base model that are trained beside the method (``_get_learnable_bias_state_dict``)."""
    bias = str(config.get("bias", "none"))
    every = list(names)
    if bias == "all":
        return [name for name in every if name == "bias" or name.endswith(".bias")]
    if not bias.endswith("_only"):
        return []
    layers = {
        ".".join(name.split(".")[:at])
        for name in every
        if (at := slot(name, ATTRIBUTES[str(config["peft_type"])])) is not None
    }
    return [name for name in every if name.endswith(".base_layer.bias") and name[: -len(".base_layer.bias")] in layers]


def whole_modules(names: Iterable[str], adapter: str) -> dict[str, str]:
    """Return {name: name without the wrapper} of the modules that were trained whole (``ModulesToSaveWrapper``)."""
    marker = f".{MODULES}.{adapter}."
    return {name: name.replace(marker, ".", 1) for name in names if marker in name}
