"""Read folders in which each rank saved one file of torch.save, of DTensors, FSDP1's ShardedTensors or plain tensors.

verl writes them (``model_world_size_N_rank_R.pt`` beside ``fsdp_config.json`` and ``huggingface/``; verl 0.6
``utils/checkpoint/fsdp_checkpoint_manager.py``), accelerate with ``use_dcp=False`` or LOCAL_STATE_DICT
(``pytorch_model_fsdp_I_rankR.bin``, ``pytorch_model_fsdp_rankR.bin``; accelerate ``utils/fsdp_utils.py``), and
plain scripts (``NAME_rank_R.pt``, ``rank_R.pt``).

Each file says for each tensor on which mesh it lies and how, so a rank's share follows from the rank
(``checkpoint/map/placements.py``). Copies on several ranks must have the same bytes, which the files' CRC-32s show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.config_files import find_config
from dsconv.checkpoint.formats.checks import check_not_hollow, unwrapped
from dsconv.checkpoint.formats.copies import same_bytes
from dsconv.checkpoint.formats.items.models import Items, choose_model
from dsconv.checkpoint.formats.items.state_dicts import Leaf, walk
from dsconv.checkpoint.formats.rank_files.dtensors import DTensor, Mesh, Reader, ShardedTensor, describe
from dsconv.checkpoint.formats.rank_files.groups import Group, choose_group, homes_in, is_rank_file, pick_home
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.placements import local_region, region_in_order
from dsconv.checkpoint.map.regions import Region, is_whole, numel_of, shape_of, show
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.storage.roots import Root
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, SeveralModelsError
from dsconv.text import count


@dataclass(frozen=True)
class Held:
    """A tensor as one rank's file holds it: the part of the full tensor (None for all of it), and where it lies."""

    rank: int
    file: TorchFile
    region: Region | None
    tensor: TensorRef


def detect(root: Root, tag: str | None) -> bool:
    """Return whether ``path`` is a rank's file, or a folder of them (or verl's, with ``actor/`` in it)."""
    path = root.path
    return is_rank_file(path) if path.is_file() else bool(homes_in(path))


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the map of the files of all ranks.

    Args:
        root: The folder, or any file of the save that is meant where the folder holds several.
        tag: Not used: such a folder holds one step.
        item: The model to take, if there are several: verl's role, a group of files, or a key in the files.

    Raises:
        SeveralModelsError: There are several models, and ``item`` is None.
        MissingShardError: The file of a rank, or a rank's share of a tensor, is missing.
        InconsistentCheckpointError: The files are not from one save.
        MalformedError: A file is damaged, or holds no tensors.
        UnsupportedError: A tensor lies on the ranks in a way that dsconv does not read.
    """
    path: Path = root.path
    home, wanted = (path.parent, item) if path.is_file() else pick_home(path, item)
    warnings: list[str] = []
    group, wanted = choose_group(path, home, wanted, warnings)
    ranks = sorted(group.files)
    root.fetch(group.files.values())
    files = {rank: TorchFile(group.files[rank]) for rank in ranks}
    items, found = _find(files, wanted)
    warnings += items.warnings
    _check_ranks(group, files, found)
    entries = _entries(files, found)
    if not all(file.archive.checksummed for file in files.values()):
        warnings.append(
            "the files were saved without checksums: neither damage nor differing copies on the ranks can be detected"
        )
    warnings += check_not_hollow(entries, path, (home, home.absolute().parent))
    entries, removed = unwrapped(entries)
    info: dict[str, Any] = {"files": group.name}
    if removed:
        info["removed_prefixes"] = removed
    if items.left_out:
        info["left_out"] = dict(sorted(items.left_out.items()))
    if item is not None or len(items.models) > 1:
        info |= {"item": item or items.key, "models": items.models}
    config = find_config((home, path))
    return Checkpoint(
        path,
        group.kind,
        entries,
        folder=config.parent if config is not None else home,
        step=_step(home),
        world={"ranks": len(ranks)},
        info=info,
        warnings=tuple(warnings),
        sources=tuple(group.files[rank] for rank in ranks),
    )


def _step(home: Path) -> int | None:
    """Return the step that verl's ``global_step_N/actor`` or the Trainer's ``checkpoint-N`` names."""
    for part in reversed(home.absolute().parts[-2:]):
        match = re.fullmatch(r"(?:global_step_|checkpoint-)(\d{1,12})", part)
        if match:
            return int(match[1])
    return None


def _find(files: dict[int, TorchFile], item: str | None) -> tuple[Items, dict[str, dict[int, Any]]]:
    """Return what the files hold, and {name: {rank: tensor}} of the model that is wanted."""
    first = files[min(files)].path
    leaves: dict[str, Leaf] = {}
    values: dict[int, dict[str, Any]] = {}
    for rank, file in files.items():
        if not isinstance(file.root, dict):
            raise MalformedError(f"{file.path}: holds a {type(file.root).__name__}; expected a state dict")
        values[rank] = {}
        for parts, (leaf, value, key) in walk(file.root, file.path, describe).items():
            if isinstance(key, str):
                flat = "\0".join(parts)
                leaves.setdefault(flat, leaf)
                values[rank][flat] = value
    if not any(leaf.is_tensor for leaf in leaves.values()):
        raise MalformedError(f"{first}: holds no tensors")
    try:
        items = choose_model(leaves, first, item)
    except SeveralModelsError:
        _refuse_other_keys(files, values, leaves, item)
        raise
    meshes: dict[tuple[Any, ...], Mesh] = {}
    found: dict[str, dict[int, TensorRef | DTensor | ShardedTensor]] = {}
    for rank, file in files.items():
        reader = Reader(file.path, meshes)
        for flat, value in values[rank].items():
            if flat in items.chosen:
                name = items.chosen[flat]
                tensor = reader.read(name, value)
                if tensor is None:
                    raise MalformedError(f"{file.path}: {safe_repr(name)} is not a tensor, as it is in {first.name}")
                found.setdefault(name, {})[rank] = tensor
    return items, found


def _refuse_other_keys(
    files: dict[int, TorchFile], values: dict[int, dict[str, Any]], leaves: dict[str, Leaf], item: str | None
) -> None:
    """Raise InconsistentCheckpointError if ranks keep their model under different keys, each of them just one."""
    keys = {
        rank: choose_model({flat: leaves[flat] for flat in held}, files[rank].path, item).key
        for rank, held in values.items()
        if any(leaves[flat].is_weight for flat in held)
    }
    first = min(keys)
    for rank, key in keys.items():
        if key != keys[first]:
            raise InconsistentCheckpointError(
                f"{files[rank].path}: the model lies under {safe_repr(key)}, in {files[first].path.name} under"
                f" {safe_repr(keys[first])}; the files are not from one save"
            )


def _check_ranks(group: Group, files: dict[int, TorchFile], found: dict[str, dict[int, Any]]) -> None:
    """Raise unless each file was written by the rank in its name, all by one run, and no rank's file is missing."""
    told = 0  # the number of ranks that the tensors tell
    for tensors in found.values():
        spread = {rank: tensor for rank, tensor in tensors.items() if not isinstance(tensor, TensorRef)}
        first = min(spread, default=0)
        for rank, tensor in spread.items():
            if tensor.rank != rank and (tensor.rank is not None or rank in tensor.mesh.ranks):
                by = "another rank" if tensor.rank is None else f"rank {tensor.rank}"
                raise InconsistentCheckpointError(
                    f"{files[rank].path}: was written by {by}, but its name says rank {rank}; files were renamed or"
                    " swapped"
                )
            if group.world and tensor.world > group.world:
                raise InconsistentCheckpointError(
                    f"{files[rank].path}: was written on a {_ground(tensor)}, but its name says"
                    f" {count(group.world, 'rank')}"
                )
            if _of_other_runs(spread[first], tensor):
                raise InconsistentCheckpointError(
                    f"{files[rank].path}: was written on a {_ground(tensor)}, but {files[first].path.name} on a"
                    f" {_ground(spread[first])}: one of them is from another run; move it away"
                )
            told = max(told, tensor.world)
    world = group.world or max(told, max(files) + 1)
    lowest = min(files)
    missing = sorted(set(range(world)) - set(files))
    if missing:
        raise MissingShardError(
            f"{files[lowest].path.parent}: the save has {count(world, 'rank')}, and the files of rank"
            f" {', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''} are missing, such as"
            f" {_renumbered(files[lowest].path.name, lowest, missing[0])}. Copy them from the nodes that wrote them"
        )
    surplus = max(files)
    if surplus >= (group.world or told or world):
        raise InconsistentCheckpointError(
            f"{files[surplus].path}: the other files are from a run of {group.world or told} ranks, so this one is left"
            " over from another run; move it away"
        )


def _ground(tensor: DTensor | ShardedTensor) -> str:
    return str(tensor.mesh) if isinstance(tensor, DTensor) else f"group of {count(tensor.world, 'rank')}"


def _of_other_runs(a: DTensor | ShardedTensor, b: DTensor | ShardedTensor) -> bool:
    """Return whether two ranks' parts of a tensor cannot be from one run.

    Their meshes have different shapes, or share ranks without being the same.
    """
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        return a.mesh is not b.mesh and (a.mesh.shape != b.mesh.shape or not set(a.mesh.ranks).isdisjoint(b.mesh.ranks))
    return type(a) is not type(b) or a.world != b.world


def _renumbered(name: str, rank: int, other: int) -> str:
    head, _, tail = name.rpartition(str(rank))
    return f"{head}{other}{tail}"


def _entries(files: dict[int, TorchFile], found: dict[str, dict[int, Any]]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for name, tensors in found.items():
        first = next(iter(tensors.values()))
        for rank, tensor in tensors.items():
            if type(tensor) is not type(first) or _key(tensor) != _key(first):
                raise InconsistentCheckpointError(
                    f"{files[rank].path}: {safe_repr(name)} is {_said(tensor)}, in"
                    f" {files[next(iter(tensors))].path.name} {_said(first)}; the files are not from one save"
                )
        held = _held(name, files, tensors)
        _same_copies(name, held)
        parts = list({part.region: part for part in reversed(held)}.values())[::-1]
        for part in parts:
            _pieces([part])  # bounds are proved now, not when the bytes are wanted
        # As text, since a file can choose shapes that hash alike.
        identity = repr((first.shape, [(part.rank, part.tensor.view_key) for part in parts]))
        owner = owners.setdefault(identity, name) if parts else name
        if owner != name:  # the same memory under two names
            aliases.setdefault(owner, []).append(name)
        else:
            entries[name] = TensorEntry(name, first.dtype, first.shape, partial(_pieces, parts))
    return {
        name: (
            TensorEntry(name, entry.dtype, entry.shape, entry.layout, tuple(aliases[name]))
            if name in aliases
            else entry
        )
        for name, entry in entries.items()
    }


def _key(tensor: TensorRef | DTensor | ShardedTensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.shape) if isinstance(tensor, TensorRef) else tensor.key


def _said(tensor: TensorRef | DTensor | ShardedTensor) -> str:
    return f"a plain {tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, TensorRef) else str(tensor)


def _held(name: str, files: dict[int, TorchFile], tensors: dict[int, Any]) -> list[Held]:
    """Return all that the ranks hold of a tensor, except empty shares. A region is None for the whole tensor."""
    if all(isinstance(tensor, ShardedTensor) for tensor in tensors.values()):
        return _boxes(name, files, tensors)
    if all(isinstance(tensor, TensorRef) for tensor in tensors.values()):
        return [Held(rank, files[rank], None, tensor) for rank, tensor in tensors.items() if tensor.numel]
    members: dict[int, DTensor] = {rank: tensor for rank, tensor in tensors.items() if tensor.coordinate is not None}
    for mesh in {id(tensor.mesh): tensor.mesh for tensor in members.values()}.values():
        lost = sorted(set(mesh.ranks) - set(members))
        if lost:
            raise MissingShardError(
                f"{files[lost[0]].path}: lacks {safe_repr(name)}, which the other files say lies on a {mesh}"
            )
    problem = ""
    for rule in (local_region, region_in_order):
        held = []
        for rank, tensor in members.items():
            region = rule(tensor.shape, tensor.mesh.shape, tensor.coordinate or (), tensor.placements)
            if region is None or shape_of(region) != tensor.local.shape:
                problem = problem or (
                    f"{files[rank].path}: {safe_repr(name)}, {tensor}, holds a share of {list(tensor.local.shape)} at"
                    f" {list(tensor.coordinate or ())} of a {tensor.mesh}; expected {list(shape_of(region or ()))}"
                )
                break
            if numel_of(region):
                held.append(Held(rank, files[rank], None if is_whole(region, tensor.shape) else region, tensor.local))
        else:
            return held
    raise InconsistentCheckpointError(problem)


def _boxes(name: str, files: dict[int, TorchFile], tensors: dict[int, ShardedTensor]) -> list[Held]:
    shape, owners = next((tensor.shape, tensor.owners) for tensor in tensors.values())
    held = [
        (region, Held(rank, files[rank], None if is_whole(region, shape) else region, part))
        for rank, tensor in tensors.items()
        for region, part in tensor.local
        if part.numel
    ]
    have = {region for region, _ in held}
    for region, rank in owners:
        if numel_of(region) and region not in have:
            where = files[rank].path if rank in files else files[min(files)].path.parent
            raise MissingShardError(
                f"{where}: lacks the shard {show(region)} of {safe_repr(name)} that the files say rank {rank} holds"
            )
    return [part for _, part in held]


def _same_copies(name: str, held: list[Held]) -> None:
    """Raise InconsistentCheckpointError if two ranks hold different bytes for the same part."""
    first: dict[Region | None, Held] = {}
    for part in held:
        original = first.setdefault(part.region, part)
        if original is not part and not same_bytes(original.file, original.tensor, part.file, part.tensor):
            raise InconsistentCheckpointError(
                f"{part.file.path}: {safe_repr(name)} differs from the copy in {original.file.path.name}, and nothing"
                " says that it is sharded. The files are from different saves, or each rank has its own (like the"
                " running statistics of BatchNorm): make it the same on all ranks before saving, or leave it out"
            )


def _pieces(parts: Iterable[Held]) -> tuple[Piece, ...]:
    return tuple(
        Piece(piece.extent, 0, piece.numel, piece.shape, piece.strides, part.region)
        for part in parts
        for piece in part.file.pieces(part.tensor)
    )
