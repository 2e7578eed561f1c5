"""Extract the adapter from a checkpoint, with the names and tensors that ``PeftModel.save_pretrained`` would write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.convert.adapters.config import CONFIG, DEFAULT, read_config
from dsconv.convert.adapters.encoders import best_vectors, prompt_entries, renamed, without_pruned_ranks
from dsconv.convert.adapters.methods import (
    DELTA,
    ENCODER,
    MODULES,
    PROMPTS,
    TOKENS,
    adapters_in,
    bias_tensors,
    is_saved_form,
    of_other_adapter,
    own_tensors,
    slot,
    whole_modules,
    without_adapter,
)
from dsconv.convert.adapters.patterns import by_pattern, ends, require_few
from dsconv.convert.sidecars import read_json
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import count, quote

PREFIX = "base_model.model."
# Modules that models give their input and output embeddings; PEFT asks the model (get_input_embeddings), of which only
# names are known here.
INPUTS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings"}
OUTPUTS = {"lm_head", "embed_out", "output", "output_projection"}
TARGETED = ("embed_tokens", "lm_head")  # peft utils/constants.py EMBEDDING_LAYER_NAMES


@dataclass(frozen=True)
class Adapter:
    """An adapter that was extracted from a checkpoint.

    Attributes:
        name: Its name in the model, or ``default`` if the checkpoint does not say.
        config: Its adapter_config.json.
        checkpoint: Its tensors, under the names that PEFT saves.
        files: The files to write beside them, by name.
    """

    name: str
    config: dict[str, Any]
    checkpoint: Checkpoint
    files: dict[str, bytes]


def extract_adapter(
    checkpoint: Checkpoint, folders: list[Path], wanted: str | None = None, *, keeps_base: bool = False
) -> Adapter:
    """Return the adapter that a PEFT model's checkpoint holds.

    Args:
        checkpoint: A model's state dict with the adapter's name inside, whole or only what was trained; or the names
        that
            PEFT saves, which are taken as they are.
        folders: Where adapter_config.json may lie.
        wanted: The adapter's name; needed if there are several.
        keeps_base: Whether the base's tensors are kept too, so that they cannot be lost.

    Raises:
        CheckpointNotFoundError: There is no adapter_config.json.
        MalformedError: The checkpoint has no adapter, not the wanted one, or several and none is wanted.
        InconsistentCheckpointError: A tensor that was trained, or that the method needs, would not be in the output.
        UnsupportedError: The method is unknown, or its state is not all in a state dict.
    """
    state = {name: checkpoint[name] for entry in checkpoint.values() for name in (entry.name, *entry.aliases)}
    saved = is_saved_form(state)
    name = _choose(checkpoint, [] if saved else adapters_in(state), saved, wanted)
    config, data = read_config(checkpoint, folders, name, state)
    kind = str(config["peft_type"])
    found: list[TensorEntry]
    if saved:
        found = [renamed(entry, _prefixed(entry.name, kind, False)) for entry in checkpoint.values()]
        warnings: tuple[str, ...] = ()
    else:
        others = [one for one in adapters_in(state) if one != name]
        found, used = _select(checkpoint, state, config, name, others, folders)
        warnings = () if keeps_base else _refuse_losses(checkpoint, used, name, others, kind)
    _refuse_incomplete(checkpoint, found, config)
    if config["peft_type"] == "LORA" and not keeps_base:
        _refuse_other_config(checkpoint, found, config)
    alone = checkpoint.with_entries({entry.name: entry for entry in found}, {"adapter": True}, warnings)
    return Adapter(name, config, alone, {CONFIG: data})


def _choose(checkpoint: Checkpoint, names: list[str], saved: bool, wanted: str | None) -> str:
    if saved:
        return wanted or DEFAULT  # the names do not contain it
    if not names and not any(part.startswith("adaption_") for name in checkpoint for part in name.split(".")):
        raise MalformedError(
            f"{checkpoint.path}: no tensor belongs to a PEFT adapter (no lora_A, modules_to_save …); merge without"
            " --adapter"
        )
    if wanted is not None:
        if names and wanted not in names:
            raise MalformedError(
                f"{checkpoint.path}: has no adapter {quote(wanted)}; --adapter-name takes one of {', '.join(names)}"
            )
        return wanted
    if len(names) > 1:
        raise MalformedError(
            f"{checkpoint.path}: holds {count(len(names), 'adapter')} ({', '.join(names)}); --adapter writes one:"
            " choose it with --adapter-name"
        )
    return names[0] if names else DEFAULT


def _prefixed(name: str, kind: str, keep: bool) -> str:
    """Return the name with PEFT's prefix, which models that were adapted by ``model.add_adapter`` lack.

    transformers ``modeling_utils.py`` (``save_pretrained``) puts it before their names, too.
    """
    return name if keep or kind in PROMPTS or name.startswith("base_model.") else PREFIX + name


def _select(
    checkpoint: Checkpoint,
    state: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    adapter: str,
    others: list[str],
    folders: list[Path],
) -> tuple[list[TensorEntry], set[str]]:
    """Return the adapter's entries, and the names of the checkpoint's entries that they are made of."""
    kind = str(config["peft_type"])
    used: set[str] = set()
    if kind in PROMPTS:
        entries = prompt_entries(state, config, adapter)
        start = f"prompt_encoder.{adapter}."
        used |= {state[name].name for name in state if name.startswith(start)}
    else:
        state = {name: entry for name, entry in state.items() if not of_other_adapter(name, others)}
        entries = []
    names: dict[str, str] = {}
    if kind not in PROMPTS:
        names |= own_tensors(state, config, adapter)
        names |= {name: name for name in bias_tensors(state, config)}
    names |= whole_modules(state, adapter)
    names |= {name: name for name in _token_tensors(state, config, adapter)}
    names |= {name: name for name in _embedding_tensors(state, config, folders)}
    if missing := sorted(name for name in names if name not in state):
        raise InconsistentCheckpointError(
            f"{checkpoint.path}: an adapter of {kind} needs {quote(missing[0])}, which the checkpoint does not have"
        )
    has_prefix = kind in PROMPTS or any(name.startswith("base_model.") for name in state)
    by_name = {}
    for name, kept in names.items():
        used.add(state[name].name)
        target = _prefixed(without_adapter(kept, adapter, kind), kind, has_prefix)
        by_name[target] = renamed(state[name], target)
    if kind == "VBLORA" and config.get("save_only_topk_weights"):
        for made in best_vectors(state, config, adapter):
            used |= {source.name for source in made.sources}
            by_name[made.name] = made
    if kind == "ADALORA" and isinstance(config.get("rank_pattern"), dict):
        by_name = without_pruned_ranks(by_name, config["rank_pattern"], adapter)
    return [*entries, *by_name.values()], used


def _token_tensors(state: Mapping[str, TensorEntry], config: Mapping[str, Any], adapter: str) -> list[str]:
    """Return the trained tokens that PEFT saves: those of tied embeddings once, for the module that was asked for.

    peft ``utils/other.py`` (``set_additional_trainable_modules``, ``TrainableTokensWrapper``).
    """
    end = f".{TOKENS}.{DELTA}.{adapter}"
    found = [name for name in state if name.endswith(end)]
    asked = config.get("trainable_token_indices")
    if isinstance(asked, dict):
        found = [name for name in found if any(name.removesuffix(end).endswith(key) for key in asked)]
        first: dict[str, str] = {}
        for name in found:  # of tied modules, the first
            first.setdefault(state[name].name, name)
        return list(first.values())
    inputs = [name for name in found if name.removesuffix(end).rpartition(".")[2] in INPUTS]
    if len(found) > 1 and len(inputs) != 1:
        raise UnsupportedError(
            f"trainable_token_indices does not say which of {', '.join(found[:3])} is the input embedding"
        )
    return found if len(found) < 2 else inputs


def _embedding_tensors(state: Mapping[str, TensorEntry], config: Mapping[str, Any], folders: list[Path]) -> list[str]:
    """Return the base model's embeddings that PEFT saves: where they are adapted, and where the vocabulary has grown.

    peft ``utils/save_and_load.py``, ``save_embedding_layers="auto"``.
    """
    targets = config.get("target_modules")
    modules = {name.rpartition(".")[0] for name in state}
    with_tokens = config["peft_type"] == "TRAINABLE_TOKENS" or config.get("trainable_token_indices") is not None
    if isinstance(targets, str) and targets != "all-linear":
        base = {".".join(module.removeprefix(PREFIX).split(".base_layer")[:1]) for module in modules}
        try:  # not by ``fits``: what trainers write here may have a dozen alternatives and look ahead
            targeted = any(re.fullmatch(targets, module) for module in base if module.rpartition(".")[2] in TARGETED)
        except (re.error, RecursionError, OverflowError):
            raise MalformedError(f"adapter_config.json: target_modules is not a pattern: {quote(targets)}") from None
    else:
        targeted = isinstance(targets, (list, tuple)) and any(name in targets for name in TARGETED)
    if targeted and not with_tokens:
        ends = tuple(f"{module}.base_layer" for module in INPUTS | OUTPUTS)
        return [
            n for n in state if n.rpartition(".")[0].endswith(ends) and slot(n) is None and "modules_to_save" not in n
        ]
    if not _vocabulary_has_grown(state, config, folders):
        return []
    embeddings = {
        ".".join(parts[: number + 1])
        for parts in (name.split(".") for name in state)
        for number, part in enumerate(parts)
        if part in INPUTS | OUTPUTS and "layers" not in parts[:number] and "h" not in parts[:number]
    }
    return [name for name in state if any(name.startswith(f"{module}.") for module in embeddings)]


def _vocabulary_has_grown(state: Mapping[str, TensorEntry], config: Mapping[str, Any], folders: list[Path]) -> bool:
    """Return whether the model's vocabulary differs from its base's, where the base's config.json is at hand."""
    name = config.get("base_model_name_or_path")
    base = base_config(name) if isinstance(name, str) and name else None
    before = base.get("vocab_size") if base else None
    if not isinstance(before, int):
        return False
    own = next((found for folder in folders if isinstance(found := read_json(folder / "config.json"), dict)), {})
    now = own.get("vocab_size")
    if not isinstance(now, int):
        rows = [
            entry.shape[0]
            for found, entry in state.items()
            if found.endswith(".weight")
            and INPUTS & set(found.split("."))
            and len(entry.shape) == 2
            and slot(found) is None
        ]
        now = rows[0] if rows else before
    return now != before


def base_config(name: str) -> dict[str, Any] | None:
    """Return the config.json of a base model that lies in a folder or in the Hub's cache; None elsewhere."""
    places = [Path(name)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        import os

        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
        reference = cache / "refs" / "main"
        if reference.is_file():
            places.append(cache / "snapshots" / reference.read_text().strip()[:64])
    return next((found for place in places if isinstance(found := read_json(place / "config.json"), dict)), None)


def _refuse_losses(
    checkpoint: Checkpoint, used: set[str], adapter: str, others: list[str], kind: str
) -> tuple[str, ...]:
    """Raise InconsistentCheckpointError when a trained tensor is in no adapter; return what to say of other adapters.

    The check needs a checkpoint that records which parameters were trained: one in which something is frozen.
    """
    knows = any(entry.role == "frozen" for entry in checkpoint.values())
    left = [entry for entry in checkpoint.values() if entry.name not in used and entry.role == "parameter"]
    of_others = [entry.name for entry in left if of_other_adapter(entry.name, others)]
    lost = [entry.name for entry in left if entry.name not in of_others] if knows else []
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InconsistentCheckpointError(
            f"{checkpoint.path}: {', '.join(map(repr, lost[:3]))}{more} was trained, and an adapter of {kind} does"
            " not save it (modules_to_save and bias of adapter_config.json do not name it): --adapter would lose it."
            " Merge the whole model, or use --fold-lora, which keeps it"
        )
    if of_others:
        also = ", ".join(map(repr, others))
        return (f"adapter {quote(adapter)} is written; the checkpoint also holds {also} (--adapter-name)",)
    return ()


def _refuse_incomplete(checkpoint: Checkpoint, found: list[TensorEntry], config: Mapping[str, Any]) -> None:
    """Raise unless the tensors are those that PEFT loads: not none, and not without what a state dict does not have."""
    kind = str(config["peft_type"])
    if not found:
        raise MalformedError(f"{checkpoint.path}: no tensor belongs to the adapter, which is of {kind}")
    if kind == "SHIRA" and not any(".shira_indices" in entry.name for entry in found):
        raise UnsupportedError(
            f"{checkpoint.path}: SHIRA keeps shira_indices (where its values go) outside of the state dict, so the"
            " checkpoint does not hold them; save the adapter with PEFT's save_pretrained"
        )
    if empty := [entry.name for entry in found if 0 in entry.shape]:
        raise MalformedError(f"{checkpoint.path}: {quote(empty[0])} of the adapter has no elements")


def _refuse_other_config(checkpoint: Checkpoint, found: list[TensorEntry], config: Mapping[str, Any]) -> None:
    """Raise unless the config makes the layers that the tensors belong to: PEFT starts others at random.

    Rules: peft ``tuners/tuners_utils.py`` (``check_target_module_exists``), ``tuners/lora/model.py``
    (``_create_and_replace``).
    """
    targets = config.get("target_modules")
    if config.get("target_parameters") or config.get("target_modules_to_tie"):
        return
    names = frozenset(targets) if isinstance(targets, list) else None
    require_few(config, len(found))
    for entry in found:
        name = entry.name.removeprefix(PREFIX)
        at = slot(name, ("lora_A", "lora_embedding_A"))
        if at is None:
            continue
        layer = ".".join(name.split(".")[:at])
        rank = by_pattern(config.get("rank_pattern"), layer, config.get("r", 8))
        if entry.shape[:1] != (rank,):
            wrong = f"has rank {entry.shape[0]}, and adapter_config.json gives it rank {rank!r:.40}"
        elif names is not None and names.isdisjoint(ends(layer)):
            wrong = "is not among target_modules of adapter_config.json"
        else:
            continue
        raise InconsistentCheckpointError(
            f"{checkpoint.path}: the adapter's layer {safe_repr(layer)} {wrong}, which belongs to another adapter."
            " Name the folder of this adapter's own with --config-from"
        )


def original_entries(checkpoint: Checkpoint, adapter: str) -> dict[str, TensorEntry]:
    """Return the base model's entries, by its own names, out of a PEFT model's state dict; aliases give the same entry.

    What an adapter other than ``adapter`` replaces is the base's own (``original_module``).
    """
    found: dict[str, TensorEntry] = {}
    for entry in checkpoint.values():
        names = [plain for name in (entry.name, *entry.aliases) if (plain := _base_name(name))]
        if names:
            own = replace(entry, name=names[0], aliases=tuple(names[1:]))
            found |= dict.fromkeys(names, own)
    return found


def _base_name(name: str) -> str | None:
    """Return the base model's name of a tensor; None for what belongs to an adapter."""
    parts = name.removeprefix(PREFIX).split(".")
    if slot(name) is not None or MODULES in parts or DELTA in parts or ENCODER in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", TOKENS))
