"""What one model-parallel rank's files hold: the tensor map of its shard of the model.

The data-parallel partitions of ZeRO are put together here already, so that what is left is to join ranks. A plain
checkpoint has one rank, and its map is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.zero_utils.files import TagFolder

if TYPE_CHECKING:
    from dsconv.checkpoint.formats.deepspeed.partitions import Partition, Place


@dataclass
class RankMap:
    """``entries`` have the shapes of this rank's shard; ``states`` is its (first) model-states file."""

    states: ModuleStates
    entries: dict[str, TensorEntry]
    partitions: list[Partition]
    kind: str  # such as ZeRO-1
    stage: int
    data_parallel: int
    masters: Mapping[str, TensorRef] = field(default_factory=dict)  # of stage 0: those of the inline optimizer, by name
    places: dict[str, Place] = field(default_factory=dict)  # of ZeRO: where each parameter's optimizer states lie

    @property
    def files(self) -> list[TorchFile]:
        return [self.states.file, *(p.file for p in self.partitions)]

    @property
    def model_parallel(self) -> int:
        """Ranks that the model was cut over, by what the file says."""
        count = self.states.raw.get("mp_world_size")
        return count if type(count) is int and count > 0 else 1


def _no_training(ranks: Sequence[RankMap]) -> str:
    """Why nothing can be said of the optimizer of ``ranks``, if so."""
    if all(rank.partitions for rank in ranks):
        return ""
    if not all(isinstance(rank.states.optimizer, dict) for rank in ranks):
        return "this run was without ZeRO (stage 0), and saved no optimizer states"
    if not all(rank.entries for rank in ranks):
        return (
            "this run was without ZeRO (stage 0), where the stages of a pipeline keep states without names. Its weights"
            " can be merged all the same; an optimizer then starts anew"
        )
    return ""


def to_checkpoint(
    folder: TagFolder,
    ranks: Sequence[RankMap],
    entries: Mapping[str, TensorEntry],
    kind: str,
    warnings: list[str],
    world: Mapping[str, int] | None = None,
    more_files: Sequence[TorchFile] = (),
) -> Checkpoint:
    """The checkpoint of ``entries``, which come from the files of ``ranks`` and ``more_files``."""
    first = ranks[0]
    files = [*(file for rank in ranks for file in rank.files), *more_files]
    if not all(file.archive.checksummed for file in files):
        warnings.append(
            "the files were saved without checksums (torch.serialization.set_crc32_options): damage cannot be seen"
        )
    masters = {str(entry.dtype) for entry in entries.values() if entry.role == "parameter"}
    info: dict[str, Any] = {"zero_stage": first.stage, "tag": folder.tag, "deepspeed_version": first.states.ds_version}
    if not first.stage:
        info["masters"] = sum(len(rank.masters) for rank in ranks)
    if first.partitions:
        info |= {"master_dtype": "/".join(sorted(masters)), "parameter_groups": len(first.states.param_shapes)}
    paths: set[Path] = {file.path for file in files}
    return Checkpoint(
        folder.path,
        kind,
        entries,
        folder=folder.save_dir,
        step=first.states.step,
        world=world or {"data_parallel": first.data_parallel, "model_parallel": 1},
        info=info,
        warnings=tuple(warnings),
        sources=tuple(sorted(paths)),
        is_deepspeed=True,
        no_training=_no_training(ranks),
    )
