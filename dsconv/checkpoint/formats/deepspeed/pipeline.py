"""Pipeline checkpoints: a model whose layers are spread over stages, and perhaps over tensor-parallel ranks too.

DeepSpeed ``runtime/pipe/module.py`` saves each layer as ``layer_LL[-model_TT]-model_states.pt`` with names of
its own (``l.weight``); ``mp_rank_XX`` (stage-major: stage × degree + tensor rank) has no weights, but the names that
the trained module gives them (``1.l.weight``, ``tied_modules.KEY.weight``), and the optimizer files have the masters
under those. A tied layer is on several stages and is written once. Without masters (stage 0 in fp32 or fp16) only the
trainer's patterns can tell the key of a tied layer; if they do not, its weights have the layer's number as others do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dsconv.checkpoint.formats import copies
from dsconv.checkpoint.formats.deepspeed import consistency, rank_map, stage0, tensor_parallel, zero
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.rank_map import RankMap
from dsconv.checkpoint.formats.deepspeed.shards import Rules
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import Ambiguous, MasterSlot, match_masters
from dsconv.checkpoint.formats.deepspeed.unread import refuse_unread, warn_of_unread
from dsconv.checkpoint.formats.deepspeed.values import entry_prefix_matches
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.renaming import renamed, unwrap
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from dsconv.text import count, quote
from dsconv.zero_utils.tag_folder import LAYER, LAYERS_OF_TRANSFORMERS, TagFolder

TIED = re.compile(r"tied_modules\.(?P<key>[^.]+)\.(?P<local>.+)")
_PREFIX = re.compile(r"(?:\d+|tied_modules\.[^.]+)\.(?P<local>.+)")


@dataclass
class Layer:
    """One layer's file of one tensor-parallel rank, with its tensors by their local names."""

    index: int
    file: TorchFile
    tensors: dict[str, TensorRef]


def read_pipeline(folder: TagFolder) -> Checkpoint:
    """Read the tensor map of a folder with layer files.

    Raises:
        MissingShardError: A file is missing.
        MalformedError: A file does not hold what its name says.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: Names, masters or the way that shards make a tensor cannot be determined.
    """
    warnings = list(folder.warnings)
    layers = read_layers(folder, warnings)
    degree = len(layers)
    ranks = tensor_parallel.read_ranks(folder, warnings, partial(_read_stage, layers=layers))
    if len(ranks) % degree:
        raise MissingShardError(
            f"{folder.path}: {count(len(ranks), 'model-parallel rank')} and layer files of {degree} tensor-parallel"
            " ones: some are missing"
        )
    first = ranks[0].states
    info = first.universal_info
    rules = UniversalInfo(info, first.path, first.stored) if info is not None else None
    entries = {tp: _join_stages(layers[tp], ranks[tp::degree], rules, warnings) for tp in range(degree)}
    joining: Rules | None = rules
    full = entries[0]
    if degree > 1:
        joining = tensor_parallel.rules_of(folder, first)
        full = tensor_parallel.join_ranks(entries, joining)
    world = {
        "data_parallel": ranks[0].data_parallel,
        "model_parallel": len(ranks),
        "pipeline_parallel": len(ranks) // degree,
        "tensor_parallel": degree,
    }
    files = [layer.file for mine in layers.values() for layer in mine.values()]
    ordered = dict(sorted(full.items(), key=lambda item: _place(item[0])))
    contents = rank_map.contents_of(ranks, ordered, f"{ranks[0].kind}, pipeline", warnings, world, files)
    checkpoint = rank_map.build_checkpoint(folder, first, contents)
    if not checkpoint.no_training:
        from dsconv.checkpoint.formats.deepspeed.joined_optimizer import join_training

        checkpoint.training = partial(join_training, folder, ranks, entries, ordered, joining)
    return hf_named(checkpoint) if first.raw.get(LAYERS_OF_TRANSFORMERS) is True else checkpoint


def hf_named(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of dsconv's own engine under the names of the transformers model that was cut into layers.

    ``3.model.layers.2.…`` loses its number. All names stay if one is not a layer's, or if two would become one.
    """
    names = {name: match["local"] for name in checkpoint if (match := _PREFIX.fullmatch(name))}
    return renamed(checkpoint, names) if len(names) == len(checkpoint) == len(set(names.values())) else checkpoint


def _place(name: str) -> int:
    """Return where a name stands in a PipelineModule's own state dict: tied modules first, then layers by number."""
    head = name.partition(".")[0]
    return int(head) if head.isascii() and head.isdigit() and len(head) < 10 else -1


def read_layers(folder: TagFolder, warnings: list[str]) -> dict[int, dict[int, Layer]]:
    """Return {tensor-parallel rank: {number of the layer: layer}}.

    Args:
        folder: The tag's folder.
        warnings: Warnings are added.

    Raises:
        MissingShardError: A rank lacks a layer.
        MalformedError: A file holds no state dict.
        UnsupportedError: It holds weights that are no plain tensors.
    """
    layers: dict[int, dict[int, Layer]] = {}
    for path in folder.layers:
        match = LAYER.fullmatch(path.name)
        if match is None:
            raise MalformedError(f"{path}: not a layer's file by its name")
        file = TorchFile(path)
        consistency.own_name(file)
        if not isinstance(file.root, dict) or not all(isinstance(name, str) for name in file.root):
            raise MalformedError(f"{path}: not a layer's state dict: it holds a {type(file.root).__name__}")
        for name, value in file.root.items():
            refuse_unread(path, name, value)
        warnings += warn_of_unread(path, file.root)
        held = {name: value for name, value in file.root.items() if isinstance(value, TensorRef)}
        names = unwrap(held, outer=False)
        tensors = {names(name): value for name, value in held.items()}
        index = int(match["layer"])
        layers.setdefault(int(match["mp"] or 0), {})[index] = Layer(index, file, tensors)
    every = sorted({index for mine in layers.values() for index in mine})
    for tp in range(max(layers) + 1):
        absent = next((index for index in every if index not in layers.get(tp, {})), None)
        if absent is not None:
            raise MissingShardError(
                f"{folder.path}: no layer_{absent:02d}-model_{tp:02d}-model_states.pt, and there is one of another"
                " tensor-parallel rank: copy it from the node that wrote it"
            )
    return dict(sorted(layers.items()))


def _read_stage(folder: TagFolder, mp: int, warnings: list[str], layers: dict[int, dict[int, Layer]]) -> RankMap:
    """Return the masters of one mp rank by global name; there are none at stage 0 without BF16_Optimizer."""
    mine = folder.of_rank(mp)
    if mine.optimizer:
        return zero.read_rank(mine, warnings, partial(_shapes_of, layers[mp % len(layers)]))
    states = stage0.read_states(mine)
    if folder.own_weights:
        return stage0.own_weights_map(states, {})
    return RankMap(states, {}, [], stage0.KIND, 0, states.data_parallel)


def _tied(names: Iterable[str]) -> dict[str, set[str]]:
    """Return {key of a tied module: its local names} for those among global names."""
    keys: dict[str, set[str]] = {}
    for name in names:
        if match := TIED.fullmatch(name):
            keys.setdefault(match["key"], set()).add(match["local"])
    return keys


def _shapes_of(layers: dict[int, Layer], numels: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters by global name; a tied one has that of the layers that could be it, if they
    agree.
    """
    shapes = {
        f"{index}.{name}": tensor.shape for index, layer in layers.items() for name, tensor in layer.tensors.items()
    }
    for key, names in _tied(numels).items():
        for name in names:
            full = f"tied_modules.{key}.{name}"
            fitting = [layer.tensors[name].shape for layer in layers.values() if names <= set(layer.tensors)]
            found = {shape for shape in fitting if math.prod(shape) == numels[full]}
            if len(found) == 1:
                shapes[full] = found.pop()
    return shapes


def _prefix_of(layer: Layer, entries: Mapping[str, TensorEntry], names: set[str]) -> str:
    """Return what the trained module puts before a layer's local names: its number, or the key of a tied module.

    Args:
        layer: The layer.
        entries: The masters by global name.
        names: All global names that the stages list.

    Raises:
        UnsupportedError: The layer could be either of two tied modules.
    """
    if any(name.startswith(f"{layer.index}.") for name in names):
        return f"{layer.index}."
    keys = [
        key
        for key, locals_ in _tied(names).items()
        if locals_ <= set(layer.tensors) and _fits(layer, key, locals_, entries)
    ]
    if len(keys) > 1:
        raise UnsupportedError(
            f"{layer.file.path}: it could be either of the tied modules {', '.join(sorted(keys))}: their weights are"
            " alike"
        )
    return f"tied_modules.{keys[0]}." if keys else f"{layer.index}."


def _fits(layer: Layer, key: str, locals_: set[str], entries: Mapping[str, TensorEntry]) -> bool:
    for name in locals_:
        entry = entries.get(f"tied_modules.{key}.{name}")
        if entry is not None and not entry_prefix_matches(entry, layer.file, layer.tensors[name]):
            return False
    return True


def _join_stages(
    layers: dict[int, Layer], stages: Sequence[RankMap], rules: UniversalInfo | None, warnings: list[str]
) -> dict[str, TensorEntry]:
    """Return one tensor-parallel rank's tensors by global name: all stages' masters, then what only layers hold."""
    entries: dict[str, TensorEntry] = {}
    with Sources() as sources:
        for stage in stages:
            for name, entry in stage.entries.items():
                if name in entries:
                    _same_copy(entries[name], entry, rules, warnings, sources)
                else:
                    entries[name] = entry
        buffers = {name for stage in stages for name in stage.states.buffer_names}
        listed = {name for stage in stages for group in stage.states.param_shapes for name in group}
        names = set(entries) | buffers | listed
        if rules is not None and not any(stage.partitions for stage in stages):
            names |= rules.tied_names
        for layer in layers.values():
            prefix = _prefix_of(layer, entries, names)
            states = _as_states(layer, prefix, stages, buffers)
            _check_weights(states, entries, warnings)
            ties = states.ties()
            for owner, aliases in ties.items():
                if owner in entries:
                    known = entries[owner].aliases
                    entries[owner] = replace(entries[owner], aliases=(*known, *(a for a in aliases if a not in known)))
            found = states.module_entries(exclude={n for stage in stages for n in stage.entries}, ties=ties)
            for name, entry in found.items():
                if name in entries:
                    _same_copy(entries[name], entry, rules, warnings, sources)
                elif any(stage.partitions for stage in stages) or (listed and name not in listed):
                    entries[name] = entry
                else:
                    entries[name] = stage0.as_parameter(entry)
    _need_layers(layers, names, stages)
    if not any(stage.partitions or stage.own_weights for stage in stages):
        _take_masters(stages, entries)
    return entries


def _as_states(layer: Layer, prefix: str, stages: Sequence[RankMap], buffers: set[str]) -> ModuleStates:
    """Return a layer as if its file were the model states of a whole model, under global names."""
    module = {prefix + name: tensor for name, tensor in layer.tensors.items()}
    return replace(
        stages[0].states,
        file=layer.file,
        module=module,
        buffer_names=sorted(buffers),
        param_shapes=[
            {name: shape for name, shape in group.items() if name in module}
            for stage in stages
            for group in stage.states.param_shapes
        ],
        shared_params={},
        lists_frozen=False,
    )


def _check_weights(states: ModuleStates, entries: Mapping[str, TensorEntry], warnings: list[str]) -> None:
    consistency.masters_match_module(
        states, {name: entries[name] for name in states.module if name in entries}, warnings
    )


def _same_copy(
    first: TensorEntry, other: TensorEntry, rules: UniversalInfo | None, warnings: list[str], sources: Sources
) -> None:
    """Raise InconsistentCheckpointError unless two stages hold the same tensor.

    If the trainer said so, the first stage's copy is the right one and a difference is a warning (DeepSpeed
    ``checkpoint/ds_to_universal.py`` ``extract_zero_shards`` skips ``pipeline_replicated_parameter_patterns`` on later
    stages).
    """
    if first.shape == other.shape and copies.same(first, 0, other, 0, first.numel, sources):
        return
    paths = " and ".join(
        entry.pieces[0].extent.record.path.name if entry.pieces else "a file" for entry in (first, other)
    )
    if rules is not None and first.shape == other.shape and rules.is_pipeline_replicated(first.name):
        warnings.append(
            f"tied tensor {quote(first.name)} differs between {paths}: the first was taken, as the trainer's metadata"
            " says"
        )
        return
    raise InconsistentCheckpointError(
        f"tied tensor {quote(first.name)} differs between {paths}: the files are from different saves, or the stages"
        " trained it apart (it is not among the tied_weight_attr of its TiedLayerSpec); which is right the checkpoint"
        " does not say"
    )


def _need_layers(layers: dict[int, Layer], names: set[str], stages: Sequence[RankMap]) -> None:
    """Raise MissingShardError if a stage lists a name of a layer that has no file."""
    missing = sorted({_place(name) for name in names} - set(layers) - {-1})
    if missing:
        name = next(name for name in sorted(names) if _place(name) == missing[0])
        raise MissingShardError(
            f"{stages[0].states.path.parent}: no layer_{missing[0]:02d}-*model_states.pt, which {quote(name)} belongs"
            " to. Copy it from the node that wrote it"
        )


def _take_masters(stages: Sequence[RankMap], entries: dict[str, TensorEntry]) -> None:
    """Replace weights by the masters of fp16 training without ZeRO, which each stage's optimizer has without names.

    A stage's layers follow those of the stage before it. Its tied modules may be in layer files of earlier stages.
    """
    found: dict[str, TensorEntry] = {}
    last = -1
    for stage in stages:
        later = {name: entry for name, entry in entries.items() if entry.role != "buffer" and _place(name) > last}
        masters = _masters_of(stage, entries, later)
        if not masters:
            return
        last = max((_place(name) for name in masters if name in later), default=last)
        mine = {name: entries[name] for name in masters}
        for name, entry in stage0.replaced_by_masters(stage.states.file, mine, masters).items():
            if name in found:
                with Sources() as sources:
                    _same_copy(found[name], entry, None, [], sources)
            else:
                found[name] = entry
        stage.masters = masters
    for name, entry in entries.items():
        entries[name] = found.get(name) or (replace(entry, role="frozen") if entry.role == "parameter" else entry)


def _masters_of(
    stage: RankMap, entries: Mapping[str, TensorEntry], later: Mapping[str, TensorEntry]
) -> dict[str, MasterSlot]:
    """Return the masters of a stage: of layers behind the last stage's, or of tied modules too, which come first."""
    file, optimizer = stage.states.file, stage.states.optimizer
    try:
        return match_masters(file, optimizer, later, {})
    except Ambiguous:
        tied = {name: entry for name, entry in entries.items() if entry.role != "buffer" and name not in later}
        if not tied:
            raise
        return match_masters(file, optimizer, tied | dict(later), {})
