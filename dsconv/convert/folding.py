"""``--fold-lora``: a LoRA folded into its base, as ``PeftModel.merge_and_unload`` does it, tensor by tensor.

The base comes from the same checkpoint, which a PEFT run holds whole, or from ``--base`` for an adapter alone. What the
result is made of is a ``Checkpoint`` again: the base's entries under the base model's names, those that the adapter
touches computed (``computed.py``), those that it replaces taken from it. So the plan, the copy, the manifest and the
verification are those of any merge, and memory is that of the tensor being folded.

Rules: peft ``tuners/lora/model.py`` (``_create_and_replace``: ranks and alphas by pattern),
``tuners/lora/layer.py``, ``tuners/tuners_utils.py`` (``_unload_and_optionally_merge``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.convert.adapters.extract import PREFIX, Adapter, extract_adapter, original_entries
from dsconv.convert.adapters.methods import ATTRIBUTES, DELTA, TOKENS, is_saved_form, slot
from dsconv.convert.lora_layers import Folder, Parts, plain_name
from dsconv.convert.sidecars import read_json
from dsconv.convert.ties import tied_pairs
from dsconv.convert.vocabulary import grown_vocabulary
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import quote

# Settings of a LoraConfig that change what is added to the base, and that dsconv does not compute.
REFUSED = ("use_qalora", "use_bdlora", "monteclora_config", "arrow_config", "kasa_config", "velora_config",
           "layer_replication", "megatron_config", "alora_invocation_tokens")  # fmt: skip
# Initialisations that change the base's weights: PEFT changes them again when it loads the adapter.
BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "modules_to_tie", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_modules_to_tie", "target_parameters",
    "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """A folded model, and the names of its tensors that the adapter changed or replaced.

    ``vocabulary`` are the base's number of tokens and the adapter's, where it has grown.
    """

    checkpoint: Checkpoint
    touched: frozenset[str]
    vocabulary: tuple[int, int] | None = None


def fold_lora(
    checkpoint: Checkpoint,
    folders: list[Path],
    *,
    base: Checkpoint | None = None,
    adapter_name: str | None = None,
    dtype: DType | None = None,
) -> Folded:
    """Return the model that ``merge_and_unload`` gives, as a checkpoint under the base model's own names.

    Args:
        checkpoint: A PEFT model's checkpoint, whole or its trained part alone, or an adapter.
        folders: Where adapter_config.json, and the model's config.json, may lie.
        base: The base model, for an adapter alone.
        adapter_name: Which of several adapters.
        dtype: What floating tensors are written as; by default each keeps the base's. A tensor is cast first and the
            product added then, as PEFT does with a base that was loaded in this dtype.

    Raises:
        CheckpointNotFoundError: adapter_config.json is missing.
        UnsupportedError: The method, or one of its settings, is not LoRA as dsconv folds it.
        MalformedError: The base is missing, or is given beside a checkpoint that holds it.
        InconsistentCheckpointError: Adapter and base do not fit together.
    """
    adapter = extract_adapter(checkpoint, folders, adapter_name, keeps_base=True)
    _refuse_settings(adapter, checkpoint)
    own = original_entries(checkpoint, adapter.name) if not is_saved_form(checkpoint) else {}
    layers, others = _split(adapter)
    own = _united(own, [*_tied_by_tokens(checkpoint, others), *_tied_by_config(folders)])
    whole = bool(own) and all(_base_names(parts, own) for parts in layers)
    if base is not None and whole:
        raise MalformedError(f"{checkpoint.path}: holds its base's weights itself; leave out --base")
    if base is None and not whole:
        named = adapter.config.get("base_model_name_or_path")
        hint = f": adapter_config.json calls it {str(named)[:200]!r}" if named else ""
        raise MalformedError(
            f"{checkpoint.path}: holds the adapter without the base model that it is folded into{hint}. Name it with"
            " --base"
        )
    if base is not None:
        _refuse_changed_base(adapter, checkpoint)
        lost = sorted(entry.name for name, entry in own.items() if entry.role == "parameter" and name not in others)
        if lost:
            raise InconsistentCheckpointError(
                f"{checkpoint.path}: {quote(lost[0])} was trained and is not the adapter's; a fold into --base would"
                " lose it"
            )
    source = own if base is None else _by_name(base, folders)
    kind = _model_type(folders, base)
    entries = Folder(adapter.config, source, kind, dtype, upcast=base is not None, where=checkpoint.path)
    result = entries.fold(layers, others)
    vocabulary = grown_vocabulary(entries.resized, result.values(), checkpoint.path)
    return Folded(_checkpoint_of(checkpoint, base, result), frozenset(entries.touched), vocabulary)


def _refuse_settings(adapter: Adapter, checkpoint: Checkpoint) -> None:
    config = adapter.config
    kind = config["peft_type"]
    if kind != "LORA":
        raise UnsupportedError(
            f"{checkpoint.path}: the adapter is of {kind}; --fold-lora folds LoRA (DoRA and rsLoRA too). Write it with"
            " --adapter, and use PEFT's merge_and_unload"
        )
    for key, value in config.items():
        if value and (key in REFUSED or key not in UNDERSTOOD):
            raise UnsupportedError(
                f"{checkpoint.path}: adapter_config.json sets {key[:80]}, which --fold-lora does not fold. Write the"
                " adapter with --adapter, and use PEFT's merge_and_unload"
            )


def _refuse_changed_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    how = adapter.config.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(BASE_CHANGING):
        raise UnsupportedError(
            f"{checkpoint.path}: the adapter was initialised with {quote(how[:40])}, which changed the base's weights,"
            " so --base is not what it was trained on. Fold a checkpoint that holds the base, or use PEFT's"
            " merge_and_unload"
        )


def _split(adapter: Adapter) -> tuple[list[Parts], dict[str, TensorEntry]]:
    """Return the adapted layers, and by the base's name what else the adapter has."""
    layers: dict[str, Parts] = {}
    others: dict[str, TensorEntry] = {}
    for name, entry in adapter.checkpoint.items():
        plain = name.removeprefix(PREFIX)
        at = slot(plain, ATTRIBUTES["LORA"])
        if at is None:
            others[plain_name(plain)] = entry
            continue
        parts = plain.split(".")
        path = ".".join(parts[:at])
        rest = [part for part in parts[at:] if part != "weight"]
        layers.setdefault(path, Parts(path, {})).tensors[".".join(rest)] = entry
    return list(layers.values()), others


def _united(own: dict[str, TensorEntry], pairs: list[tuple[str, str]]) -> dict[str, TensorEntry]:
    """Return the base's entries with each tied pair as one: some formats, as DCP, store a tied weight twice."""
    found = dict(own)
    for name, kept in pairs:
        one, other = found.get(kept), found.get(name)
        if one is not None and other is not None and one.name != other.name and one.shape == other.shape:
            joined = replace(one, aliases=(*one.aliases, other.name, *other.aliases))
            found |= dict.fromkeys((joined.name, *joined.aliases), joined)
    return found


def _tied_by_tokens(checkpoint: Checkpoint, others: dict[str, TensorEntry]) -> list[tuple[str, str]]:
    """Return the weights whose trained tokens follow the input embedding's: PEFT saves those once, and wraps both."""
    end = f".{TOKENS}.{DELTA}"
    kept = [name.removesuffix(end) for name in others if name.endswith(end)]
    wrapped = {
        name.removeprefix(PREFIX).partition(f".{TOKENS}.")[0]
        for entry in checkpoint.values()
        for name in (entry.name, *entry.aliases)
        if f".{TOKENS}." in name
    }
    return [(f"{name}.weight", f"{kept[0]}.weight") for name in sorted(wrapped - set(kept))] if len(kept) == 1 else []


def _tied_by_config(folders: list[Path]) -> list[tuple[str, str]]:
    config = next((path for folder in folders if (path := folder / "config.json").is_file()), None)
    data = read_json(config) if config is not None else None
    if not isinstance(data, dict) or not data.get("tie_word_embeddings", False):
        return []
    return list(tied_pairs(config).items())


def _by_name(base: Checkpoint, folders: list[Path]) -> dict[str, TensorEntry]:
    """Return the base's entries by name; a tied weight, which its files store once, under both of its names."""
    found = {name: base[name] for entry in base.values() for name in (entry.name, *entry.aliases)}
    config = next((path for folder in (base.folder, *folders) if (path := folder / "config.json").is_file()), None)
    data = read_json(config) if config is not None else None
    if not isinstance(data, dict) or not data.get("tie_word_embeddings", False):
        return found
    for dropped, kept in tied_pairs(config).items():
        if dropped not in found and kept in found:
            entry = replace(found[kept], aliases=(*found[kept].aliases, dropped))
            found |= dict.fromkeys((entry.name, *entry.aliases), entry)
    return found


def _base_names(parts: Parts, source: Mapping[str, TensorEntry]) -> bool:
    return any(name.startswith(f"{parts.layer}.") for name in source)


def _model_type(folders: list[Path], base: Checkpoint | None) -> str:
    places = [*folders, *([base.folder] if base is not None else [])]
    configs = (read_json(folder / "config.json") for folder in places)
    found = next((config for config in configs if isinstance(config, dict)), {})
    return str(found.get("model_type", ""))


def _checkpoint_of(checkpoint: Checkpoint, base: Checkpoint | None, entries: dict[str, TensorEntry]) -> Checkpoint:
    both = [checkpoint] if base is None else [base, checkpoint]
    result = Checkpoint(
        checkpoint.path,
        f"{checkpoint.format} with its LoRA folded in",
        entries,
        folder=both[0].folder,
        step=checkpoint.step,
        world=checkpoint.world,
        info={key: value for key, value in checkpoint.info.items() if key != "adapter"},
        warnings=tuple(dict.fromkeys(text for one in both for text in one.warnings)),
        sources=tuple(dict.fromkeys(path for one in both for path in one.sources)),
        is_deepspeed=checkpoint.is_deepspeed,
    )
    for one in both:
        result.signatures |= one.signatures
    return result
