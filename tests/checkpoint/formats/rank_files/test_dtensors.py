"""The pickled forms of DTensor, its mesh and ShardedTensor in older torch releases, and forms that no release writes.

The old forms are built with the attributes and module names in the sources of those releases, which cannot be installed
beside torch 2.13.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsconv
from dsconv.convert.pickling import Call, Made, Name, Stored, dump, size
from dsconv.errors import DsconvError, InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from tests.checkpoint.building import write_pt
from tests.trained import same

FULL = torch.arange(7 * 2, dtype=torch.float32).reshape(7, 2)
HOOKS = Call(Name("collections", "OrderedDict"), ())
LAYOUT = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
CPU = Call(Name("torch", "device"), ("cpu",))


def tensor(key: str, kind: str, shape: tuple[int, ...], numel: int | None = None) -> Call:
    strides = tuple(torch.empty(shape, device="meta").stride())
    storage = Stored(
        ("storage", Name("torch", kind), key, "cpu", torch.Size(shape).numel() if numel is None else numel)
    )
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, HOOKS))


def wrapper(cls: Name, state: Any, shape: Any = (7, 2), dtype: str = "float32") -> Call:
    args = (cls, Name("torch", dtype), shape, (2, 1), 0, LAYOUT, CPU, False)
    return Call(
        Name("torch._tensor", "_rebuild_from_type_v2"),
        (Name("torch._utils", "_rebuild_wrapper_subclass"), cls, args, state),
    )


def torch_2_4(
    mesh_shape: tuple[int, ...], ranks: list[int], coordinate: list[int], placements: list[Any]
) -> tuple[Name, Made]:
    """Build the form of ``torch.distributed._tensor``, with the mesh as a tensor (up to 2.9)."""
    state = {
        "device_type": "cuda",
        "mesh": tensor("9", "IntStorage", mesh_shape, 4),
        "mesh_dim_names": tuple("abc"[: len(mesh_shape)]),
        "_flatten_mesh_list": tuple(ranks),
        "_parent_mesh": None,
        "_thread_id": 1,
        "_coordinate_on_dim": coordinate,
        "_dim_group_infos": [("", list(ranks), "0")],
        "_hash": 5,
    }
    mesh = Made(Name("torch.distributed.device_mesh", "DeviceMesh"), state)
    base = "torch.distributed._tensor.placement_types"
    made = tuple(Made(Name(base, kind), state) for kind, state in placements)
    meta = Made(Name(base, "TensorMeta"), {})
    spec = Made(Name(base, "DTensorSpec"), {"mesh": mesh, "placements": made, "tensor_meta": meta, "_hash": None})
    return Name("torch.distributed._tensor.api", "DTensor"), spec


def torch_2_10(
    shape: Any, stride: Any, ranks: list[int], coordinate: list[int], placements: list[Any], **more: Any
) -> tuple[Name, Made]:
    """Build the form in which the mesh is one layout of numbers or tuples, with the ranks that it indexes."""
    layout = Made(Name("torch.distributed._mesh_layout", "_MeshLayout"), {"shape": shape, "stride": stride})
    state = {
        "_device_type": "cuda",
        "_layout": layout,
        "_rank_map": None,
        "_flatten_rank_map": tuple(ranks),
        "_coordinate_on_dim": coordinate,
    }
    mesh = Made(Name("torch.distributed.device_mesh", "DeviceMesh"), {**state, **more})
    made = tuple(Made(Name("torch.distributed.tensor.placement_types", kind), state) for kind, state in placements)
    spec = Made(Name("torch.distributed.tensor._dtensor_spec", "DTensorSpec"), {"mesh": mesh, "placements": made})
    return Name("torch.distributed.tensor", "DTensor"), spec


def write(folder: Path, rank: int, form: tuple[Name, Made], local: torch.Tensor, **change: Any) -> None:
    cls, spec = form
    state = {"_local_tensor": tensor("0", "FloatStorage", tuple(local.shape)), "_spec": spec, **change}
    root = {"w": wrapper(cls, (None, state) if rank % 2 else state)}  # with and without slots
    write_pt(folder / f"rank_{rank}.pt", dump(root), _0=local.contiguous().numpy().tobytes(), _9=bytes(16))


SHARD = ("Shard", {"dim": 0})
LAST = ("Shard", {"dim": -1})
REPLICATE: tuple[str, dict[str, int]] = ("Replicate", {})


def test_torch_2_4_to_2_9(tmp_path: Path) -> None:
    """The mesh is HSDP over 2 × 2 ranks in an unusual order."""
    ranks = [0, 2, 1, 3]
    for position, rank in enumerate(ranks):
        coordinate = list(divmod(position, 2))
        rows = FULL[:4] if coordinate[1] == 0 else FULL[4:]
        write(tmp_path, rank, torch_2_4((2, 2), ranks, coordinate, [REPLICATE, SHARD]), rows)
    checkpoint = dsconv.open_checkpoint(tmp_path)
    assert same(checkpoint["w"].read(), FULL)
    assert [piece.extent.record.path.name for piece in checkpoint["w"].pieces] == ["rank_0.pt", "rank_2.pt"]


def test_torch_2_10_to_2_11(tmp_path: Path) -> None:
    """The layout's dimensions are numbers, and the shard is the strided one of FSDP over TP."""
    placements = [("_StridedShard", {"dim": 0, "split_factor": 2}), SHARD]
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        half = FULL[:4] if tp == 0 else FULL[4:]
        write(tmp_path, rank, torch_2_10((2, 2), (2, 1), [0, 1, 2, 3], [dp, tp], placements), half[dp * 2 : dp * 2 + 2])
    assert same(dsconv.open_checkpoint(tmp_path)["w"].read(), FULL)


@pytest.mark.parametrize("form_of", ["2.10", "2.11"])
def test_a_mesh_cut_out_of_a_larger_one(form_of: str, tmp_path: Path) -> None:
    """Ranks (0, 2) and (1, 3) each hold a whole copy, along the first dimension of a 2 × 2 mesh."""
    for rank in range(4):
        row = rank // 2
        if form_of == "2.10":  # this form has the mesh's ranks but not the writer's
            form = torch_2_10((2,), (2,), [0, 1, 2, 3], [row], [LAST], _flatten_mesh_list=(rank % 2, rank % 2 + 2))
        else:
            form = torch_2_10(2, 2, [0, 1, 2, 3], [row], [LAST], _rank=rank)
        write(tmp_path, rank, form, FULL[:, row : row + 1])
    assert same(dsconv.open_checkpoint(tmp_path)["w"].read(), FULL)
    (tmp_path / "rank_3.pt").unlink()
    with pytest.raises(MissingShardError, match=r"the files of rank 3 are missing, such as rank_3.pt"):
        dsconv.open_checkpoint(tmp_path)


def test_a_dimension_flattened_from_two(tmp_path: Path) -> None:
    """dp and cp, which are not neighbours in a 2 × 1 × 2 mesh, are sharded as one dimension."""
    for rank in range(4):
        form = torch_2_10(((2, 2), 1), ((2, 1), 1), [0, 1, 2, 3], [rank, 0], [SHARD, REPLICATE])
        write(tmp_path, rank, form, FULL[rank * 2 : rank * 2 + 2])
    assert same(dsconv.open_checkpoint(tmp_path)["w"].read(), FULL)


def fails(path: Path, kind: type[DsconvError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        dsconv.open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def one(**change: Any) -> tuple[Name, Made]:
    """Return a sound DTensor of one rank, with changed attributes of its mesh."""
    cls, spec = torch_2_4((1,), [0], [0], [SHARD])
    mesh = spec.state["mesh"]
    return cls, Made(spec.cls, {**spec.state, "mesh": Made(mesh.cls, {**mesh.state, **change})})


BAD_MESHES: dict[str, dict[str, Any]] = {
    "of no ranks": {"mesh": tensor("9", "IntStorage", (0,), 4), "_flatten_mesh_list": ()},
    "whose ranks are not of its shape": {"_flatten_mesh_list": (0, 1)},
    "with a rank twice": {"mesh": tensor("9", "IntStorage", (2,), 4), "_flatten_mesh_list": (0, 0)},
    "with a rank below zero": {"_flatten_mesh_list": (-1,)},
    "without its ranks": {"_flatten_mesh_list": None},
    "whose coordinate lies outside": {"_coordinate_on_dim": [1]},
    "whose coordinate has two dimensions": {"_coordinate_on_dim": [0, 0]},
    "whose coordinate is text": {"_coordinate_on_dim": "0"},
}


@pytest.mark.parametrize("change", BAD_MESHES.values(), ids=list(BAD_MESHES))
def test_an_invalid_mesh(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, 0, one(**change), FULL)
    fails(tmp_path, MalformedError, "rank_0.pt: 'w': ")


BAD_LAYOUTS: dict[str, tuple[Any, Any, list[int], dict[str, Any]]] = {
    "a stride too many": ((2,), ((1, 1),), [0, 1], {}),
    "text": ("2", "1", [0, 1], {}),
    "nested too deep": ((((2,),),), (((1,),),), [0, 1], {}),
    "a stride of nothing": ((2,), (0,), [0, 1], {}),
    "beyond its ranks": ((2,), (5,), [0, 1], {}),
    "a writer who is not there": ((1,), (1,), [0, 1], {"_rank": 7}),
    "two million million ranks": ((2_000_000, 1_000_000), (1, 1), [0, 1], {}),
}


@pytest.mark.parametrize(("shape", "stride", "ranks", "more"), BAD_LAYOUTS.values(), ids=list(BAD_LAYOUTS))
def test_an_invalid_layout(shape: Any, stride: Any, ranks: list[int], more: dict[str, Any], tmp_path: Path) -> None:
    coordinate = [0] * (len(shape) if isinstance(shape, tuple) else 1)
    write(tmp_path, 0, torch_2_10(shape, stride, ranks, coordinate, [SHARD] * len(coordinate), **more), FULL)
    fails(tmp_path, MalformedError, "rank_0.pt: 'w': .*mesh")


@pytest.mark.parametrize(
    ("placements", "kind", "message"),
    [
        ([], MalformedError, r"placements \(\); expected one for each dimension of the mesh \(1\)"),
        ([("Shard", {"dim": 2})], MalformedError, "Shard of dimension 2 .* in a tensor of 2 dimensions"),
        ([("Shard", {"dim": True})], MalformedError, "Shard of dimension True"),
        ([("Shard", {})], MalformedError, "Shard of dimension None"),
        ([("_StridedShard", {"dim": 0, "split_factor": 0})], MalformedError, "split factor 0"),
        ([("_StridedShard", {"dim": 0, "split_factor": 1 << 40})], MalformedError, "split factor"),
        (
            [("_Partial", {"reduce_op": "sum"})],
            UnsupportedError,
            "the placement _Partial .*Redistribute it to Shard or Replicate",
        ),
        ([("InterleavedShard", {"dim": 0})], UnsupportedError, "the placement InterleavedShard"),
    ],
)
def test_invalid_placements(placements: list[Any], kind: type[DsconvError], message: str, tmp_path: Path) -> None:
    write(tmp_path, 0, torch_2_4((1,), [0], [0], placements), FULL)
    fails(tmp_path, kind, message)


def test_a_share_of_another_size_or_kind(tmp_path: Path) -> None:
    form = torch_2_4((1,), [0], [0], [SHARD])
    write(tmp_path, 0, form, FULL[:6])
    fails(
        tmp_path,
        InconsistentCheckpointError,
        r"holds a share of \[6, 2\] at \[0\] of a mesh \[1\] of ranks \[0\]; expected \[7, 2\]",
    )
    write(tmp_path, 0, form, FULL, _local_tensor=None)
    fails(tmp_path, UnsupportedError, "this rank's share is None")
    write(tmp_path, 0, form, FULL, _local_tensor=tensor("0", "IntStorage", (7, 2)))
    fails(tmp_path, MalformedError, "a tensor of float32 whose share is of int32")
    write(tmp_path, 0, form, FULL, _local_tensor=tensor("0", "FloatStorage", (7, 2), 14), _spec=None)
    fails(tmp_path, MalformedError, "rank_0.pt: 'w': ")


def test_another_tensor_subclass_is_named(tmp_path: Path) -> None:
    cls = Name("torchao.dtypes.affine_quantized_tensor", "AffineQuantizedTensor")
    write_pt(tmp_path / "rank_0.pt", dump({"w": wrapper(cls, {})}))
    fails(tmp_path, UnsupportedError, r"holds a torchao\.dtypes\.affine_quantized_tensor\.AffineQuantizedTensor")


@pytest.mark.parametrize(("shape", "dtype"), [("7", "float32"), ((7, -2), "float32"), ((7, 2), "quint8")])
def test_a_wrapper_of_no_shape_or_dtype(shape: Any, dtype: str, tmp_path: Path) -> None:
    cls, spec = torch_2_4((1,), [0], [0], [SHARD])
    state = {"_local_tensor": tensor("0", "FloatStorage", (7, 2)), "_spec": spec}
    write_pt(tmp_path / "rank_0.pt", dump({"w": wrapper(cls, state, shape, dtype)}), _0=bytes(56), _9=bytes(16))
    fails(tmp_path, MalformedError, "rank_0.pt: 'w': ")


# ShardedTensor

API = "torch.distributed._shard.sharded_tensor"


def shard_of(offsets: list[int], sizes: list[int], rank: Any = 0) -> Made:
    place = Made(
        Name("torch.distributed.remote_device", "_remote_device"),
        {"_worker_name": None, "_rank": rank, "_device": "cpu"},
    )
    state = {"shard_offsets": offsets, "shard_sizes": sizes, "placement": place}
    return Made(Name("torch.distributed._shard.metadata", "ShardMetadata"), (None, state))


def sharded(
    local: list[Any],
    listed: list[Made],
    rank: Any = 0,
    world: Any = 1,
    shape: tuple[int, ...] = (7, 2),
    state: Any = None,
) -> bytes:
    metadata = Made(Name(f"{API}.metadata", "ShardedTensorMetadata"), {"shards_metadata": listed, "size": size(shape)})
    group = Made(
        Name(f"{API}.api", "ShardedTensor.ProcessGroupState"), {"global_rank": rank, "global_world_size": world}
    )
    # Protocol 2 fetches the nested class by getattr, and protocol 4 writes a name with a dot.
    whole = (local, metadata, group, None, False) if state is None else state
    return dump({"w": wrapper(Name(f"{API}.api", "ShardedTensor"), whole)})


def local_shard(part: Any, metadata: Made) -> Made:
    return Made(Name(f"{API}.shard", "Shard"), {"tensor": part, "metadata": metadata})


def test_a_sharded_tensor_in_boxes_of_two_dimensions(tmp_path: Path) -> None:
    boxes = [([0, 0], [7, 1]), ([0, 1], [3, 1]), ([3, 1], [4, 1])]
    listed = [shard_of(offsets, sizes, min(i, 1)) for i, (offsets, sizes) in enumerate(boxes)]
    parts = [FULL[o[0] : o[0] + s[0], o[1] : o[1] + s[1]].contiguous() for o, s in boxes]
    tensors = [tensor(str(i), "FloatStorage", tuple(part.shape)) for i, part in enumerate(parts)]
    raw = {f"_{i}": part.numpy().tobytes() for i, part in enumerate(parts)}
    first = [local_shard(tensors[0], listed[0])]
    second = [local_shard(tensors[1], listed[1]), local_shard(tensors[2], listed[2])]
    write_pt(tmp_path / "rank_0.pt", sharded(first, listed, 0, 2), **raw)
    write_pt(tmp_path / "rank_1.pt", sharded(second, listed, 1, 2), **raw)
    assert same(dsconv.open_checkpoint(tmp_path)["w"].read(), FULL)
    write_pt(tmp_path / "rank_1.pt", sharded(second[:1], listed, 1, 2), **raw)
    fails(
        tmp_path, MissingShardError, r"rank_1.pt: lacks the shard \[3:7, 1:2\] of 'w' that the files say rank 1 holds"
    )
    write_pt(tmp_path / "rank_1.pt", sharded(second, listed[:2], 1, 2), **raw)
    fails(tmp_path, InconsistentCheckpointError, "in 2 shards, in rank_0.pt float32 .* in 3 shards")
    write_pt(tmp_path / "rank_1.pt", sharded(second, listed, 1, 3), **raw)
    fails(
        tmp_path,
        InconsistentCheckpointError,
        "rank_1.pt: was written on a group of 3 ranks, but rank_0.pt on a group of 2 ranks",
    )


WHOLE = shard_of([0, 0], [7, 2])
PART = tensor("0", "FloatStorage", (7, 2))


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (sharded([local_shard(PART, WHOLE)], [WHOLE], state=(1, 2)), "a ShardedTensor with the state"),
        (sharded([local_shard(PART, WHOLE)], [WHOLE], rank="0"), "a ShardedTensor of rank '0'"),
        (sharded([local_shard(PART, WHOLE)], [WHOLE], rank=1, world=1), "a ShardedTensor of rank 1 of 1"),
        (sharded([local_shard(PART, WHOLE)], [WHOLE], shape=(7, 3)), "metadata is not of shape"),
        (sharded([local_shard(None, WHOLE)], [WHOLE]), "a shard that is not a tensor of float32"),
        (
            sharded([local_shard(PART, shard_of([0, 0], [6, 2]))], [WHOLE]),
            r"a shard that is not a tensor of float32 \[6, 2\]",
        ),
        (
            sharded([local_shard(PART, shard_of([0], [7]))], [WHOLE]),
            r"a shard at \[0\] of \[7\] in a tensor of 2 dimensions",
        ),
        (sharded([local_shard(PART, shard_of([0, -1], [7, 2]))], [WHOLE]), "expected sizes or ranks, found"),
    ],
)
def test_an_invalid_sharded_tensor(pickle: bytes, message: str, tmp_path: Path) -> None:
    write_pt(tmp_path / "rank_0.pt", pickle, _0=FULL.numpy().tobytes())
    fails(tmp_path, MalformedError, message)


def test_a_shard_beyond_its_tensor(tmp_path: Path) -> None:
    far = shard_of([3, 0], [7, 2])
    write_pt(tmp_path / "rank_0.pt", sharded([local_shard(PART, far)], [far]), _0=FULL.numpy().tobytes())
    with pytest.raises(InconsistentCheckpointError, match="does not lie within shape"):
        dsconv.open_checkpoint(tmp_path)
