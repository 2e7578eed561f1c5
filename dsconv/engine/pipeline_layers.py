"""A causal language model of transformers as the layers of DeepSpeed's PipelineModule.

A layer holds the model's own submodules under their own paths, so a parameter of the pipeline is called ``{number of
the layer}.{its name in transformers}``; a tied embedding's is ``tied_modules.embed.{its name}``. Only hidden states
pass from stage to stage. Positions, rotary embeddings and masks follow from their shape: each layer computes them with
the calls of the model's own ``forward`` (transformers ``modeling_llama.py``, ``modeling_mistral.py``,
``modeling_qwen2.py``, ``modeling_qwen3.py``, ``modeling_gpt2.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.errors import UnsupportedError

TIED = "embed"


@dataclass(frozen=True)
class Paths:
    """The paths of the submodules of a family of models; ``places`` is a learned embedding of positions."""

    embedding: str
    blocks: str
    norm: str
    head: str = "lm_head"
    places: str | None = None
    dropout: str | None = None
    rotary: str | None = None


_LLAMA = Paths("model.embed_tokens", "model.layers", "model.norm", rotary="model.rotary_emb")
_GPT2 = Paths(
    "transformer.wte", "transformer.h", "transformer.ln_f", places="transformer.wpe", dropout="transformer.drop"
)
FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


@dataclass
class Donor:
    """The model from which layers take their parts.

    A stage takes its own parts; the others are freed when ``model`` is set to None.
    """

    model: Any


class Layer(nn.Module):
    """A layer of the donor's parts, each under its own path."""

    def __init__(self, donor: Donor, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.paths = paths
        self.config = donor.model.config
        for path in paths:
            *parents, name = path.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(name, donor.model.get_submodule(path))

    def part(self, number: int) -> nn.Module:
        return self.get_submodule(self.paths[number])


class Single(Layer):
    """A layer of one part: the embedding of tokens, the last norm, or the head."""

    def forward(self, x: Tensor) -> Any:
        return self.part(0)(x)


class Places(Layer):
    """A learned embedding of positions and the dropout that follows it."""

    def forward(self, hidden: Tensor) -> Any:
        return self.part(1)(hidden + self.part(0)(_positions(hidden)))


class Block(Layer):
    """A decoder layer; ``index`` is its number in the model."""

    def __init__(self, donor: Donor, paths: tuple[str, ...], index: int) -> None:
        super().__init__(donor, paths)
        self.index = index

    def forward(self, hidden: Tensor) -> Any:
        positions = _positions(hidden)
        extra = {"position_embeddings": self.part(1)(hidden, position_ids=positions)} if len(self.paths) > 1 else {}
        return self.part(0)(
            hidden, attention_mask=self._mask(hidden, positions), position_ids=positions, use_cache=False, **extra
        )

    def _mask(self, hidden: Tensor, positions: Tensor) -> Any:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        types = getattr(self.config, "layer_types", None)
        of_all = self.config.model_type == "mistral" and self.config.sliding_window is not None
        sliding = types[self.index] == "sliding_attention" if types else of_all
        make = create_sliding_window_causal_mask if sliding else create_causal_mask
        return make(config=self.config, inputs_embeds=hidden, attention_mask=None, cache=None, position_ids=positions)


def _positions(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


def _as_head(embedding: Layer, hidden: Tensor) -> Tensor:
    weight: Any = embedding.part(0).weight
    return nn.functional.linear(hidden, weight)


def paths_of(config: Any) -> Paths:
    """Return the paths of a model's parts. Raises UnsupportedError if its family is not known here."""
    paths = FAMILIES.get(config.model_type)
    if paths is None:
        raise UnsupportedError(
            f"--pp: the engine has pipeline stages for {', '.join(FAMILIES)}, but not for {config.model_type}: use"
            " --zero-stage 3 or --tp"
        )
    return paths


def layer_specs(donor: Donor) -> list[Any]:
    """Return DeepSpeed's LayerSpecs of the model; the modules take their parts from ``donor`` when they are built."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    paths = paths_of(donor.model.config)
    embedding, head = donor.model.get_submodule(paths.embedding), donor.model.get_submodule(paths.head)
    tied = embedding.weight is head.weight
    shared = (TIED, Single, donor, (paths.embedding,))
    first = (
        TiedLayerSpec(*shared, tied_weight_attr=f"{paths.embedding}.weight")
        if tied
        else LayerSpec(Single, donor, (paths.embedding,))
    )
    specs = [first]
    if paths.places and paths.dropout:
        specs.append(LayerSpec(Places, donor, (paths.places, paths.dropout)))
    rotary = (paths.rotary,) if paths.rotary else ()
    blocks: Any = donor.model.get_submodule(paths.blocks)
    specs += [LayerSpec(Block, donor, (f"{paths.blocks}.{index}", *rotary), index) for index in range(len(blocks))]
    specs.append(LayerSpec(Single, donor, (paths.norm,)))
    if tied:
        specs.append(TiedLayerSpec(*shared, forward_fn=_as_head, tied_weight_attr=f"{paths.embedding}.weight"))
    else:
        specs.append(LayerSpec(Single, donor, (paths.head,)))
    return specs


def pipeline_names(config: Any) -> dict[str, str]:
    """Return {name of a parameter in transformers: its name in the pipeline}, using no memory for the model."""
    from transformers import AutoModelForCausalLM

    paths_of(config)
    with torch.device("meta"):
        donor = Donor(AutoModelForCausalLM.from_config(config))
    names: dict[str, str] = {}
    for number, spec in enumerate(layer_specs(donor)):
        prefix = f"tied_modules.{spec.key}" if hasattr(spec, "key") else str(number)
        names |= {name: f"{prefix}.{name}" for name, _ in spec.build().named_parameters()}
    return names
