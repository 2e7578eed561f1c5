"""The layers of a base that a LoRA changes: which parameter, by what product, with which scaling.

Rules: peft ``tuners/lora/model.py`` (``_create_and_replace``: ranks and alphas by pattern),
``tuners/lora/layer.py`` (``ParamWrapper`` for target_parameters), ``utils/other.py`` (``get_pattern_key``, trained
modules and tokens)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.convert.adapters.methods import DELTA, TOKENS
from dsconv.convert.adapters.patterns import by_pattern, ends, require_few
from dsconv.convert.computed import computed
from dsconv.convert.lora_math import Lora, folded_bias, folded_weight, read_as, with_tokens
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import quote

CONV1D = {
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
}  # transformers' models with Conv1D: [in, out]
CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
TRANSPOSED_EXPERTS = {"gpt_oss", "openai_privacy_filter", "aria"}  # is_transposed=True: experts as [experts, in, out]


@dataclass
class Parts:
    """The tensors of one adapted layer, by what PEFT calls them; ``path`` has the nesting of wrapped parameters."""

    path: str
    tensors: dict[str, TensorEntry]

    @property
    def layer(self) -> str:
        return plain_name(self.path)


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


@dataclass
class Folder:
    """One fold: ``source`` are the base's entries by name, ``upcast`` says that the adapter was loaded by itself."""

    config: Mapping[str, Any]
    source: Mapping[str, TensorEntry]
    model_type: str
    dtype: DType | None
    upcast: bool
    where: Path
    touched: set[str] = field(default_factory=set)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @cached_property
    def target_parameters(self) -> frozenset[str]:
        """The parameters, or the ends of their names, that the adapter targets."""
        return frozenset(self.config.get("target_parameters") or ())

    def fold(self, layers: list[Parts], others: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Return the folded model's entries by name."""
        result = {entry.name: entry for entry in self.source.values()}
        names = {name: entry.name for name, entry in self.source.items()}  # and aliases, to their owner's
        tokens: dict[str, TensorEntry] = {}
        for name, entry in others.items():
            if name.endswith(f".{TOKENS}.{DELTA}"):
                tokens[name.removesuffix(f".{TOKENS}.{DELTA}")] = entry
            elif name in names or _plain_copy(name) not in others:  # of two, PEFT loads the plain name
                self._replace(result, names, name, entry)
        folded: set[str] = set()
        require_few(self.config, len(layers))
        for parts in layers:
            for name, entry in self._layer(parts, result, names):
                if name in folded:
                    raise UnsupportedError(
                        f"{self.where}: {quote(parts.layer)} and another adapted layer share {quote(name)}; --fold-lora"
                        " does not fold two products into tied weights. Use PEFT's merge_and_unload"
                    )
                folded.add(name)
                self.touched |= {name, *entry.aliases}
                result[name] = entry
        for module, delta in tokens.items():
            name = self._owner(names, f"{module}.weight", module)
            base = result[name]
            rows = self._token_rows(module, delta)
            if max(rows) >= base.shape[0] or base.shape[1:] != delta.shape[1:]:
                raise self._misfit(module, base, delta)
            kind = output_dtype(base.dtype, self.dtype)
            result[name] = computed(
                name, kind, base.shape, partial(with_tokens, base, delta, rows, kind), base, delta, aliases=base.aliases
            )
        return result

    def _replace(self, result: dict[str, TensorEntry], names: dict[str, str], name: str, entry: TensorEntry) -> None:
        """Put a tensor that was trained whole in the place of the base's; a tied one is on its own from there on."""
        self.touched.add(name)
        owner = names.get(name)
        if owner is None:
            if self.upcast:
                raise InconsistentCheckpointError(
                    f"{self.where}: {quote(entry.name)} replaces {quote(name)}, which the base does not have"
                )
            result[name] = replace(entry, name=name)
            names[name] = name
            return
        old = result[owner]
        if entry.shape != old.shape:
            if entry.shape[1:] != old.shape[1:] or not entry.shape:
                raise self._misfit(name, old, entry)
            self.resized[name] = (old.shape, entry.shape)  # a vocabulary that has grown: see vocabulary.py
        if self.upcast and entry.dtype != (kind := output_dtype(old.dtype, self.dtype)):
            # PEFT copies it into the module that the base was loaded into.
            entry = computed(name, kind, entry.shape, partial(read_as, entry, kind), entry)
        if owner != name:
            result[owner] = replace(old, aliases=tuple(alias for alias in old.aliases if alias != name))
            result[name] = replace(entry, name=name, aliases=())
            names[name] = name
        elif old.aliases:
            first, *rest = old.aliases
            result[first] = replace(old, name=first, aliases=tuple(rest))
            names |= dict.fromkeys(old.aliases, first)
            result[name] = replace(entry, name=name, aliases=())
        else:
            result[name] = replace(entry, name=name, aliases=())

    def _owner(self, names: Mapping[str, str], name: str, layer: str) -> str:
        if name in names:
            return names[name]
        raise InconsistentCheckpointError(
            f"{self.where}: the adapter changes {quote(layer)}, and the base has no {quote(name)}: they do not belong"
            " together, or the base stores its tensors under other names"
        )

    def _layer(
        self, parts: Parts, result: Mapping[str, TensorEntry], names: Mapping[str, str]
    ) -> Iterable[tuple[str, TensorEntry]]:
        """Yield the folded tensors of one adapted layer, by the name that holds the data."""
        found = dict(parts.tensors)
        embedding = "lora_embedding_A" in found
        down, up = (found.pop(f"lora_embedding_{x}" if embedding else f"lora_{x}", None) for x in "AB")
        magnitude, bias = found.pop("lora_magnitude_vector", None), found.pop("lora_B.bias", None)
        if down is None or up is None or found:
            missing = "lora_A or lora_B" if down is None or up is None else next(iter(found))
            raise UnsupportedError(
                f"{self.where}: the layer {quote(parts.layer)} {'lacks' if not found else 'has'} {missing}, which"
                " --fold-lora does not fold. Use PEFT's merge_and_unload"
            )
        parameter = self._parameter(parts, down, up, result, names)
        name = self._owner(names, f"{parts.layer}.{parameter}", parts.layer)
        base = result[name]
        if bias is not None and f"{parts.layer}.bias" not in names:
            raise UnsupportedError(
                f"{self.where}: {quote(parts.layer)} has a LoRA bias (lora_bias=True), but its base has no bias: PEFT"
                " does not merge it either. Write the adapter with --adapter"
            )
        if not base.dtype.floating or base.dtype.itemsize < 2:
            raise UnsupportedError(
                f"{self.where}: {quote(name)} of the base is {base.dtype}: a product cannot be added to quantized"
                " weights. Name a base in fp32, bf16 or fp16"
            )
        lora = self._lora(parts.layer, parameter, base, Lora(down, up, 1.0, magnitude=magnitude, upcast=self.upcast))
        kind = output_dtype(base.dtype, self.dtype)
        yield (
            name,
            computed(
                name,
                kind,
                base.shape,
                partial(folded_weight, base, lora, kind),
                base,
                *lora.sources,
                aliases=base.aliases,
            ),
        )
        if bias is not None:
            name = self._owner(names, f"{parts.layer}.bias", parts.layer)
            old = result[name]
            if old.shape != bias.shape:
                raise self._misfit(f"{parts.layer}.bias", old, bias)
            kind = output_dtype(old.dtype, self.dtype)
            compute = partial(folded_bias, old, bias, lora.scaling, kind, self.upcast)
            yield name, computed(name, kind, old.shape, compute, old, bias, aliases=old.aliases)

    def _parameter(
        self,
        parts: Parts,
        down: TensorEntry,
        up: TensorEntry,
        result: Mapping[str, TensorEntry],
        names: Mapping[str, str],
    ) -> str:
        """Return which parameter of the layer is adapted: its weight, or the one of target_parameters that fits."""
        targets = self.config.get("target_parameters") or []
        start = f"{parts.layer}."
        own = {name.removeprefix(start): result[owner].shape for name, owner in names.items() if name.startswith(start)}
        fitting = [
            name
            for name, shape in own.items()
            if "." not in name
            and any(f"{start}{name}" == target or f"{start}{name}".endswith(f".{target}") for target in targets)
            and self._fits(shape, down, up)
        ]
        if not fitting:
            return "weight"
        if len(fitting) > 1:
            raise UnsupportedError(
                f"{self.where}: {quote(parts.layer)} has {' and '.join(fitting)} of the same shape, and nothing says"
                " which of them a product belongs to. Use PEFT's merge_and_unload"
            )
        return fitting[0]

    def _fits(self, shape: tuple[int, ...], down: TensorEntry, up: TensorEntry) -> bool:
        sizes = (up.shape[0], down.shape[-1])
        if len(shape) == 3 and self.model_type in TRANSPOSED_EXPERTS:
            return (shape[2], shape[1]) == sizes
        return len(shape) in (2, 3) and tuple(shape[-2:]) == sizes

    def _lora(self, layer: str, parameter: str, base: TensorEntry, lora: Lora) -> Lora:
        """Return ``lora`` with its kind, orientation and scaling; raise InconsistentCheckpointError for a misfit."""
        config = self.config
        is_parameter = not self.target_parameters.isdisjoint(ends(f"{layer}.{parameter}"))
        experts = base.shape[0] if is_parameter and len(base.shape) == 3 else 1
        rank = lora.down.shape[0] // experts
        key = f"{layer}.{parameter}" if is_parameter else layer
        told = by_pattern(config.get("rank_pattern"), key, config.get("r", 8))
        if (
            rank != told
            or lora.down.shape[0] != rank * experts
            or len(lora.up.shape) < 2
            or lora.up.shape[1] != rank * experts
        ):
            raise InconsistentCheckpointError(
                f"{self.where}: {quote(layer)} has factors {list(lora.down.shape)} and {list(lora.up.shape)}, and"
                f" adapter_config.json gives it rank {told}"
            )
        alpha = by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha", 8))
        if alpha is None:
            raise MalformedError(f"{self.where}: adapter_config.json gives {quote(layer)} no lora_alpha")
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        out, into = lora.up.shape[0], lora.down.shape[1]
        if is_parameter:
            transposed = len(base.shape) == 3 and self.model_type in TRANSPOSED_EXPERTS
            fits, kind = self._fits(base.shape, lora.down, lora.up), "experts"
        elif lora.down.name.endswith("lora_embedding_A"):
            fits, kind, transposed = base.shape == (into, out), "embedding", False
        elif len(base.shape) > 2:
            fits, kind, transposed = base.shape[0] == out, "convolution", False
            if len(base.shape) != len(lora.down.shape) or base.shape[1] != into:
                fits = False  # convolutions in groups, which PEFT does not merge
        else:
            kind, transposed = "linear", self._is_transposed(layer, base.shape, out, into)
            fits = base.shape == ((into, out) if transposed else (out, into))
        if not fits:
            raise self._misfit(layer, base, lora.up)
        if lora.magnitude is not None and kind != "embedding" and math.prod(lora.magnitude.shape) != out:
            raise self._misfit(layer, base, lora.magnitude)
        return replace(lora, scaling=scaling, kind=kind, transposed=transposed)

    def _is_transposed(self, layer: str, shape: tuple[int, ...], out: int, into: int) -> bool:
        """Return whether a weight is stored as [in, out], as transformers' Conv1D does."""
        if out != into:
            return shape == (into, out)
        if self.model_type:
            return self.model_type in CONV1D and layer.rpartition(".")[2] in CONV1D_NAMES
        return bool(self.config.get("fan_in_fan_out"))

    def _token_rows(self, module: str, delta: TensorEntry) -> list[int]:
        asked = self.config.get("trainable_token_indices")
        if isinstance(asked, dict):
            asked = next((rows for key, rows in asked.items() if module.endswith(key)), None)
        if not isinstance(asked, list) or not all(type(row) is int and row >= 0 for row in asked):
            raise MalformedError(
                f"{self.where}: trainable_token_indices of adapter_config.json gives no rows for {quote(module)}"
            )
        if len(asked) != delta.shape[0]:
            raise InconsistentCheckpointError(
                f"{self.where}: {quote(module)} has {delta.shape[0]} trained tokens, and trainable_token_indices"
                f" {len(asked)}"
            )
        return asked

    def _misfit(self, layer: str, base: TensorEntry, given: TensorEntry) -> InconsistentCheckpointError:
        return InconsistentCheckpointError(
            f"{self.where}: {quote(given.name)} of shape {list(given.shape)} does not fit {quote(layer)}, whose base"
            f" has shape {list(base.shape)}: the adapter belongs to another base"
        )


def _plain_copy(name: str) -> str | None:
    """Return the plain name of a copy that PEFT saves beside it, as it does of embeddings in ``modules_to_save``.

    peft ``utils/save_and_load.py`` ``get_peft_model_state_dict`` (save_embedding_layers) takes all that lies in them.
    """
    parts = name.split(".")
    for word in ("modules_to_save", "original_module"):
        if word in parts:
            return ".".join(part for part in parts if part != word)
    return None
