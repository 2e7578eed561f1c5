"""Read the states of a DeepSpeed universal checkpoint, which ``universal.py`` finds: ``zero/`` and the model states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states
from dsconv.checkpoint.formats.deepspeed.moe.autoep import naming_of, whole_experts
from dsconv.checkpoint.formats.deepspeed.moe.experts import owner_of
from dsconv.checkpoint.formats.deepspeed.partitions import frozen_entry
from dsconv.checkpoint.formats.deepspeed.rank_map import Contents, build_checkpoint, master_dtypes
from dsconv.checkpoint.formats.deepspeed.universal_training import read_training
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import (
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    UnsafeError,
    UnsupportedError,
)
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import UNIVERSAL, UNIVERSAL_SETTINGS, TagFolder


def read_states(folder: TagFolder) -> Checkpoint:
    if folder.kinds:
        raise InconsistentCheckpointError(
            f"{folder.path}: holds both a universal checkpoint ({UNIVERSAL}/) and ZeRO optimizer files "
            f"({next(iter(folder.kinds))}): move one of them to a folder of its own"
        )
    stage = _stage(folder)
    all_states = _model_states(folder, stage)
    states = all_states[0]
    model_parallel = len(folder.model) if stage < 3 else len({mp for mp, _ in folder.zero3})
    warnings = list(folder.warnings)
    ties = states.ties()
    listing = all_states if model_parallel > 1 else [states]
    shapes = {name: shape for of in listing for group in of.param_shapes for name, shape in group.items()}
    whole: bool | None = model_parallel == 1
    if stage == 0:
        shapes = _with_states(folder, listing)
        whole = whole if states.module else None
    naming = naming_of(states, folder, warnings)
    entries = {}
    for name, shape in shapes.items():
        is_expert = owner_of(list(naming.layers.values()), name) is not None
        # The model states list a rank's own experts, the files hold all of them.
        entry = _parameter(folder, name, states.stored.get(name, name), shape, None if is_expert else whole)
        entries[name] = replace(entry, aliases=tuple(ties.get(name, ())))
    if stage == 3 and model_parallel > 1:
        _refuse_shards(
            folder, [name for of in all_states for name in of.frozen_shapes if name not in entries], model_parallel
        )
        entries.update(states.module_entries(exclude=set(entries), ties=ties, only=set(states.buffer_names)))
    elif stage == 3:
        for name, shape in states.frozen_shapes.items():
            if name not in entries:
                entries[name] = frozen_entry(name, shape, all_states, len(all_states), ties)
        entries.update(states.module_entries(exclude=set(entries), ties=ties, only=set(states.buffer_names)))
    else:
        rest = states.module_entries(exclude=set(entries), ties=ties)
        _refuse_shards(folder, sorted(name for name, entry in rest.items() if entry.role == "frozen"), model_parallel)
        entries.update(rest)
        if not states.module:
            entries.update(_copies(folder, entries, {name for of in all_states for name in of.buffer_names}, warnings))
        uncut = {name: entry for name, entry in entries.items() if name in shapes and entry.shape == shapes[name]}
        if model_parallel == 1:
            consistency.masters_match_module(states, uncut, warnings)
    world = len(all_states) if stage == 3 and model_parallel == 1 else states.data_parallel
    entries = naming.renamed(whole_experts(entries, naming))
    info: dict[str, Any] = {"master_dtype": master_dtypes(entries)}
    if stage:
        info["parameter_groups"] = len(states.param_shapes)
    contents = Contents(
        states.in_module_order(entries),
        "DeepSpeed universal",
        stage,
        [of.file for of in all_states],
        warnings,
        {"data_parallel": world, "model_parallel": model_parallel},
        info,
        "its experts are stacked, and their optimizer states are not" if naming.layers else "",
    )
    checkpoint = build_checkpoint(folder, states, contents)
    if not contents.no_training:
        zero = folder.path / UNIVERSAL
        checkpoint.training = partial(read_training, zero, zero / UNIVERSAL_SETTINGS, stage, all_states, entries)
    return checkpoint


def _with_states(folder: TagFolder, all_states: list[ModuleStates]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a source without ZeRO, whose model states list none.

    They are the tensors of ``module`` that have files of states. A pipeline's module lies in layer files, which are not
    here: its shapes are not known and come out as ().
    """
    trained = {path.parent.name for path in (folder.path / UNIVERSAL).glob("*/*.pt") if path.name != "fp32.pt"}
    shapes: dict[str, tuple[int, ...]] = {}
    for states in all_states:
        for name, value in states.module.items():
            if isinstance(value, TensorRef) and states.stored.get(name, name) in trained:
                shapes[name] = value.shape
    has_module = any(isinstance(value, TensorRef) for states in all_states for value in states.module.values())
    return shapes if has_module else dict.fromkeys(sorted(trained), ())


def _refuse_shards(folder: TagFolder, frozen: list[str], model_parallel: int) -> None:
    if frozen and model_parallel > 1:
        raise UnsupportedError(
            f"{folder.path}: frozen weights such as {quote(frozen[0])} in"
            f" {counted(model_parallel, 'model-parallel rank')}; a"
            " universal checkpoint does not say how their shards fit together"
        )


def _copies(
    folder: TagFolder, known: Mapping[str, TensorEntry], buffers: Set[str], warnings: list[str]
) -> dict[str, TensorEntry]:
    """Return the fp32 copies in ``zero/`` of a pipeline's frozen weights and buffers.

    A universal checkpoint has no layer files. dsconv writes such copies, the official tool does not.
    """
    names = sorted(
        path.parent.name for path in (folder.path / UNIVERSAL).glob("*/fp32.pt") if path.parent.name not in known
    )
    found = {name: _parameter(folder, name, name, (), whole=None) for name in names}
    if found:
        warnings.append(
            f"frozen weights and buffers of a pipeline ({len(found):,}, such as {quote(names[0])}) are kept as fp32"
            " copies"
        )
    if lost := sorted(buffers - set(found) - set(known)):
        warnings.append(
            f"buffers such as {quote(lost[0])} were in the pipeline's layer files and are not in this universal"
            " checkpoint"
        )
    return {name: replace(entry, role="buffer" if name in buffers else "frozen") for name, entry in found.items()}


def _stage(folder: TagFolder) -> int:
    """Return the ZeRO stage of the source, which says how the model states are to be read."""
    path = folder.path / UNIVERSAL / UNIVERSAL_SETTINGS
    if not path.is_file():
        raise MissingShardError(
            f"{path}: missing; the conversion to a universal checkpoint was not finished: run it again"
        )
    root = TorchFile(path).root
    # BF16_Optimizer, which is stage 1, writes none.
    stage = root.get("zero_stage", 1) if isinstance(root, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise MalformedError(f"{path}: the ZeRO stage is {safe_repr(stage)}; expected 0, 1, 2 or 3")
    return stage


def _model_states(folder: TagFolder, stage: int) -> list[ModuleStates]:
    """Return the model states of each model-parallel rank.

    Those of stage 3 without model parallelism are of each data-parallel rank, if frozen weights are shared out.
    """
    if stage < 3:
        if sorted(folder.model) != list(range(len(folder.model))) or not folder.model:
            found = ", ".join(path.name for path in folder.model.values()) or "none"
            raise MissingShardError(
                f"{folder.path}: expected mp_rank_00_model_states.pt, and the following ranks where there are any,"
                f" which hold the names of the parameters; found {found}"
            )
        return [read_module_states(path) for _, path in sorted(folder.model.items())]
    if any(mp for mp, _ in folder.zero3):
        ranks = sorted({mp for mp, _ in folder.zero3})
        lost = next((mp for mp in range(ranks[-1] + 1) if (mp, 0) not in folder.zero3), None)
        if lost is not None:
            raise MissingShardError(
                f"{folder.path}: no zero_pp_rank_0_mp_rank_{lost:02d}_model_states.pt, and there are some of rank"
                f" {ranks[-1]}"
            )
        of_ranks = [read_module_states(folder.zero3[mp, 0]) for mp in ranks]
        said = [states.model_parallel for states in of_ranks]
        if any(count != len(ranks) for count in said):
            raise InconsistentCheckpointError(
                f"{folder.path}: model states of {counted(len(ranks), 'model-parallel rank')}, which say that there are"
                f" {safe_repr(said[:8])} (mp_world_size): a file was renamed, or is from another save"
            )
        return of_ranks
    if (0, 0) not in folder.zero3:
        raise MissingShardError(
            f"{folder.path}: no zero_pp_rank_0_mp_rank_00_model_states.pt, which holds the names of the parameters"
        )
    first = read_module_states(folder.zero3[0, 0])
    world = first.data_parallel if any(math.prod(shape) for shape in first.frozen_shapes.values()) else 1
    missing = next((dp for dp in range(world) if (0, dp) not in folder.zero3), None)
    if missing is not None:
        raise MissingShardError(
            f"{folder.path}: frozen weights lie in the model states of {counted(world, 'rank')}; missing those of rank"
            f" {missing}: "
            f"expected zero_pp_rank_{missing}_mp_rank_00_model_states.pt"
        )
    all_states = [first, *(read_module_states(folder.zero3[0, dp]) for dp in range(1, world))]
    for dp, other in enumerate(all_states):
        consistency.written_as(other.file, dp)
        consistency.same_save(first, other)
    return all_states


def _parameter(folder: TagFolder, name: str, stored: str, shape: tuple[int, ...], whole: bool | None) -> TensorEntry:
    """Return the entry of a parameter in ``zero/``.

    Args:
        folder: The tag's folder.
        name: The parameter, by its name in the model.
        stored: The name of its folder, which wrappers may have a part in.
        shape: Its shape by the model states.
        whole: Whether ``shape`` is that of the full parameter (True), of a shard of it (False), or not known (None). A
            parameter that was cut as a view with more dimensions is written as the view: its first dimensions are made
            one again.

    Raises:
        UnsafeError: The name is a path that leaves the folder.
        MissingShardError: Its file is missing.
        MalformedError: The file does not hold a tensor.
        InconsistentCheckpointError: The tensor has another size than the model states say.
    """
    if not stored or stored in (".", "..") or "/" in stored or "\0" in stored:
        raise UnsafeError(
            f"{folder.path}: a parameter is named {safe_repr(stored)}, which leaves {UNIVERSAL}/; refused"
        )
    path = folder.path / UNIVERSAL / stored / "fp32.pt"
    if not path.is_file():
        raise MissingShardError(
            f"{path}: missing; parameter {quote(name)} has no weights. The conversion was not finished, or files were"
            " lost"
        )
    file = TorchFile(path)
    value = file.root
    tensor = value.get("param") if isinstance(value, dict) else value
    if not isinstance(tensor, TensorRef):
        raise MalformedError(
            f"{path}: holds a {type(value).__name__} without 'param'; expected the tensor of parameter {quote(name)}"
        )
    cut = isinstance(value, dict) and value.get("vocab_tensor") is True
    without_padding = cut and len(shape) == 2 and tensor.shape[1:] == shape[1:] and tensor.shape[0] <= shape[0]
    if without_padding or whole is None:
        shape = tensor.shape
    elif isinstance(value, dict) and not whole:
        folded = max(len(tensor.shape) - len(shape) + 1, 1)
        shape = (math.prod(tensor.shape[:folded]), *tensor.shape[folded:]) if shape else shape
    elif tensor.numel != math.prod(shape):
        raise InconsistentCheckpointError(
            f"{path}: parameter {quote(name)} has shape {list(tensor.shape)}; the model states say {list(shape)}. "
            "The files are not from one conversion"
        )
    layout = partial(file.pieces, tensor)
    layout()  # bounds are proved now
    return TensorEntry(name, tensor.dtype, shape, layout)
