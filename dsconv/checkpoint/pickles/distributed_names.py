"""The classes of ``torch.distributed`` whose attributes say how a tensor is spread over ranks, by the names of their
releases.

``DTensor`` and what describes it moved from ``_tensor`` to ``tensor`` in torch 2.5; ``_FlatLayout`` is of 2.12 and
later. ``ShardedTensor`` is FSDP1's. Read off the sources of torch 2.2 to 2.13 and files that 2.13 wrote.
"""

from __future__ import annotations

NESTED = frozenset({("torch.distributed._shard.sharded_tensor.api", "ShardedTensor.ProcessGroupState")})
CLASSES = NESTED | {
    (f"torch.distributed.{module}", name)
    for module, names in {
        "tensor": ("DTensor",),
        "tensor._api": ("DTensor",),
        "_tensor.api": ("DTensor",),
        "tensor._dtensor_spec": ("DTensorSpec",),
        "_tensor._dtensor_spec": ("DTensorSpec",),
        "tensor.placement_types": ("Shard", "_StridedShard", "Replicate"),
        "_tensor.placement_types": ("Shard", "_StridedShard", "Replicate", "DTensorSpec"),
        "device_mesh": ("DeviceMesh",),
        "_tensor.device_mesh": ("DeviceMesh",),
        "_mesh_layout": ("_MeshLayout", "_FlatLayout"),
        "_shard.sharded_tensor.api": ("ShardedTensor",),
        "_shard.sharded_tensor.shard": ("Shard",),
        "_shard.sharded_tensor.metadata": ("ShardedTensorMetadata",),
        "_shard.metadata": ("ShardMetadata",),
        "remote_device": ("_remote_device",),
    }.items()
    for name in names
}
