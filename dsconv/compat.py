"""Drop-ins for the functions of DeepSpeed's ``zero_to_fp32.py``: a script changes its import, and nothing else.

    from dsconv.compat import get_fp32_state_dict_from_zero_checkpoint

Names, signatures and meaning are those of DeepSpeed 0.19.8 ``deepspeed/utils/zero_to_fp32.py``; nothing is unpickled,
tied, frozen and 0-d weights come out at every stage, and errors are ``dsconv.DsconvError``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME, DType
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_path
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.convert.merge import merge
from dsconv.convert.plan import make_plan, parse_size
from dsconv.convert.staging import open_staging, require_space
from dsconv.errors import MalformedError, OutputError

if TYPE_CHECKING:
    import torch

FP32 = BY_NAME["float32"]
UNLIMITED_BYTES = 1 << 62  # max_shard_size=None writes one file


class LazyTensor:
    """A tensor that is read when ``contiguous()`` is called: what ``lazy_mode=True`` returns."""

    def __init__(self, entry: TensorEntry) -> None:
        import torch

        self._entry = entry
        self.shape = torch.Size(entry.shape)
        self.dtype = getattr(torch, _wanted(entry).name)

    def numel(self) -> int:
        return self._entry.numel

    def contiguous(self) -> torch.Tensor:
        """A new CPU tensor."""
        return load_tensors([self._entry], _wanted)[self._entry.name]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """{name: CPU tensor} of a ZeRO checkpoint, tied names included, which share one tensor.

    Parameters have their masters' dtype (fp32), frozen ones what was stored, floating buffers fp32. With ``lazy_mode``
    the values are ``LazyTensor``, read one by one by their ``contiguous()``. Raises DsconvError.
    """
    checkpoint = open_checkpoint(checkpoint_dir, tag)
    entries = _chosen(checkpoint, exclude_frozen_parameters)
    if lazy_mode:
        return _with_ties(checkpoint, {entry.name: LazyTensor(entry) for entry in entries})
    return _with_ties(checkpoint, load_tensors(entries, _wanted))


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict to ``output_dir``, all floating tensors in fp32; an earlier output there is replaced.

    With ``safe_serialization`` it is ``dsconv.merge``. Without, ``pytorch_model.bin`` (or shards and an index), written
    with torch.save, which needs the memory of one shard. Raises DsconvError.
    """
    size = UNLIMITED_BYTES if max_shard_size is None else max_shard_size
    if safe_serialization:
        merge(
            checkpoint_dir,
            output_dir,
            tag=tag,
            dtype="fp32",
            max_shard_size=size,
            exclude_frozen=exclude_frozen_parameters,
            force=True,
        )
        return
    target = as_path(output_dir)
    if is_remote(target):
        raise OutputError(f"{target}: .bin files are written to a disk only; give safe_serialization=True")
    _save_bin(open_checkpoint(checkpoint_dir, tag), target, parse_size(size), exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> Any:
    """Move ``model`` to the CPU, load the checkpoint's weights into it (``strict=False``) and return it. Raises
    DsconvError.
    """
    state_dict = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state_dict, strict=False)
    return model


def _wanted(entry: TensorEntry) -> DType:
    return output_dtype(entry.dtype, FP32) if entry.role == "buffer" else entry.dtype


def _chosen(checkpoint: Checkpoint, exclude_frozen: bool) -> list[TensorEntry]:
    entries = [entry for entry in checkpoint.values() if not (exclude_frozen and entry.role == "frozen")]
    if not entries:
        raise MalformedError(f"{checkpoint.path}: no tensors are left")
    return entries


def _with_ties(checkpoint: Checkpoint, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**found, **{alias: found[owner] for alias, owner in checkpoint.ties.items() if owner in found}}


def _save_bin(checkpoint: Checkpoint, target: Path, max_shard_bytes: int, exclude_frozen: bool) -> None:
    import torch

    plan = make_plan(checkpoint, dtype=FP32, max_shard_bytes=max_shard_bytes, exclude_frozen=exclude_frozen)
    require_space(target, plan.nbytes)
    weight_map: dict[str, str] = {}
    with open_staging(target, sync=True) as staging:
        names = []
        for shard in plan.shards:
            name = shard.filename.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            tensors = load_tensors([t.entry for t in shard.tensors], lambda entry: output_dtype(entry.dtype, FP32))
            state_dict = _with_ties(checkpoint, tensors)
            with staging.new_file(name) as file:
                torch.save(state_dict, file)
            weight_map.update(dict.fromkeys(state_dict, name))
            names.append(name)
        if len(names) > 1:
            index = {"metadata": {"total_size": plan.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            names.append("pytorch_model.bin.index.json")
            staging.write(names[-1], (json.dumps(index, indent=2) + "\n").encode())
        old = sorted(
            (p.name for p in target.glob("pytorch_model*.bin*")), key=lambda name: not name.endswith(".index.json")
        )
        staging.commit(names, old)
