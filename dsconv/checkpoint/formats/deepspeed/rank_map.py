"""What one model-parallel rank's files hold, and the checkpoint that is built of such maps.

The data-parallel partitions of ZeRO are put together in a ``RankMap`` already, so that what is left is to join ranks. A
plain checkpoint has one rank, and its map is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.torchfile.file import TorchFile, unread_objects
from dsconv.zero_utils.tag_folder import TagFolder

if TYPE_CHECKING:
    from dsconv.checkpoint.formats.deepspeed.partitions import Partition, Place
    from dsconv.checkpoint.formats.deepspeed.unnamed_masters import MasterSlot
from dsconv.checkpoint.formats.deepspeed.unread import warn_of_unread


@dataclass
class RankMap:
    """The map of one model-parallel rank's shard of the model.

    ``entries`` have the shapes of the shard; ``states`` is the rank's (first) model-states file; ``kind`` is such as
    ``ZeRO-1``. ``masters`` are those of stage 0, which lie in the model states; ``places`` say where the optimizer
    states of each parameter lie in the partitions of ZeRO. ``own_weights`` says that the model's 16-bit weights were
    asked for.
    """

    states: ModuleStates
    entries: dict[str, TensorEntry]
    partitions: list[Partition]
    kind: str
    stage: int
    data_parallel: int
    masters: Mapping[str, MasterSlot] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    own_weights: bool = False

    @property
    def files(self) -> list[TorchFile]:
        """The files that the map was read from."""
        return [self.states.file, *(p.file for p in self.partitions)]

    @property
    def model_parallel(self) -> int:
        """The number of ranks that the model was cut over, by what the file says."""
        return self.states.model_parallel


@dataclass(frozen=True)
class Contents:
    """What a reader found in a tag's folder.

    ``files`` are all that were read. ``info`` is added to what ``build_checkpoint`` finds out by itself.
    """

    entries: Mapping[str, TensorEntry]
    kind: str
    stage: int
    files: Iterable[TorchFile]
    warnings: list[str]
    world: Mapping[str, int]
    info: Mapping[str, Any] = field(default_factory=dict)
    no_training: str = ""


def build_checkpoint(folder: TagFolder, states: ModuleStates, contents: Contents) -> Checkpoint:
    """Return the checkpoint of what a reader found.

    Args:
        folder: The tag's folder.
        states: The model states of the first rank, which name the step and the release.
        contents: What the reader found; a note on missing checksums is added to its warnings.
    """
    files = {file.path: file for file in contents.files}
    if not all(file.archive.checksummed for file in files.values()):
        contents.warnings.append(
            "the files were saved without checksums (torch.serialization.set_crc32_options): damage cannot be detected"
        )
    contents.warnings.extend(warn_of_unread(states.path, states.module))
    info: dict[str, Any] = {
        "zero_stage": contents.stage,
        "tag": folder.tag,
        "deepspeed_version": states.ds_version,
        **contents.info,
    }
    if states.unwrapped.removed:
        info["removed_prefixes"] = list(states.unwrapped.removed)
    if unread := unread_objects(files.values()):
        info["unread_objects"] = unread
    return Checkpoint(
        folder.path,
        contents.kind,
        contents.entries,
        folder=folder.save_dir,
        step=states.step,
        world=contents.world,
        info=info,
        warnings=tuple(contents.warnings),
        sources=tuple(sorted(files)),
        is_deepspeed=True,
        no_training=contents.no_training,
    )


def contents_of(
    ranks: Sequence[RankMap],
    entries: Mapping[str, TensorEntry],
    kind: str,
    warnings: list[str],
    world: Mapping[str, int] | None = None,
    more_files: Sequence[TorchFile] = (),
) -> Contents:
    """Return the contents of model-parallel ranks.

    Args:
        ranks: The maps of the ranks.
        entries: The tensors of the whole model, which come from the files of ``ranks`` and ``more_files``.
        kind: What the checkpoint is, for people.
        warnings: What was found on the way.
        world: How many ranks there were of each kind; None for a model that was not cut.
        more_files: Files beside those of the ranks.
    """
    first = ranks[0]
    info: dict[str, Any]
    if first.own_weights:
        info = {"weights": "16bit"}
    elif first.partitions:
        info = {"master_dtype": master_dtypes(entries), "parameter_groups": len(first.states.param_shapes)}
    else:
        info = {} if first.stage else {"masters": sum(len(rank.masters) for rank in ranks)}
    return Contents(
        entries,
        kind,
        first.stage,
        [*(file for rank in ranks for file in rank.files), *more_files],
        warnings,
        world or {"data_parallel": first.data_parallel, "model_parallel": 1},
        info,
        _no_training(ranks),
    )


def master_dtypes(entries: Mapping[str, TensorEntry]) -> str:
    """Return the dtypes of the parameters, which are mostly one."""
    return "/".join(sorted({str(entry.dtype) for entry in entries.values() if entry.role == "parameter"}))


def _no_training(ranks: Sequence[RankMap]) -> str:
    """Return why nothing can be said about the optimizer of ``ranks``; nothing where it can."""
    if any(rank.own_weights for rank in ranks):
        return "the model's own 16-bit weights were asked for (--weights 16bit), which have no optimizer states"
    if all(rank.partitions for rank in ranks):
        return ""
    if not all(isinstance(rank.states.optimizer, dict) for rank in ranks):
        return "this run was without ZeRO (stage 0), and saved no optimizer states"
    if not all(rank.entries for rank in ranks):
        return (
            "this run was without ZeRO (stage 0), where the stages of a pipeline keep states without names. Its weights"
            " can still be merged; the optimizer then starts afresh"
        )
    return ""
