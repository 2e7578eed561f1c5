"""Opening a checkpoint: what is at this path?"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Literal

from dsconv.checkpoint.formats.huggingface.beside import unread_weights
from dsconv.checkpoint.formats.table import EXPECTED, Format, formats
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry, prove_tiling
from dsconv.checkpoint.pickles.schema import expect_name
from dsconv.checkpoint.pickles.values import MAX_NUMEL, safe_repr
from dsconv.checkpoint.storage.hub import lies_on_hub
from dsconv.checkpoint.storage.local import first_signature
from dsconv.checkpoint.storage.roots import Root, open_root
from dsconv.checkpoint.storage.unfinished import cut_off, half_done
from dsconv.checkpoint.transfer.reading import read_tensor
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    SeveralModelsError,
    UsageError,
)
from dsconv.text import clean, count

TensorEntry.reader = staticmethod(read_tensor)  # the map is a floor below the reading of bytes


TRAINER_SAVE = re.compile(r"checkpoint-\d{1,18}")
TRAINER_STATE = "trainer_state.json"
FSDP_MODEL = "pytorch_model_fsdp_0"
OWN_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp")
MAX_PATH = 800  # characters of a path in a message
NO_WEIGHTS = ("training_args.bin",)
MASTERS, OWN_WEIGHTS = "masters", "16bit"  # what ``weights`` may be


def open_checkpoint(
    path: str | os.PathLike[str],
    tag: str | None = None,
    revision: str | None = None,
    item: str | None = None,
    *,
    follow_links: bool = False,
    weights: Literal["masters", "16bit"] = "masters",
) -> Checkpoint:
    """Open a checkpoint for reading: read its metadata, and prove that its pieces tile every tensor exactly once.

    Args:
        path: A DeepSpeed save dir or tag dir; a Trainer's ``checkpoint-N`` or output folder; a
            torch.distributed.checkpoint directory or a folder that holds one; a folder with one torch.save a rank
            (verl, accelerate, FSDP); a safetensors or ``.bin`` file or folder; a URL of any of these (``s3://``,
            ``https://``, ``hf://`` …); or the id of a model on the Hub, whose files are downloaded into the Hub's
            cache.
        tag: Which checkpoint of a folder that holds several, such as ``global_step100`` or ``checkpoint-500``. Of a
            Trainer's output folder, the newest is taken by default.
        revision: A branch, tag or commit of the Hub.
        item: The key of the model to open, if there are several: ``actor`` of ``{"actor": …, "critic": …}``.
        follow_links: Read what links lead to that leave the checkpoint's folder. They are refused otherwise: in a
            download, they could lead to private files.
        weights: Which weights of a DeepSpeed checkpoint: ``masters``, those of the optimizer, which are mostly fp32, or
            ``16bit``, the model's own where they are whole (not at ZeRO-3), which need no optimizer files.

    Returns:
        A read-only mapping of names to tensors. No tensor data has been read.

    Raises:
        CheckpointNotFoundError: There is nothing at the path, nothing that dsconv reads, or no such tag or item.
        SeveralModelsError: There are several models, and ``item`` is None; it lists them.
        MissingShardError: A file of the checkpoint is missing.
        MalformedError: A file is damaged or cannot be read.
        InconsistentCheckpointError: The files are not from one save.
        UnsupportedError: The format has a feature that dsconv does not read.
        UnsafeError: A file asks for code to be run, or a name or a link leaves the checkpoint's folder.
        RemoteError: The Hub, a store or the network fails.
        UsageError: ``weights`` is neither of the two, or ``16bit`` for a checkpoint that is not DeepSpeed's.
    """
    if weights not in (MASTERS, OWN_WEIGHTS):
        raise UsageError(f"weights is {weights!r}; expected {MASTERS!r} or {OWN_WEIGHTS!r}")
    root = open_root(path, revision, follow_links=follow_links)
    try:
        checkpoint = _read_or_say(root, tag, item, weights)
        root.fetch_beside(dict.fromkeys((checkpoint.path, checkpoint.folder)))
    except DsconvError:
        raise
    except OSError as error:
        path = clean(str(error.filename or root.path), MAX_PATH)  # a file may ask for one of any length
        raise MalformedError(f"{path}: cannot be read: {error.strerror}") from None
    for entry in checkpoint.values():
        for name in (entry.name, *entry.aliases):
            expect_name(name, root.path, "the name of a tensor")
        _check_countable(root, entry)
        prove_tiling(entry)
    checkpoint.info.update(root.info)
    checkpoint.warnings = (*root.warnings, *checkpoint.warnings, *unread_weights(checkpoint))
    checkpoint.signatures = {source: first_signature(source) for source in checkpoint.sources}
    return checkpoint


def open_two(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    item: str | None = None,
    item_b: str | None = None,
    follow_links: bool = False,
) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints for a comparison. One that is already open is returned unchanged.

    Args:
        a: A path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        b: The other one.
        revision: That of the one, or of both, that lie on the Hub.
        item: The key of the model that is meant in each of the two that holds several.
        item_b: The key of the model of ``b``, where it is another than ``item``.
        follow_links: Read what links lead to that leave the folders.

    Raises:
        DsconvError: What ``open_checkpoint`` raises. CheckpointNotFoundError where neither has the model ``item``.
    """
    on_hub = [given for given in (a, b) if isinstance(given, str) and lies_on_hub(given)]

    def open_one(given: str | os.PathLike[str] | Checkpoint, key: str | None) -> Checkpoint:
        if isinstance(given, Checkpoint):
            return given
        wanted = revision if given in on_hub or not on_hub else None
        return open_checkpoint(given, None, wanted, key, follow_links=follow_links)

    if item is None or item_b is not None:
        return open_one(a, item), open_one(b, item_b)
    found: list[Checkpoint] = []
    unknown: list[CheckpointNotFoundError] = []
    for given in (a, b):
        try:
            found.append(open_one(given, item))
        except CheckpointNotFoundError as error:
            try:
                found.append(open_one(given, None))  # a merged model has no items any more
            except SeveralModelsError:
                raise error from None
            unknown.append(error)
    if len(unknown) == len(found):
        raise unknown[0]
    return found[0], found[1]


def _read_or_say(root: Root, tag: str | None, item: str | None, weights: str) -> Checkpoint:
    """Read the checkpoint; where it cannot be read because a run was cut off that wrote it, say that."""
    try:
        checkpoint = _read(root, tag, item, weights)
    except (CheckpointNotFoundError, MissingShardError, MalformedError, InconsistentCheckpointError) as error:
        why = "" if isinstance(error, SeveralModelsError) else cut_off(root.path) or half_done(root.path)
        if why:
            raise MissingShardError(why) from None
        raise
    if why := cut_off(root.path):
        checkpoint.warnings = (*checkpoint.warnings, why)
    return checkpoint


def _read(root: Root, tag: str | None, item: str | None, weights: str) -> Checkpoint:
    tag = _enter_trainer_folder(root, tag)
    for kind in formats():
        if kind.detect(root, tag):
            checkpoint = kind.read(root, tag, item) if weights == MASTERS else _read_own_weights(kind, root, tag)
            if item is not None and "item" not in checkpoint.info:
                raise CheckpointNotFoundError(
                    f"{root.path}: no model is called {safe_repr(item)}: there is one model, which needs no --item"
                )
            return checkpoint
    raise root.nothing_found(EXPECTED)


def _enter_trainer_folder(root: Root, tag: str | None) -> str | None:
    """Move ``root`` from a Trainer's output folder to the ``checkpoint-N`` that is meant; return the tag to read there.

    ``trainer_state.json`` is written last, so a folder without it is a save that did not end. As in transformers
    (``trainer_utils.py``, ``get_last_checkpoint``) the newest is the one of the largest number. A folder with weights
    of its own is left to the formats.

    Raises:
        CheckpointNotFoundError: The newest save did not end, and which one is meant is not clear.
    """
    path = root.path
    saves = [p for p in path.iterdir() if TRAINER_SAVE.fullmatch(p.name)] if path.is_dir() else []
    if any((p / FSDP_MODEL).is_dir() for p in saves):  # the format of these finds its own way
        return tag
    if tag is not None:
        if not any(p.name == tag and (p / TRAINER_STATE).is_file() for p in saves):
            return tag
        root.path = path / tag
        return None
    if not saves or any(
        p.name == "latest" or (p.suffix in OWN_FILES and p.name not in NO_WEIGHTS) for p in path.iterdir()
    ):
        return tag
    saves.sort(key=lambda p: int(p.name.rpartition("-")[2]))
    whole = [p for p in saves if (p / TRAINER_STATE).is_file()]
    if not whole:
        return tag
    unfinished = saves[saves.index(whole[-1]) + 1 :]
    if unfinished:
        raise CheckpointNotFoundError(
            f"{path}: {unfinished[-1].name} is the newest and has no {TRAINER_STATE}, so its save did not end."
            f" Choose an older one with --tag: {', '.join(p.name for p in whole[-8:])}"
        )
    root.path = whole[-1]
    if len(saves) > 1:
        root.warnings.append(
            f"took {root.path.name}, the newest of {count(len(saves), 'checkpoint')}; --tag chooses another"
        )
    return None


def _read_own_weights(kind: Format, root: Root, tag: str | None) -> Checkpoint:
    """Read a checkpoint's 16-bit weights; raise UsageError for a format that has no others to choose from."""
    read: Callable[[Root, str | None], Checkpoint] | None = getattr(kind, "read_own_weights", None)
    if read is None:
        raise UsageError(
            f"{root.path}: --weights 16bit is for DeepSpeed checkpoints, which hold fp32 masters too; this one holds"
            " one set of weights"
        )
    return read(root, tag)


def _check_countable(root: Root, entry: TensorEntry) -> None:
    """Raise MalformedError unless torch can make the shape; a shape without elements may hold any sizes."""
    if math.prod(max(1, size) for size in entry.shape) * entry.dtype.itemsize >= MAX_NUMEL:
        raise MalformedError(
            f"{root.path}: {safe_repr(entry.name)} has the shape {safe_repr(entry.shape)}, which torch cannot make"
        )
