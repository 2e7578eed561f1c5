"""The classes of which a format reads the attributes. Their objects become ``values.Instance``.

``DTensor`` and the classes that describe it moved from ``_tensor`` to ``tensor`` in torch 2.5; ``_FlatLayout`` exists
since 2.12. ``ShardedTensor`` is FSDP1's. The names were read from the sources of torch 2.2 to 2.13 and of DeepSpeed
0.10 to 0.19.8, and from files that they wrote.
"""

from __future__ import annotations

KEPT: frozenset[tuple[str, str]] = frozenset(
    (module, name)
    for module, names in {
        "torch.distributed.tensor": ("DTensor",),
        "torch.distributed.tensor._api": ("DTensor",),
        "torch.distributed._tensor.api": ("DTensor",),
        "torch.distributed.tensor._dtensor_spec": ("DTensorSpec",),
        "torch.distributed._tensor._dtensor_spec": ("DTensorSpec",),
        "torch.distributed.tensor.placement_types": ("Shard", "_StridedShard", "Replicate"),
        "torch.distributed._tensor.placement_types": ("Shard", "_StridedShard", "Replicate", "DTensorSpec"),
        "torch.distributed.device_mesh": ("DeviceMesh",),
        "torch.distributed._tensor.device_mesh": ("DeviceMesh",),
        "torch.distributed._mesh_layout": ("_MeshLayout", "_FlatLayout"),
        "torch.distributed._shard.sharded_tensor.api": ("ShardedTensor", "ShardedTensor.ProcessGroupState"),
        "torch.distributed._shard.sharded_tensor.shard": ("Shard",),
        "torch.distributed._shard.sharded_tensor.metadata": (
            "ShardedTensorMetadata",
            "TensorProperties",  # torch before 2.3
        ),
        "torch.distributed._shard.metadata": ("ShardMetadata",),
        "torch.distributed.remote_device": ("_remote_device",),
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "argparse": ("Namespace",),  # the arguments of Megatron-LM
        "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    }.items()
    for name in names
)
