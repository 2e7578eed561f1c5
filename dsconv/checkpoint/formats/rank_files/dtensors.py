"""Read one rank's part of a tensor that is spread over ranks: a DTensor, or FSDP1's ShardedTensor.

The attributes are those of torch 2.2 to 2.13: ``DTensor._local_tensor`` and ``._spec``
(``torch/distributed/tensor/_api.py``, ``_dtensor_spec.py``), ``DeviceMesh`` with ``mesh`` and ``_flatten_mesh_list`` to
2.9 and ``_layout`` and ``_flatten_rank_map`` after (``torch/distributed/device_mesh.py``, ``_mesh_layout.py``),
``ShardedTensor.__getstate__`` (``torch/distributed/_shard/sharded_tensor/api.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.items.state_dicts import describe_tensor
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.placements import Placements, Replicate, Shard
from dsconv.checkpoint.map.regions import Region, box, shape_of
from dsconv.checkpoint.pickles.values import Instance, Opaque, TensorRef, safe_repr
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import count

MAX_RANKS = 1 << 20
MAX_SPLIT_FACTOR = 1 << 16  # FSDP2's is the number of tensor-parallel ranks
PLACEMENTS = "placement_types."


@dataclass(frozen=True, eq=False)
class Mesh:
    """Ranks in a grid of ``shape``, row-major. All files of a save share one object for each mesh."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def world(self) -> int:
        """The least number of ranks that the run must have had."""
        return max(self.ranks) + 1

    def __str__(self) -> str:
        return f"mesh {list(self.shape)} of ranks {safe_repr(list(self.ranks))}"


@dataclass(frozen=True)
class DTensor:
    """One rank's view of a DTensor.

    Attributes:
        shape: The shape of the full tensor.
        coordinate: The rank's place in the mesh; None for a rank outside it.
        local: The rank's share.
    """

    dtype: DType
    shape: tuple[int, ...]
    mesh: Mesh
    coordinate: tuple[int, ...] | None
    placements: Placements
    local: TensorRef

    @property
    def rank(self) -> int | None:
        """The rank that wrote this, by its own account; None for a rank outside the mesh."""
        if self.coordinate is None:
            return None
        position = 0
        for size, index in zip(self.mesh.shape, self.coordinate, strict=True):
            position = position * size + index
        return self.mesh.ranks[position]

    @property
    def world(self) -> int:
        """The least number of ranks that the run must have had."""
        return self.mesh.world

    @property
    def key(self) -> tuple[Any, ...]:
        """What the files of all ranks must agree on; ``str`` shows it."""
        return self.dtype, self.shape, self.placements

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with placements ({', '.join(map(str, self.placements))})"


@dataclass(frozen=True)
class ShardedTensor:
    """One rank's view of a ShardedTensor.

    Attributes:
        owners: The boxes of all ranks, each with the rank that holds it; -1 where none is named.
        local: This rank's boxes and their tensors.
    """

    dtype: DType
    shape: tuple[int, ...]
    rank: int
    world: int
    owners: tuple[tuple[Region, int], ...]
    local: tuple[tuple[Region, TensorRef], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the files of all ranks must agree on; ``str`` shows it."""
        return self.dtype, self.shape, self.owners

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {count(len(self.owners), 'shard')}"


class Reader:
    """Reads the values of one file. A mesh, which all tensors of a file share, is read once.

    Args:
        path: The file, for messages.
        meshes: The meshes of all files of the save; new ones are added.
    """

    def __init__(self, path: Path, meshes: dict[tuple[Any, ...], Mesh]) -> None:
        self.path = path
        self._meshes = meshes
        self._read: dict[int, tuple[Mesh, tuple[int, ...] | None]] = {}

    def read(self, name: str, value: Any) -> TensorRef | DTensor | ShardedTensor | None:
        """Read one value of a state dict.

        Args:
            name: Its key.
            value: What the pickle holds.

        Returns:
            The tensor; None for a value that is not a tensor.

        Raises:
            MalformedError: An attribute is not what torch writes.
            UnsupportedError: A placement names no region (``Partial``), or the value is a flat parameter of FSDP1.
        """
        if isinstance(value, TensorRef):
            return value
        if not isinstance(value, Instance):
            return None
        where = f"{self.path}: {safe_repr(name)}"
        if name.rpartition(".")[2] == "_flat_param":
            raise UnsupportedError(
                f"{where}: FSDP's LOCAL_STATE_DICT, flat parameters without the names and shapes of what they hold;"
                " save with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT"
            )
        if value.cls.endswith(".DTensor"):
            return self._dtensor(where, value)
        if value.cls.endswith(".ShardedTensor"):
            return self._sharded_tensor(where, value)
        return None

    def _dtensor(self, where: str, value: Instance) -> DTensor:
        dtype, shape = _kind(where, value)
        state = attributes(value)
        spec = attributes(state.get("_spec"))
        mesh, coordinate = self._mesh(where, spec.get("mesh"))
        placements = spec.get("placements")
        if not isinstance(placements, (tuple, list)) or len(placements) != len(mesh.shape):
            raise MalformedError(
                f"{where}: placements {safe_repr(placements)}; expected one for each dimension of the mesh"
                f" ({len(mesh.shape)})"
            )
        local = state.get("_local_tensor")
        if not isinstance(local, TensorRef):
            raise UnsupportedError(f"{where}: this rank's share is {safe_repr(local)}; dsconv reads plain tensors")
        if local.dtype != dtype:
            raise MalformedError(f"{where}: a tensor of {dtype} whose share is of {local.dtype}")
        return DTensor(
            dtype, shape, mesh, coordinate, tuple(_placement(where, p, len(shape)) for p in placements), local
        )

    def _mesh(self, where: str, value: Any) -> tuple[Mesh, tuple[int, ...] | None]:
        """The mesh and the writer's coordinate in it."""
        known = self._read.get(id(value))
        if known is None:
            shape, ranks, coordinate = _mesh(where, value)
            known = self._read[id(value)] = self._meshes.setdefault((shape, ranks), Mesh(shape, ranks)), coordinate
        return known

    def _sharded_tensor(self, where: str, value: Instance) -> ShardedTensor:
        dtype, shape = _kind(where, value)
        state = value.state
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], list):
            raise MalformedError(f"{where}: a ShardedTensor with the state {safe_repr(state)}")
        group = attributes(state[2])
        rank, world = group.get("global_rank"), group.get("global_world_size")
        if type(rank) is not int or type(world) is not int or not 0 <= rank < world <= MAX_RANKS:
            raise MalformedError(f"{where}: a ShardedTensor of rank {safe_repr(rank)} of {safe_repr(world)}")
        listed = attributes(state[1]).get("shards_metadata")
        if not isinstance(listed, list) or attributes(state[1]).get("size") != shape:
            raise MalformedError(f"{where}: a ShardedTensor whose metadata is not of shape {list(shape)}")
        owners = tuple(_box(where, item, len(shape)) for item in listed)
        local = []
        for shard in state[0]:
            held = attributes(shard)
            tensor = held.get("tensor")
            region = _box(where, held.get("metadata"), len(shape))[0]
            if not isinstance(tensor, TensorRef) or tensor.shape != shape_of(region) or tensor.dtype != dtype:
                raise MalformedError(f"{where}: a shard that is not a tensor of {dtype} {list(shape_of(region))}")
            local.append((region, tensor))
        return ShardedTensor(dtype, shape, rank, world, owners, tuple(local))


def describe(value: Any) -> tuple[tuple[int, ...], bool] | None:
    """Return the full shape of a tensor, spread over ranks or not, and whether it is floating; None for other values.

    It is an estimate, to tell models from optimizers: ``Reader`` checks what is read.
    """
    if isinstance(value, Instance) and value.cls.endswith((".DTensor", ".ShardedTensor")):
        dtype, shape = (*value.args[1:3], None, None)[:2]
        sizes = shape if isinstance(shape, tuple) and all(type(size) is int for size in shape) else ()
        return sizes, not isinstance(dtype, DType) or dtype.floating
    return describe_tensor(value)


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of a kept object, {} for anything else.

    An object with slots is pickled as (dict or None, slots); both are returned.
    """
    state = value.state if isinstance(value, Instance) else None
    parts = state if isinstance(state, tuple) else (state,)
    return {key: item for part in parts if isinstance(part, dict) for key, item in part.items()}


def _kind(where: str, value: Instance) -> tuple[DType, tuple[int, ...]]:
    """Return dtype and full shape: arguments of ``torch._utils._rebuild_wrapper_subclass``."""
    if len(value.args) < 3 or not isinstance(value.args[1], DType):
        raise MalformedError(f"{where}: a tensor of {safe_repr(value.args[1:2])}, which dsconv does not read")
    return value.args[1], _naturals(where, value.args[2])


def _naturals(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(n) is int and n >= 0 for n in value):
        raise MalformedError(f"{where}: expected sizes or ranks, found {safe_repr(value)}")
    return tuple(value)


def _box(where: str, value: Any, ndim: int) -> tuple[Region, int]:
    """Return a ShardMetadata as a region and the rank that holds it; -1 where none is named."""
    state = attributes(value)
    offsets, sizes = (_naturals(where, state.get(key)) for key in ("shard_offsets", "shard_sizes"))
    if len(offsets) != ndim or len(sizes) != ndim:
        raise MalformedError(
            f"{where}: a shard at {list(offsets)} of {list(sizes)} in a tensor of {count(ndim, 'dimension')}"
        )
    rank = attributes(state.get("placement")).get("_rank")
    return box(offsets, sizes), rank if type(rank) is int else -1


def _placement(where: str, value: Any, ndim: int) -> Shard | Replicate:
    kind = value.cls.rpartition(".")[2] if isinstance(value, Instance) and PLACEMENTS in value.cls else ""
    if kind == "Replicate":
        return Replicate()
    if kind not in ("Shard", "_StridedShard"):
        label = value.cls if isinstance(value, (Instance, Opaque)) else safe_repr(value)
        raise UnsupportedError(
            f"{where}: the placement {label.rpartition('.')[2]} ({label}): a rank's share is not a part of the tensor."
            " Redistribute it to Shard or Replicate before saving"
        )
    state = attributes(value)
    dim, factor = state.get("dim"), state.get("split_factor", 1)
    if (
        type(dim) is not int
        or not -ndim <= dim < ndim
        or type(factor) is not int
        or not 1 <= factor <= MAX_SPLIT_FACTOR
    ):
        raise MalformedError(
            f"{where}: {kind} of dimension {safe_repr(dim)} with split factor {safe_repr(factor)} in a tensor of"
            f" {count(ndim, 'dimension')}"
        )
    return Shard(dim % ndim, factor)


def _mesh(where: str, value: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Return the shape, the ranks, and the coordinate of the rank that wrote the file."""
    state = attributes(value)
    coordinate = state.get("_coordinate_on_dim")
    if "_layout" in state and "_flatten_rank_map" in state:
        shape, ranks = _from_layout(where, state, coordinate)
    else:
        mesh = state.get("mesh")
        shape, ranks = (
            mesh.shape if isinstance(mesh, TensorRef) else (),
            _naturals(where, state.get("_flatten_mesh_list")),
        )
    if (
        len(ranks) != math.prod(shape)
        or not shape
        or not ranks
        or len(ranks) > MAX_RANKS
        or len(set(ranks)) != len(ranks)
    ):
        raise MalformedError(
            f"{where}: a device mesh of shape {safe_repr(list(shape))} and ranks {safe_repr(list(ranks))}"
        )
    if coordinate is not None:
        coordinate = _naturals(where, coordinate)
        if len(coordinate) != len(shape) or any(index >= size for index, size in zip(coordinate, shape, strict=True)):
            raise MalformedError(f"{where}: the coordinate {list(coordinate)} in a mesh of shape {list(shape)}")
    return shape, ranks, coordinate


def _from_layout(where: str, state: dict[str, Any], coordinate: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and ranks of a mesh kept as a layout: for each dimension, steps in the list of its root's ranks.

    torch 2.10 wrote the ranks of the mesh itself too. In later releases a mesh cut out of a larger one begins where the
    writer's own coordinate puts it (``_MeshLayout.remap_to_tensor``).
    """
    everyone = _naturals(where, state["_flatten_rank_map"])
    layout = attributes(state["_layout"])
    axes = layout.get("axes")
    if isinstance(axes, (tuple, list)):  # torch 2.12 and later: a layout for each dimension
        pairs = [(attributes(axis).get("shape"), attributes(axis).get("stride")) for axis in axes]
    else:  # before: a number, or a tuple of them, for each dimension
        sizes, strides = layout.get("shape"), layout.get("stride")
        pairs = (
            list(zip(sizes, strides, strict=False))
            if isinstance(sizes, tuple) and isinstance(strides, tuple)
            else [(sizes, strides)]
        )
    steps = [_steps(where, size, stride) for size, stride in pairs]
    shape = tuple(len(step) for step in steps)
    if math.prod(shape) > MAX_RANKS:
        raise MalformedError(f"{where}: a device mesh of {count(math.prod(shape), 'rank')}")
    if "_flatten_mesh_list" in state:
        return shape, _naturals(where, state["_flatten_mesh_list"])
    begin = 0
    if coordinate is not None and len(everyone) != math.prod(shape):
        writer = state.get("_rank")
        at = _naturals(where, coordinate)
        if (
            writer not in everyone
            or len(at) != len(steps)
            or any(i >= len(step) for i, step in zip(at, steps, strict=True))
        ):
            raise MalformedError(
                f"{where}: rank {safe_repr(writer)} at {list(at)} of a device mesh of shape {list(shape)}"
            )
        begin = everyone.index(writer) - sum(step[i] for i, step in zip(at, steps, strict=True))
    positions = [begin + sum(choice) for choice in product(*steps)]
    if not all(0 <= position < len(everyone) for position in positions):
        raise MalformedError(
            f"{where}: a device mesh of shape {list(shape)} that leaves its {count(len(everyone), 'rank')}"
        )
    return shape, tuple(everyone[position] for position in positions)


def _steps(where: str, size: Any, stride: Any) -> list[int]:
    """Return the positions of one dimension's indices, counted from its first.

    ``size`` is a tuple where the dimension was flattened from several.
    """
    sizes, strides = (value if isinstance(value, tuple) else (value,) for value in (size, stride))
    if (
        len(sizes) != len(strides)
        or not all(type(n) is int and n >= 0 for n in (*sizes, *strides))
        or math.prod(sizes) > MAX_RANKS
    ):
        raise MalformedError(
            f"{where}: a device mesh with a dimension of sizes {safe_repr(sizes)} and strides {safe_repr(strides)}"
        )
    return [
        sum(choice)
        for choice in product(*([i * step for i in range(n)] for n, step in zip(sizes, strides, strict=True)))
    ]
