"""A run folder of Megatron-core as a destination: one iteration in the form ``torch_dist``, and the file that names it.

megatron-core 0.16 ``dist_checkpointing/core.py`` (metadata.json), ``strategies/common.py`` (common.pt) and
``strategies/torch.py`` (the rest is DCP; objects lie in it as torch.save of a list, under keys that say which shard
they are).
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.local import is_remote
from dsconv.convert.dcp_layout import METADATA, SUFFIX, DcpPlan, metadata
from dsconv.convert.dcp_output import DcpOutput
from dsconv.convert.destination import Written
from dsconv.convert.torch_writer import TorchArchive
from dsconv.errors import OutputError
from dsconv.names.megatron import COMMON

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM training/checkpointing.py get_checkpoint_tracker_filename
ITERATION = re.compile(r"iter_\d+|release")
CONFIG = "metadata.json"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CHECKPOINT_VERSION = 3.0  # Megatron-LM training/checkpointing.py: the order of q, k and v


def iteration_folder(checkpoint: Checkpoint) -> str:
    """Return the folder of the iteration: the checkpoint's step, or 0."""
    return f"iter_{checkpoint.step or 0:07d}/"


class MegatronOutput(DcpOutput):
    """The files of a plan, in the folder of an iteration, and the tracker that names it.

    Args:
        plan: where each tensor goes; its ``folder`` is that of the iteration.
        checkpoint: the tensors under Megatron-core's names.
    """

    what = "a Megatron-core checkpoint"

    def __init__(self, plan: DcpPlan, checkpoint: Checkpoint) -> None:
        super().__init__([plan])
        self._plan = plan
        self._folder = plan.folder.rstrip("/")
        self._iteration = checkpoint.step or 0

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return the objects, ``common.pt``, ``metadata.json``, ``.metadata`` and the tracker."""
        plan = self._plan
        common = {"iteration": self._iteration, "checkpoint_version": CHECKPOINT_VERSION}
        return {
            **({plan.small: plan.content} if plan.small else {}),
            plan.folder + COMMON: TorchArchive(Path(COMMON).stem, common).whole(),
            plan.folder + CONFIG: json.dumps(BACKENDS).encode(),
            plan.folder + METADATA: metadata(plan),
            TRACKER: str(self._iteration).encode(),
        }

    @property
    def commit_order(self) -> Sequence[str]:
        """The tracker makes the folder a run."""
        return [self._folder, TRACKER]

    def older(self, target: Path) -> list[str]:
        """Return what of an earlier output lies in ``target``, the tracker first.

        Raises:
            OutputError: ``target`` holds another checkpoint, or the folder of the iteration holds files that are not of
                one.
        """
        names = sorted(path.name for path in target.iterdir())
        others = [name for name in names if name == METADATA or (ITERATION.fullmatch(name) and name != self._folder)]
        if others:
            raise OutputError(f"{target} holds another checkpoint ({others[0]}); give the output a folder of its own")
        if self._folder in names and (foreign := _foreign(target / self._folder)) is not None:
            raise OutputError(
                f"{foreign} belongs to no Megatron-core checkpoint, and would be removed with {foreign.parent}: move it"
                " away, or give the output a folder of its own"
            )
        return [name for name in (TRACKER, self._folder) if name in names]


def _foreign(folder: Path) -> Path | None:
    """Return what in the folder of an iteration Megatron-core does not write."""
    if (not is_remote(folder) and folder.is_symlink()) or not folder.is_dir():
        return None  # which is refused elsewhere
    for path in sorted(folder.iterdir()):
        is_file = path.is_file() if is_remote(path) else stat.S_ISREG(path.lstat().st_mode)
        if not is_file or (path.suffix != SUFFIX and path.name not in (METADATA, COMMON, CONFIG)):
            return path
    return None
