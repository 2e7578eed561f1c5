"""The formats that are read: their contract, and the one table that lists them.

docs/adding-a-format.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.roots import Root


class Format(Protocol):
    """How one kind of checkpoint is recognised and read; usually a module with these two functions.

    A format knows files but no destinations. It reads metadata only (headers, directories, pickles through the
    restricted machine), never tensor data, so that opening is fast and costs little memory. It need not prove that the
    pieces tile the tensors, nor look at links or permissions: ``opening`` and ``storage`` do that for all formats.
    """

    def detect(self, root: Root, tag: str | None) -> bool:
        """Return whether this format reads what lies at ``root.path``.

        It goes by the names of files and does not open them (``latest``, which holds a name, is the exception). It is
        asked only when every format above it in the table has said no.

        Args:
            root: Where the checkpoint lies. ``root.path`` may be a folder or a single file.
            tag: The step or tag that the user chose, or None.

        Raises:
            CheckpointNotFoundError: The folder is of this format, and which checkpoint in it is meant is not clear.
        """

    def read(self, root: Root, tag: str | None, item: str | None) -> Checkpoint:
        """Return the tensor map of what ``detect`` has recognised.

        Each ``TensorEntry`` has the name, the stored dtype, the full shape, and a layout: a function that returns its
        pieces, which say which bytes of which file fill which part of the tensor. ``sources`` lists every file whose
        bytes the map uses. Call ``root.fetch`` with the files that will be opened, so that a remote root gets them all
        at once; open them with ``open_for_reading``.

        Args:
            root: Where the checkpoint lies.
            tag: The step or tag that the user chose, or None.
            item: The key of the model that the user chose, or None. A format whose checkpoints may hold several says
                which one it took in ``info["item"]``, and all of them in ``info["models"]``; others ignore it.

        Raises:
            CheckpointNotFoundError: There is no checkpoint of that tag, or no such item.
            SeveralModelsError: There are several models, and ``item`` is None.
            MissingShardError: A file that the checkpoint needs is missing.
            MalformedError: A file is damaged, or is not what its name says.
            InconsistentCheckpointError: The files are not from one save.
            UnsupportedError: The format has a feature that dsconv does not read.
            UnsafeError: A file asks for code to be run, or names a path outside its folder.
        """


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: The format, for people.
        module: The module that implements ``Format``; it is imported when it is asked.
        place: Why the format stands where it stands.
        before: The formats further down that recognise some of the same folders: the order decides for this one.
    """

    name: str
    module: str
    place: str
    before: tuple[str, ...] = ()

    def load(self) -> Format:
        return cast(Format, import_module(self.module))


FORMATS = (
    Row(
        "DeepSpeed universal",
        "dsconv.checkpoint.formats.deepspeed.universal",
        "A universal folder holds the same mp_rank_*_model_states.pt as a save without ZeRO; its masters are in zero/.",
        before=("DeepSpeed",),
    ),
    Row(
        "DCP",
        "dsconv.checkpoint.formats.dcp.reader",
        "Given a tag, such as step-10, DeepSpeed's format raises an error for every folder that lacks the tag.",
    ),
    Row(
        "DCP in safetensors",
        "dsconv.checkpoint.formats.dcp.safetensors_shards",
        "An index beside the shards, or consolidated files beside sharded/, look like a plain safetensors model.",
        before=("safetensors",),
    ),
    Row(
        "DeepSpeed",
        "dsconv.checkpoint.formats.deepspeed.reader",
        "A Trainer's checkpoint-N holds the 16-bit model.safetensors beside the fp32 masters, which are preferred.",
        before=("safetensors", "state dict of torch.save"),
    ),
    Row(
        "safetensors",
        "dsconv.checkpoint.formats.huggingface.safetensors",
        "Where a folder holds the weights twice, transformers takes the safetensors; no pickle need be read.",
        before=("rank files", "state dict of torch.save"),
    ),
    Row(
        "rank files",
        "dsconv.checkpoint.formats.rank_files.reader",
        "The file of one rank is a .pt or .bin too, and would be taken for a whole model.",
        before=("state dict of torch.save",),
    ),
    Row(
        "state dict of torch.save",
        "dsconv.checkpoint.formats.huggingface.torch_bin",
        "The last one goes by suffixes (.bin, .pt, .pth, .ckpt) that the formats above use as well.",
    ),
)
EXPECTED = (
    "expected a DeepSpeed checkpoint (a folder with 'latest', global_stepN/ or *_states.pt), a"
    " torch.distributed.checkpoint directory (.metadata and *.distcp), one file per rank (such as"
    " model_world_size_N_rank_R.pt), safetensors, or a state dict of torch.save (.bin, .pt, .pth, .ckpt)"
)


def formats() -> Iterator[Format]:
    """Yield the formats in the order in which they are asked; each is imported when its turn comes."""
    return (row.load() for row in FORMATS)
