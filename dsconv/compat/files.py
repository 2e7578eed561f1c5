"""What the functions of ``zero_to_fp32.py`` read from single files, without running a pickle."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.errors import CheckpointNotFoundError, MalformedError, MissingShardError, PartitionedExpertsError
from dsconv.urls import local_path


@dataclass
class zero_model_state:  # noqa: N801 - DeepSpeed's name
    """What ``parse_model_states`` finds in one file. Buffers are fp32 where they are floats."""

    buffers: dict[str, Any]
    param_shapes: list[dict[str, Any]]
    shared_params: list[list[str]]
    ds_version: str | None
    frozen_param_shapes: dict[str, Any] | None
    frozen_param_fragments: dict[str, Any] | None


def atoi(text: str) -> int | str:
    """Return a number for digits, and any other text as it is."""
    return int(text) if text.isdecimal() else text


def natural_keys(text: str) -> list[int | str]:
    """Return a key that sorts numbers in text by their value."""
    return [atoi(part) for part in re.split(r"(\d+)", text)]


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> str:
    """Return the path of the model states of rank 0 in a tag folder. Raises CheckpointNotFoundError."""
    folder = local_path(checkpoint_dir, "a folder whose files are listed")
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"Directory '{folder}' doesn't exist")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
    path = folder / name
    if not path.exists():
        raise CheckpointNotFoundError(f"can't find model states file at '{path}'")
    return str(path)


def get_checkpoint_files(checkpoint_dir: str | os.PathLike[str], glob_pattern: str) -> list[str]:
    """Return the paths in a folder that match a pattern, in natural order. Raises CheckpointNotFoundError for none."""
    folder = local_path(checkpoint_dir, "a folder whose files are listed")
    found = sorted(map(str, folder.glob(glob_pattern)), key=natural_keys)
    if not found:
        raise CheckpointNotFoundError(f"can't find {glob_pattern} files in directory '{folder}'")
    return found


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """Return the paths of the optimizer files in a tag folder. Raises CheckpointNotFoundError for none."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """Return the paths of the model states in a tag folder. Raises CheckpointNotFoundError for none."""
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def zero3_partitioned_param_info(unpartitioned_numel: int, world_size: int) -> tuple[int, int]:
    """Return (elements of a rank's partition, padding of all) of a parameter at stage 3."""
    partitioned_numel = math.ceil(unpartitioned_numel / world_size)
    return partitioned_numel, -unpartitioned_numel % world_size


def parse_model_states(files: Iterable[str | os.PathLike[str]]) -> list[zero_model_state]:
    """Read model-states files.

    Args:
        files: Their paths.

    Returns:
        What each holds, in their order.

    Raises:
        MalformedError: A file is not a model-states file; it is a ValueError.
        PartitionedExpertsError: A file is of AutoEP at ZeRO-3; it is a NotImplementedError too.
        UnsafeError: A file wants to run code.
    """
    import torch

    def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Size]:
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    found = []
    for path in map(Path, files):
        states = read_module_states(path)
        if "buffer_names" not in states.raw:
            raise MalformedError(f"{path} is not a model state checkpoint")
        _refuse_partitioned_experts(states)
        names = set(states.buffer_names)
        buffers = {name: value for name, value in states.module.items() if name in names}
        read = _read(states.file, buffers)
        floats = {name: value.float() if value.is_floating_point() else value for name, value in read.items()}
        frozen = states.raw.get("frozen_param_shapes")
        fragments = states.raw.get("frozen_param_fragments")
        found.append(
            zero_model_state(
                buffers=floats,
                param_shapes=[sizes(group) for group in states.param_shapes],
                shared_params=[[alias, owner] for alias, owner in states.shared_params.items()],
                ds_version=states.ds_version,
                frozen_param_shapes=None if frozen is None else sizes(states.frozen_shapes),
                frozen_param_fragments=None if fragments is None else _read(states.file, states.frozen_fragments),
            )
        )
    return found


def parse_optim_states(
    files: Iterable[str | os.PathLike[str]], ds_checkpoint_dir: str | os.PathLike[str]
) -> tuple[int, int, list[list[Any]], Any]:
    """Read the fp32 masters of optimizer files.

    Args:
        files: Their paths, in the order of ranks.
        ds_checkpoint_dir: Their folder, for the message.

    Returns:
        The ZeRO stage, the number of ranks, the flat masters of each rank's groups, and the alignment paddings.

    Raises:
        MalformedError: A file is not of a ZeRO checkpoint; it is a ValueError.
        MissingShardError: Files are missing; it is a ValueError too.
        UnsafeError: A file wants to run code.
    """
    opened = [TorchFile(Path(file)) for file in files]
    states = [_optimizer(file) for file in opened]
    if not states or type(states[0].get("zero_stage")) is not int:
        raise MalformedError(f"{opened[0].path if opened else ds_checkpoint_dir} is not a zero checkpoint")
    stage, count = states[0]["zero_stage"], states[0].get("partition_count")
    world = max(count) if isinstance(count, list) and count else count
    if world != len(states):
        raise MissingShardError(
            f"Expected {world} of '*_optim_states.pt' under '{os.fspath(ds_checkpoint_dir)}' but found {len(states)}"
            " files. Possibly due to an overwrite of an old checkpoint, or a checkpoint didn't get saved by one or"
            " more processes."
        )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = []
    for file, state in zip(opened, states, strict=True):
        flat = state.get(key)
        if not isinstance(flat, (list, tuple)) or not all(isinstance(part, TensorRef) for part in flat):
            raise MalformedError(f"{file.path}: {key} does not hold tensors")
        groups.append(list(_read(file, {str(index): part for index, part in enumerate(flat)}).values()))
    return stage, len(states), groups, states[0].get("param_alignment_paddings")


def _refuse_partitioned_experts(states: ModuleStates) -> None:
    """Raise PartitionedExpertsError for AutoEP at ZeRO-3, as DeepSpeed ``utils/zero_to_fp32.py``
    ``_raise_if_autoep_zero3_partitioned_state`` does.
    """
    layers = states.fields.listing("ds_autoep_layers") or states.fields.listing("autoep_layers")
    if any(isinstance(layer, dict) and layer.get("checkpoint_format") == "zero3_partitioned" for layer in layers):
        raise PartitionedExpertsError(
            f"{states.path}: AutoEP at ZeRO-3 partitions the experts over their own ranks, and joining the partitions"
            " of all ranks would make wrong experts. get_fp32_state_dict_from_zero_checkpoint and dsconv zero-to-fp32"
            " merge such a checkpoint, and DeepSpeed's ds_to_universal.py converts it"
        )


def _optimizer(file: TorchFile) -> dict[str, Any]:
    state = file.root.get("optimizer_state_dict") if isinstance(file.root, dict) else None
    if not isinstance(state, dict):
        raise MalformedError(f"{file.path} is not a zero checkpoint")
    return state


def _read(file: TorchFile, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors among the values, read, in their order."""
    entries = [
        TensorEntry(name, ref.dtype, ref.shape, partial(file.pieces, ref), (), "buffer")
        for name, ref in tensors.items()
        if isinstance(ref, TensorRef)
    ]
    return load_tensors(entries)
