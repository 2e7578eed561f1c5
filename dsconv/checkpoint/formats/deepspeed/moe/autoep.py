"""AutoEP: Hugging Face MoE layers that DeepSpeed spread over ranks, put back as transformers has them; also at ZeRO-3.

AutoEP replaces a MoE block by one whose experts are three tensors per rank (w1 gate, w2 down, w3 up; dimension 0 counts
this rank's experts) and calls its router, shared experts and their gate by names of its own. Here they come out as
transformers 5 holds them: ``experts.gate_up_proj`` with the gate's rows before the up's, ``experts.down_proj``,
``gate``.

Facts read from DeepSpeed: ``module_inject/auto_ep_layer.py`` ``AutoEPMoELayer.__init__`` (names),
``moe/ep_repack.py`` (what is cut from where), ``checkpoint/autoep_affine.py`` (which experts a rank has, in which
order), ``module_inject/auto_ep_presets`` (every preset names its blocks alike, but for shared experts),
``runtime/zero/stage3.py`` ``_zero3_partition_group_metadata`` (the ranks over which each ZeRO-3 sub-group is
partitioned).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import find_config, read_config
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.moe.experts import (
    Assembly,
    ExpertLayer,
    ExpertTensor,
    Share,
    owner_of,
)
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.regions import box
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError
from dsconv.text import count, quote
from dsconv.zero_utils.tag_folder import TagFolder

# Presets and the model types that they are for (DeepSpeed module_inject/auto_ep_presets/*.py PRESET).
PRESETS = {"mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"}
MODEL_TYPES = {
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "deepseek_v2",
    "deepseek_v3",
    "minimax_m3_vl_text",
}
OVERRIDES = ("moe_layer_pattern", "expert_pattern", "router_pattern", "expert_w1", "expert_w2", "expert_w3",
             "shared_experts_pattern", "shared_experts_gate_pattern")  # fmt: skip
WEIGHTS = ("w1", "w2", "w3")
MAX_EXPERTS = 1_000_000  # of a layer, and layers of a model: a number in a file must not size a list
SECOND_GATE = ".gate.gate."  # the router is also registered as "gate" where transformers records its logits


@dataclass(frozen=True)
class AutoEPLayer:
    """One replaced block.

    ``path`` is its module, ``placement`` each rank's experts in the order in which the rank packs them, ``ep_rank`` the
    rank whose model states say this.
    """

    path: str
    experts: int
    placement: tuple[tuple[int, ...], ...]
    as_transformers: bool
    ep_rank: int

    def owns(self, name: str) -> bool:
        prefix, _, weight = name.rpartition(".experts.")
        return prefix == self.path and weight in WEIGHTS

    def shares(self, name: str, shape: tuple[int, ...], ep_rank: int, ep_size: int) -> list[Share]:
        mine = self.placement[ep_rank] if ep_size == len(self.placement) else None
        if mine is None or not shape or shape[0] != len(mine):
            raise InconsistentCheckpointError(
                f"parameter {quote(name)} of shape {list(shape)} on expert-parallel rank {ep_rank} of {ep_size};"
                f" ds_autoep_layers has {count(len(self.placement), 'such rank')} of"
                f" {[len(experts) for experts in self.placement][:8]} experts. They are not from one save"
            )
        each = math.prod(shape[1:])
        weight = name.rpartition(".")[2]
        return [self._share(weight, shape[1:], expert, index * each) for index, expert in enumerate(mine)]

    def shares_of_all(self, name: str, shape: tuple[int, ...]) -> list[Share]:
        """Return where the experts of a tensor belong that holds all of them in order."""
        weight, each = name.rpartition(".")[2], math.prod(shape[1:])
        return [self._share(weight, shape[1:], expert, expert * each) for expert in range(self.experts)]

    def in_file(self, key: str, shape: tuple[int, ...], expert: int) -> Share | None:
        name, _, number = key.rpartition(".")
        return (
            self._share(name.rpartition(".")[2], shape, expert, 0)
            if self.owns(name) and number == str(expert)
            else None
        )

    def stacks(self, ep_rank: int, tensors: list[ExpertTensor]) -> Iterator[tuple[str, TensorEntry]]:
        """Yield the names that rank ``ep_rank`` gives its three tensors, and each as that rank holds it in 16 bits.

        The 16-bit tensor is put together from the files of the rank's experts.
        """
        mine = self.placement[ep_rank] if ep_rank < len(self.placement) else ()
        for weight in WEIGHTS if mine else ():
            name = f"{self.path}.experts.{weight}"
            by_key = {tensor.key: tensor for tensor in tensors}
            held = [by_key[key] for expert in mine if (key := f"{name}.{expert}") in by_key]
            if len(held) == len(mine) and len({(tensor.tensor.dtype, tensor.tensor.shape) for tensor in held}) == 1:
                first = held[0].tensor
                yield name, TensorEntry(name, first.dtype, (len(mine), *first.shape), partial(_stacked, held))

    def _share(self, weight: str, shape: tuple[int, ...], expert: int, start: int) -> Share:
        """Return where an expert's matrix goes, whose elements lie from ``start`` on in the rank's own tensor."""
        if len(shape) != 2:
            raise MalformedError(
                f"{self.path}.experts.{weight}: an expert's weight of shape {list(shape)}; expected a matrix"
            )
        rows, columns = shape
        name, height, first = f"{self.path}.experts.{weight}", rows, 0
        if self.as_transformers and weight == "w2":
            name = f"{self.path}.experts.down_proj"
        elif self.as_transformers:
            name, height, first = f"{self.path}.experts.gate_up_proj", 2 * rows, rows if weight == "w3" else 0
        return Share(
            name, (self.experts, height, columns), box((expert, first, 0), (1, rows, columns)), start, rows * columns
        )


def _stacked(experts: list[ExpertTensor]) -> tuple[Piece, ...]:
    """Return the pieces of experts' tensors one behind the other."""
    pieces = []
    for number, expert in enumerate(experts):
        each = expert.tensor.numel
        pieces += [replace(piece, start=piece.start + number * each) for piece in expert.file.pieces(expert.tensor)]
    return tuple(pieces)


@dataclass
class Naming:
    """AutoEP's layers by their number among MoE layers, and how names are turned back into the model's.

    Without such layers nothing is renamed. ``prefixes`` maps a prefix of names to what is put in its place.
    """

    layers: dict[int, ExpertLayer] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the model is, for people."""
        return "AutoEP" if self.layers else "MoE"

    def name(self, name: str) -> str:
        """Return the model's own name of a tensor."""
        old = next((prefix for prefix in self.prefixes if name.startswith(prefix)), None)
        return name if old is None else self.prefixes[old] + name[len(old) :]

    def is_second(self, name: str) -> bool:
        """Return whether ``name`` is the second name that AutoEP may give the router, where both are saved."""
        return any(
            isinstance(layer, AutoEPLayer) and name.startswith(f"{layer.path}{SECOND_GATE}")
            for layer in self.layers.values()
        )

    def renamed(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Return ``entries`` by the model's own names, without the second name that AutoEP may give the router."""
        result: dict[str, TensorEntry] = {}
        for entry in entries.values():
            name = self.name(entry.name)
            if name in result:
                if SECOND_GATE in entry.name:
                    continue
                raise InconsistentCheckpointError(
                    f"tensors {quote(entry.name)} and another would both be {quote(name)} of the model"
                )
            aliases = tuple(alias for alias in entry.aliases if self.name(alias) == alias)
            result[name] = replace(entry, name=name, aliases=aliases)
        return result


@dataclass(frozen=True)
class Experts:
    """A checkpoint with expert files: the main model states, AutoEP's naming, the MoE layers, their files' tensors."""

    states: ModuleStates
    naming: Naming
    layers: list[ExpertLayer]
    tensors: list[ExpertTensor]


def naming_of(states: ModuleStates, folder: TagFolder, warnings: list[str]) -> Naming:
    """Return what the model states say about AutoEP.

    Raises:
        UnsupportedError: AutoEP was folded with tensor parallelism.
        MalformedError: The description of the layers is not one.
    """
    if "folding" in states.raw and isinstance(states.raw["folding"], dict):
        raise UnsupportedError(
            f"{states.path}: AutoEP folded with tensor parallelism (AutoTP); this version does not merge that"
        )
    rows = states.fields.listing("ds_autoep_layers") or states.fields.listing("autoep_layers")
    if not rows:
        return Naming()
    if not all(isinstance(row, dict) for row in rows):
        raise MalformedError(f"{states.path}: ds_autoep_layers is {safe_repr(rows)}; expected a list of layers")
    options = states.config.get("expert_parallel")
    options = options if isinstance(options, dict) else {}
    own = [key for key in OVERRIDES if options.get(key) is not None]
    if own:
        warnings.append(
            f"AutoEP ran with name patterns of the run's own ({', '.join(own)}), so the model's names of its experts"
            " are not known: they keep AutoEP's names (experts.w1, w2 and w3 for gate, down and up; router.gate;"
            " shared_experts)"
        )
    elif options.get("preset_model") not in PRESETS and _model_type(folder) not in MODEL_TYPES:
        warnings.append(
            "neither expert_parallel.preset_model nor a config.json beside the checkpoint says which model AutoEP was"
            " given: its experts are named and laid out as transformers 5 has them in all models that AutoEP has"
            " presets for (experts.gate_up_proj, experts.down_proj)"
        )
    naming = Naming()
    for row in rows:
        number, layer = _layer(row, states, not own)
        naming.layers[number] = layer
        if not own:
            gated = any(name.startswith(f"{layer.path}.shared_experts_gate.") for name in states.module)
            for old in ("router.gate.", "router.", SECOND_GATE[1:]):
                naming.prefixes[f"{layer.path}.{old}"] = f"{layer.path}.gate."
            if gated:  # the models of Qwen (qwen2_moe, qwen3_5_moe); the other presets name it as AutoEP does
                naming.prefixes[f"{layer.path}.shared_experts."] = f"{layer.path}.shared_expert."
                naming.prefixes[f"{layer.path}.shared_experts_gate."] = f"{layer.path}.shared_expert_gate."
    return naming


def whole_experts(entries: dict[str, TensorEntry], naming: Naming) -> dict[str, TensorEntry]:
    """Return ``entries`` with AutoEP's tensors of all experts, one behind the other, as the model has them.

    A universal checkpoint holds them so (DeepSpeed ``checkpoint/autoep_universal.py``).

    Raises:
        InconsistentCheckpointError: A tensor holds another number of experts.
    """
    layers = list(naming.layers.values())
    result: dict[str, TensorEntry] = {}
    experts = Assembly()
    for name, entry in entries.items():
        layer = owner_of(layers, name)
        if not isinstance(layer, AutoEPLayer):
            result[name] = entry
            continue
        where = entry.pieces[0].extent.record.path if entry.pieces else Path(name)
        if len(entry.shape) != 3 or entry.shape[0] != layer.experts:
            raise InconsistentCheckpointError(
                f"{where}: {quote(name)} has shape {list(entry.shape)}, and the model states say {layer.experts}"
                " experts"
            )
        for share in layer.shares_of_all(name, entry.shape):
            pieces = partial(slice_pieces, entry.layout, share.start, share.numel, share.region, name)
            experts.add(share, entry.dtype, pieces, where)
    result.update((entry.name, entry) for entry in experts.entries(lambda name: "parameter"))
    return result


def _model_type(folder: TagFolder) -> str | None:
    """Return the ``model_type`` of the config.json that belongs to the checkpoint, or None if it is not known."""
    path = find_config([folder.path, folder.save_dir])
    config = read_config(path) if path is not None else None
    kind = config.get("model_type") if config is not None else None
    return kind if isinstance(kind, str) else None


def _layer(row: dict[str, Any], states: ModuleStates, as_transformers: bool) -> tuple[int, AutoEPLayer]:
    """Return the number and the layer that a row of ``ds_autoep_layers`` describes.

    Without a placement, experts are spread evenly and in order.
    """
    path, placed = row.get("module_path"), row.get("expert_placement")
    number, experts, ep_size, ep_rank = (
        _natural(row.get(key, 0)) for key in ("moe_layer_id", "num_experts", "ep_size", "ep_rank")
    )
    placement: list[Any] = []
    if isinstance(placed, dict) and isinstance(placed.get("ranks"), list):
        by_rank = {entry.get("rank"): entry.get("experts") for entry in placed["ranks"] if isinstance(entry, dict)}
        placement = [by_rank.get(rank) for rank in range(len(by_rank))]
    elif placed is None and ep_size > 0 and experts % ep_size == 0:
        here = experts // ep_size
        placement = [list(range(rank * here, (rank + 1) * here)) for rank in range(ep_size)]
    good = isinstance(path, str) and min(number, experts, ep_size, ep_rank) >= 0 and len(placement) == ep_size
    good = good and all(isinstance(mine, list) and all(type(expert) is int for expert in mine) for mine in placement)
    if (
        not isinstance(path, str)
        or not good
        or {expert for mine in placement for expert in mine} != set(range(experts))
    ):
        raise MalformedError(
            f"{states.path}: ds_autoep_layers has a layer {safe_repr(row, 200)} that does not place each of its experts"
        )
    path = states.unwrapped(path)
    return number, AutoEPLayer(path, experts, tuple(tuple(mine) for mine in placement), as_transformers, ep_rank)


def _natural(value: Any) -> int:
    """Return ``value``, or -1 where it is not a count."""
    return value if type(value) is int and 0 <= value < MAX_EXPERTS else -1
