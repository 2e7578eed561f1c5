"""State dicts that torch.save wrote: Hugging Face folders of ``.bin``, and single ``.bin``, ``.pt``, ``.pth`` and
``.ckpt`` files.

File names are those of transformers 4 and 5.24 ``utils/__init__.py`` (``WEIGHTS_NAME``, ``WEIGHTS_INDEX_NAME``),
PEFT's ``adapter_model.bin`` and accelerate ``checkpointing.py`` (``pytorch_model_1.bin`` is its second model). A
file may hold more than the weights: Lightning's ``.ckpt`` keeps them under ``state_dict`` (pytorch-lightning 2.6
``trainer/connectors/checkpoint_connector.py`` ``dump_checkpoint``), training scripts under any key.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.checks import RANK_FILE, check_not_hollow, unwrapped
from dsconv.checkpoint.formats.huggingface.index import pick_file, read_indexed, read_numbered, set_size, set_warning
from dsconv.checkpoint.formats.items.models import Items, choose_model
from dsconv.checkpoint.formats.items.state_dicts import Leaf, walk
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import Instance, Opaque, TensorRef, safe_repr
from dsconv.checkpoint.storage.roots import Root
from dsconv.checkpoint.torchfile.file import TorchFile, unread_objects
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import count
from dsconv.zero_utils.tag_folder import MODEL, OPTIMIZER, ZERO3_MODEL

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.bin"
STEM = "pytorch_model"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
UNCHECKED = (
    "saved without checksums (in torch's legacy format, or with set_crc32_options(False)): damage cannot be detected"
)


def detect(root: Root, tag: str | None) -> bool:
    """Return whether ``path`` is a file of torch.save by its suffix, or a folder of ``.bin`` weights."""
    path = root.path
    if path.is_file():
        return path.suffix in SUFFIXES
    return any((path / name).is_file() for name in (SINGLE, INDEX, ADAPTER)) or bool(_shards(path))


def read(root: Root, tag: str | None, item: str | None = None) -> Checkpoint:
    """Read the map of a state dict, of one file or of several.

    Args:
        root: The file or folder.
        tag: Not used: such a folder holds one step.
        item: The key of the model to take, where the file or folder holds several.

    Raises:
        SeveralModelsError: There are several models, and ``item`` is None.
        MalformedError: A file is damaged, holds something else than a state dict, or its weights are empty.
        MissingShardError: One of several files is missing.
        UnsupportedError: The file holds a pickled module, or tensors that dsconv does not read.
        UnsafeError: A pickle calls a function, or the index names a file outside the folder.
    """
    path: Path = root.path
    opened: dict[Path, StateDict] = {}
    models: dict[str, int] = {}

    def entries_of(file: Path) -> dict[str, TensorEntry]:
        opened[file] = StateDict(file, item if not models else None)
        return opened[file].entries()

    warnings: list[str] = []
    if path.is_file():
        entries = entries_of(path)
        warnings += set_warning(path)
        if RANK_FILE.fullmatch(path.name):
            warnings.append(f"{path.name} was read alone; if it is one rank's file of several, rank 0's is missing")
    elif (path / SINGLE).is_file():
        if (path / INDEX).is_file():  # transformers modeling_utils.py looks for the single file first
            warnings.append(f"both {SINGLE} and {INDEX} are there: read {SINGLE}, as transformers does")
        file, models = pick_file(path, SINGLE, item, lambda file: len(StateDict(file).tensors))
        entries = entries_of(file)
    elif (path / INDEX).is_file():
        entries, _, warnings = read_indexed(path / INDEX, entries_of, root.fetch)
    elif shards := _shards(path):
        root.fetch(shards)
        entries = read_numbered(path, shards, INDEX, entries_of)
        warnings.append(f"{path} has no {INDEX}: took {count(len(shards), 'file')} by name")
    else:
        entries = entries_of(path / ADAPTER)
    for state_dict in opened.values():
        warnings += state_dict.warnings
    if not entries:
        raise MalformedError(f"{next(iter(opened))}: the state dict is empty")
    first = next(iter(opened.values()))
    folder = path.parent if path.is_file() else path
    warnings += check_not_hollow(entries, path, (folder, folder.absolute().parent))
    entries, removed = unwrapped(entries)
    info = _info(list(opened.values()), models, item, removed)
    if path.is_file() and (of_set := set_size(path)):
        info["one_of_files"] = of_set
    return Checkpoint(
        path,
        first.kind,
        entries,
        folder=folder,
        step=first.step,
        info=info,
        warnings=tuple(warnings),
        sources=tuple(opened),
    )


def _info(opened: list[StateDict], models: dict[str, int], item: str | None, removed: list[str]) -> dict[str, Any]:
    first = opened[0].items
    info: dict[str, Any] = {"adapter": True} if opened[0].file.path.name == ADAPTER else {}
    if first.path:
        info["weights_under"] = first.key
    if removed:
        info["removed_prefixes"] = removed
    left_out: dict[str, int] = {}
    for state_dict in opened:
        for label, number in state_dict.items.left_out.items():
            left_out[label] = left_out.get(label, 0) + number
    if left_out:
        info["left_out"] = dict(sorted(left_out.items()))
    if unread := unread_objects(state_dict.file for state_dict in opened):
        info["unread_objects"] = unread
    if models:
        info |= {"item": opened[0].file.path.stem, "models": models}
    elif len(first.models) > 1 or item is not None:
        info |= {"item": first.key, "models": first.models}
    return info


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{STEM}-*-of-*.bin")) if folder.is_dir() else []


class StateDict:
    """The state dict of one file.

    Attributes:
        file: The opened file.
        items: What the file holds, and which model of it is read.
        tensors: {name: tensor} of that model.
        kind: What the file is, in words.
        step: The training step that the file names, or None.
        warnings: What the user should know about it.
    """

    def __init__(self, path: Path, item: str | None = None) -> None:
        for pattern in (MODEL, ZERO3_MODEL, OPTIMIZER):
            if pattern.fullmatch(path.name):
                raise UnsupportedError(f"{path}: one file of a DeepSpeed checkpoint; give its folder, {path.parent}")
        self.file = TorchFile(path, may_hold_unread=True)
        self.warnings: list[str] = [] if self.file.archive.checksummed else [f"{path.name} was {UNCHECKED}"]
        root = self.file.root
        if isinstance(root, (Opaque, Instance)):
            raise UnsupportedError(
                f"{path}: a whole {root.cls} object, pickled; save its state_dict() instead:"
                " torch.save(model.state_dict(), …)"
            )
        if not isinstance(root, dict):
            raise MalformedError(f"{path}: holds a {type(root).__name__}; expected a state dict of names and tensors")
        step = root.get("global_step")
        self.step = step if type(step) is int else None
        self.kind = "PyTorch Lightning" if "pytorch-lightning_version" in root else "PyTorch state dict"
        self.items, self.tensors = self._choose(root, item)

    def _choose(self, root: dict[Any, Any], item: str | None) -> tuple[Items, dict[str, TensorRef]]:
        path = self.file.path
        found = list(walk(root, path).values())
        if not found:
            return Items((), {}, {}), {}
        if not any(leaf.is_tensor for leaf, _, _ in found):
            self._refuse_unread([(leaf, value) for leaf, value, _ in found])
            raise MalformedError(f"{path}: not a state dict: it holds no tensors, but {safe_repr(list(root))}")
        items = choose_model({str(number): leaf for number, (leaf, _, _) in enumerate(found)}, path, item)
        self.warnings += [f"{path.name}: {warning}" for warning in items.warnings]
        beside = {
            str(number): (leaf, value)
            for number, (leaf, value, _) in enumerate(found)
            if not leaf.is_tensor and leaf.path[:-1] == items.path and str(number) not in items.optimizers
        }
        self._refuse_unread(list(beside.values()))
        if beside:  # in the model's own dictionary
            for flat in beside:
                items.forget(flat)
            first, _ = next(iter(beside.values()))
            self.warnings.append(
                f"{path.name}: left out {count(len(beside), 'entry')} without a tensor, the first"
                f" {safe_repr(first.path[-1])}"
            )
        tensors: dict[str, TensorRef] = {}
        for number, name in items.chosen.items():
            _, value, key = found[int(number)]
            if not isinstance(key, str):
                raise MalformedError(f"{path}: {safe_repr(key)} is not a tensor's name")
            if name in tensors:
                raise MalformedError(f"{path}: two tensors are called {safe_repr(name)}")
            tensors[name] = value
        return items, tensors

    def _refuse_unread(self, values: list[tuple[Leaf, Any]]) -> None:
        """Raise where something that dsconv does not read is a tensor."""
        for leaf, value in values:
            if isinstance(value, Instance) or (
                isinstance(value, Opaque) and value.cls.startswith("torch._utils._rebuild")
            ):
                raise UnsupportedError(
                    f"{self.file.path}: {safe_repr('.'.join(leaf.path))} is a {value.cls}, whose values the file does"
                    " not store as a plain tensor's"
                )

    def entries(self) -> dict[str, TensorEntry]:
        """Return {name: entry}. Names of one view of one storage become one entry, under the first of them."""
        names_of: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            names_of.setdefault(f"view {tensor.view_key}" if tensor.numel else f"name {name}", []).append(name)
        entries = {}
        for names in names_of.values():
            tensor = self.tensors[names[0]]
            layout = partial(self.file.pieces, tensor)
            layout()  # bounds are proved now, not when the bytes are wanted
            entries[names[0]] = TensorEntry(names[0], tensor.dtype, tensor.shape, layout, tuple(names[1:]))
        return entries
