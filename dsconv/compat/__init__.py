"""Drop-ins for DeepSpeed's ``zero_to_fp32.py`` and ``zero_to_torch.py``: a script changes its import, and nothing else.

    from dsconv.compat import get_fp32_state_dict_from_zero_checkpoint

Public names, signatures and meaning are those of DeepSpeed ``deepspeed/utils/zero_to_fp32.py`` and
``zero_to_torch.py``. Nothing is unpickled, and tied, frozen and 0-d weights come out at every stage. Errors are
``dsconv.DsconvError`` and also the built-in errors that DeepSpeed raises: ``except ValueError`` and ``except
FileNotFoundError`` go on working. A conversion may be called on every rank of a job at once.
"""

from __future__ import annotations

import json
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_output
from dsconv.checkpoint.transfer.casting import output_dtype
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.compat.files import (
    atoi,
    get_checkpoint_files,
    get_model_state_file,
    get_model_state_files,
    get_optim_files,
    natural_keys,
    parse_model_states,
    parse_optim_states,
    zero3_partitioned_param_info,
    zero_model_state,
)
from dsconv.compat.lazy import OUTPUT_DTYPES, GatheredTensor, fp32_of_buffers, output_dtype_of, to_torch_tensor
from dsconv.convert.merge import merge
from dsconv.convert.plan import make_plan, parse_size
from dsconv.convert.staging import open_staging, require_space
from dsconv.errors import MalformedError, OutputError, SeveralModelsError
from dsconv.loaders.agreement import agreement

if TYPE_CHECKING:
    import torch

__all__ = [
    "OUTPUT_DTYPE_NAMES",
    "GatheredTensor",
    "LazyTensor",
    "atoi",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "debug",
    "device",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "main",
    "natural_keys",
    "parse_model_states",
    "parse_optim_states",
    "to_torch_tensor",
    "zero3_partitioned_param_info",
    "zero_model_state",
]

UNLIMITED_BYTES = 1 << 62  # max_shard_size=None writes one file
BUSY = "another dsconv run is writing here"  # of convert/staging.py
LazyTensor = GatheredTensor
debug = 0

PathLike = str | os.PathLike[str]

if TYPE_CHECKING:
    device: torch.device
    OUTPUT_DTYPE_NAMES: dict[str, torch.dtype]


def __getattr__(name: str) -> Any:
    """Return what needs torch: ``device`` and ``OUTPUT_DTYPE_NAMES``."""
    if name not in ("device", "OUTPUT_DTYPE_NAMES"):
        raise AttributeError(f"module 'dsconv.compat' has no attribute {name!r}")
    import torch

    if name == "device":
        return torch.device("cpu")
    return {short: getattr(torch, full) for short, full in OUTPUT_DTYPES.items()}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: PathLike,
    tag: PathLike | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """Return the state dict of a ZeRO checkpoint. Tied names are included and share one tensor.

    Parameters have their masters' dtype (fp32), frozen ones what was stored, floating buffers fp32.

    Args:
        checkpoint_dir: The folder that has the tag folders and ``latest``.
        tag: The tag to read (default: the one that ``latest`` names).
        exclude_frozen_parameters: Leave out parameters that were not trained.
        lazy_mode: Return ``GatheredTensor`` values, which are read when they are used.

    Returns:
        CPU tensors by name.

    Raises:
        DsconvError: The checkpoint cannot be read.
    """
    checkpoint = _open(checkpoint_dir, tag)
    entries = _chosen(checkpoint, exclude_frozen_parameters)
    if lazy_mode:
        return _with_ties(checkpoint, {entry.name: GatheredTensor(entry) for entry in entries})
    return _with_ties(checkpoint, load_tensors(entries, fp32_of_buffers))


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: PathLike,
    output_dir: PathLike,
    dtype: Any = "float32",
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: PathLike | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict to ``output_dir``; an earlier output there is replaced.

    If every rank of a job calls this, rank 0 converts and the others wait. On a node that does not see rank 0's files,
    one rank converts as well.

    Args:
        checkpoint_dir: The folder that has the tag folders and ``latest``.
        output_dir: The folder to write.
        dtype: The dtype of all floating tensors: a torch.dtype or one of ``OUTPUT_DTYPE_NAMES``.
        max_shard_size: The largest file, as ``5GB`` or in bytes; None writes one file.
        safe_serialization: Write safetensors, as ``dsconv.merge`` does. Otherwise ``pytorch_model.bin`` (or shards and
            an index) is written with torch.save, which needs the memory of one shard.
        tag: The tag to read (default: the one that ``latest`` names).
        exclude_frozen_parameters: Leave out parameters that were not trained.

    Raises:
        DsconvError: The checkpoint cannot be read, or the output cannot be written.
        UsageError: The dtype is not supported.
    """
    wanted = output_dtype_of(dtype)
    size = UNLIMITED_BYTES if max_shard_size is None else parse_size(max_shard_size)
    target = as_output(output_dir)
    if is_remote(target) and not safe_serialization:
        raise OutputError(f"{target}: .bin files are written to a disk only; give safe_serialization=True")

    def convert() -> None:
        checkpoint = _open(checkpoint_dir, tag)
        if safe_serialization:
            merge(
                checkpoint,
                output_dir,
                dtype=wanted.name,
                max_shard_size=size,
                exclude_frozen=exclude_frozen_parameters,
                force=True,
            )
        else:
            _save_bin(checkpoint, target, wanted, size, exclude_frozen_parameters)

    name = "model" if safe_serialization else "pytorch_model"
    _once(convert, lambda: any(target.glob(f"{name}*")))


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathLike,
    output_dir: PathLike,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: PathLike | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict to ``output_dir`` in fp32: see ``convert_zero_checkpoint_to_state_dict``."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output_dir,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        tag=tag,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: PathLike, tag: PathLike | None = None
) -> Any:
    """Move ``model`` to the CPU, load the checkpoint's weights into it (``strict=False``) and return it.

    Raises:
        DsconvError: The checkpoint cannot be read.
    """
    state_dict = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state_dict, strict=False)
    return model


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of ``zero_to_torch.py``; ``python -m dsconv.compat`` does."""
    parser = ArgumentParser(description="Convert a DeepSpeed ZeRO checkpoint to float32, float16, or bfloat16 weights.")
    parser.add_argument("checkpoint_dir", help="folder that has the tag folders, such as path/checkpoint-12")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--dtype", choices=sorted(OUTPUT_DTYPES), required=True, help="dtype of floating tensors")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file, such as 5GB or 500MB")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors instead of pickles")
    parser.add_argument("-t", "--tag", help="tag to read, such as global_step1 (default: what 'latest' names)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out frozen parameters")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted, without effect")
    given = vars(parser.parse_args(args))
    del given["debug"]
    convert_zero_checkpoint_to_state_dict(**given)


def _open(checkpoint_dir: PathLike, tag: PathLike | None) -> Checkpoint:
    """Open a checkpoint. A tag may be a path; as in DeepSpeed, an absolute one stands for itself."""
    named = None if tag is None else Path(tag)
    try:
        if named is None:
            return open_checkpoint(checkpoint_dir)
        if named.is_absolute():
            return open_checkpoint(named.parent, named.name)
        return open_checkpoint(checkpoint_dir, str(named))
    except SeveralModelsError as several:  # DeepSpeed's signatures have no place for the choice
        first = next(iter(several.models))
        advice = (
            f"dsconv.merge(CKPT, OUT, item={first!r:.100}) and dsconv.open_checkpoint(CKPT, item=…) read one of them"
        )
        raise SeveralModelsError(several.where, several.models, advice) from None


def _once(convert: Callable[[], None], is_there: Callable[[], bool]) -> None:
    """Run ``convert`` once for all ranks that share a file system.

    Without a process group, ranks that call at once take turns.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        _in_turn(convert)
        return
    with agreement("convert"):
        if dist.get_rank() == 0:
            convert()
    with agreement("convert"):
        if os.environ.get("LOCAL_RANK", "0") == "0" and not is_there():
            _in_turn(convert)


def _in_turn(convert: Callable[[], None]) -> None:
    while True:
        try:
            convert()
        except OutputError as error:
            if BUSY not in str(error):
                raise
            time.sleep(0.2)
        else:
            return


def _chosen(checkpoint: Checkpoint, exclude_frozen: bool) -> list[TensorEntry]:
    entries = [entry for entry in checkpoint.values() if not (exclude_frozen and entry.role == "frozen")]
    if not entries:
        raise MalformedError(f"{checkpoint.path}: no tensors are left")
    return entries


def _with_ties(checkpoint: Checkpoint, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**found, **{alias: found[owner] for alias, owner in checkpoint.ties.items() if owner in found}}


def _save_bin(checkpoint: Checkpoint, target: Path, dtype: DType, max_shard_bytes: int, exclude_frozen: bool) -> None:
    import torch

    plan = make_plan(checkpoint, dtype=dtype, max_shard_bytes=max_shard_bytes, exclude_frozen=exclude_frozen)
    require_space(target, plan.nbytes)
    weight_map: dict[str, str] = {}
    with open_staging(target, sync=True) as staging:
        names = []
        for shard in plan.shards:
            name = shard.filename.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            tensors = load_tensors([t.entry for t in shard.tensors], lambda entry: output_dtype(entry.dtype, dtype))
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
