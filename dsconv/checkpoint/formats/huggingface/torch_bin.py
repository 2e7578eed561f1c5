"""State dicts that torch.save wrote: Hugging Face folders of ``.bin``, and single ``.bin``, ``.pt``, ``.pth`` and
``.ckpt`` files.

File names are those of transformers 4 and 5.24 ``utils/__init__.py`` (``WEIGHTS_NAME``, ``WEIGHTS_INDEX_NAME``) and
PEFT's ``adapter_model.bin``. Lightning's ``.ckpt`` is a dict with the weights under ``state_dict`` (pytorch-lightning
2.6 ``trainer/connectors/checkpoint_connector.py`` ``dump_checkpoint``).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.huggingface.index import read_indexed
from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.pickles.values import Instance, Opaque, TensorRef, safe_repr
from dsconv.checkpoint.storage.roots import Root
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from dsconv.zero_utils.files import MODEL, OPTIMIZER, ZERO3_MODEL

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.bin"
SHARD = re.compile(r"pytorch_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.bin")
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights
UNCHECKED = (
    "saved without checksums (in torch's legacy format, or with set_crc32_options(False)): damage cannot be seen"
)


def detect(root: Root, tag: str | None) -> bool:
    """Return whether ``path`` is a file of torch.save by its suffix, or a folder of ``.bin`` weights."""
    path = root.path
    if path.is_file():
        return path.suffix in SUFFIXES
    return any((path / name).is_file() for name in (SINGLE, INDEX, ADAPTER)) or bool(_shards(path))


def read(root: Root, tag: str | None) -> Checkpoint:
    """Read the map of a state dict, of one file or of several.

    Args:
        root: The file or folder.
        tag: Not used: such a folder holds one model.

    Raises:
        MalformedError: A file is damaged, or holds something else than a state dict.
        MissingShardError: One of several files is not there.
        UnsupportedError: The file holds a pickled module, or tensors that dsconv does not read.
        UnsafeError: A pickle calls a function, or the index names a file outside the folder.
    """
    path = root.path
    opened: dict[Path, StateDict] = {}

    def entries_of(file: Path) -> dict[str, TensorEntry]:
        opened[file] = StateDict(file)
        return opened[file].entries()

    warnings: list[str] = []
    if path.is_file():
        entries = entries_of(path)
    elif (path / SINGLE).is_file():
        if (path / INDEX).is_file():  # transformers 5.24 modeling_utils.py looks for the single file first
            warnings.append(f"both {SINGLE} and {INDEX} are there: read {SINGLE}, as transformers does")
        entries = entries_of(path / SINGLE)
    elif (path / INDEX).is_file():
        entries, _, warnings = read_indexed(path / INDEX, entries_of, root.fetch)
    elif shards := _shards(path):
        root.fetch(shards)
        entries = _joined(path, shards, entries_of)
        warnings.append(f"{path} has no {INDEX}: took the {len(shards)} files by their names")
    else:
        entries = entries_of(path / ADAPTER)
    for state_dict in opened.values():
        warnings += state_dict.warnings
    if not entries:
        raise MalformedError(f"{next(iter(opened))}: the state dict is empty")
    first = next(iter(opened.values()))
    info: dict[str, Any] = {"adapter": True} if first.file.path.name == ADAPTER else {}
    if first.under:
        info["weights_under"] = first.under
    return Checkpoint(
        path,
        first.kind,
        entries,
        folder=path.parent if path.is_file() else path,
        step=first.step,
        info=info,
        warnings=tuple(warnings),
        sources=tuple(opened),
    )


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("pytorch_model-*-of-*.bin")) if folder.is_dir() else []


def _joined(folder: Path, shards: list[Path], entries_of: Any) -> dict[str, TensorEntry]:
    """Read all shards of a folder that has no index; their names say how many there must be."""
    found = {int(match["number"]): match for shard in shards if (match := SHARD.fullmatch(shard.name))}
    counts = {int(match["count"]) for match in found.values()}
    if len(counts) != 1 or len(found) != len(shards):
        raise InconsistentCheckpointError(
            f"{folder}: {shards[0].name} and the other shards are not of one save, and there is no {INDEX} that says"
            " which ones belong together"
        )
    count = counts.pop()
    missing = sorted(set(range(1, count + 1)) - set(found))
    if missing:
        raise MissingShardError(
            f"{folder}: missing pytorch_model-{missing[0]:05d}-of-{count:05d}.bin, one of {len(missing)} of {count}"
        )
    entries: dict[str, TensorEntry] = {}
    for number in sorted(found):
        for name, entry in entries_of(folder / found[number][0]).items():
            if name in entries:
                raise InconsistentCheckpointError(
                    f"{folder}: {safe_repr(name)} is in two of the files, and there is no {INDEX} that says which one"
                    " to take"
                )
            entries[name] = entry
    return entries


class StateDict:
    """The state dict of one file.

    Attributes:
        file: The opened file.
        tensors: {name: value} as stored.
        under: The key that the state dict lies under; "" for the file's own top level.
        kind: What the file is, in words.
        step: The training step that the file names, or None.
        warnings: What the user should know of it.
    """

    def __init__(self, path: Path) -> None:
        for pattern in (MODEL, ZERO3_MODEL, OPTIMIZER):
            if pattern.fullmatch(path.name):
                raise UnsupportedError(f"{path}: one file of a DeepSpeed checkpoint; give its folder, {path.parent}")
        self.file = TorchFile(path)
        self.warnings: list[str] = [] if self.file.archive.checksummed else [f"{path.name} was {UNCHECKED}"]
        root = self.file.root
        self.tensors, self.under = self._find(root)
        step = root.get("global_step")
        self.step = step if type(step) is int else None
        self.kind = "PyTorch Lightning" if "pytorch-lightning_version" in root else "PyTorch state dict"

    def _find(self, root: Any) -> tuple[dict[str, Any], str]:
        path = self.file.path
        if isinstance(root, (Opaque, Instance)):
            raise UnsupportedError(
                f"{path}: a whole {root.cls} object, pickled; save its state_dict() instead:"
                " torch.save(model.state_dict(), …)"
            )
        if not isinstance(root, dict):
            raise MalformedError(f"{path}: holds a {type(root).__name__}; expected a state dict of names and tensors")
        own = [key for key, value in root.items() if isinstance(value, TensorRef)]
        nested = [key for key, value in root.items() if isinstance(value, dict) and _holds_tensors(value)]
        usual = [key for key in nested if key in NESTED]
        weights = [key for key in own if root[key].numel > 1]
        if usual and not weights:
            if len(usual) > 1:
                raise MalformedError(
                    f"{path}: holds weights under each of {safe_repr(usual)}; dsconv cannot tell which is the model"
                )
            if own:
                self.warnings.append(f"{path.name}: took {safe_repr(usual[0])}; left out {safe_repr(own[0])} beside it")
            return root[usual[0]], usual[0]
        if nested and own:
            raise MalformedError(
                f"{path}: holds tensors ({safe_repr(own[0])} …) and, beside them, more under {safe_repr(nested[0])}:"
                " not a state dict"
            )
        if nested or (root and not own):
            raise MalformedError(
                f"{path}: not a state dict: expected names and tensors, or those under one of {', '.join(NESTED)}; "
                f"found {safe_repr(list(root))}"
            )
        return root, ""

    def entries(self) -> dict[str, TensorEntry]:
        """Return {name: entry}. Names of one view of one storage become one entry, under the first of them."""
        names_of: dict[Any, list[str]] = {}
        left_out = []
        for name, value in self.tensors.items():
            where = f"{self.file.path}: {safe_repr(name)}"
            if not isinstance(name, str):
                raise MalformedError(f"{where} is not a tensor's name")
            if isinstance(value, TensorRef):
                names_of.setdefault(value.view_key if value.numel else (name,), []).append(name)
            elif isinstance(value, Instance) or (
                isinstance(value, Opaque) and value.cls.startswith("torch._utils._rebuild")
            ):
                raise UnsupportedError(
                    f"{where} is a {value.cls}, whose values the file does not store as a plain tensor's"
                )
            elif isinstance(value, dict) and _holds_tensors(value):
                raise MalformedError(f"{where} holds more tensors: not a state dict")
            else:
                left_out.append(name)
        if left_out:
            self.warnings.append(
                f"{self.file.path.name}: {len(left_out)} entries are not tensors and were left out, the first"
                f" {safe_repr(left_out[0])}"
            )
        entries = {}
        for names in names_of.values():
            tensor = self.tensors[names[0]]
            layout = partial(self.file.pieces, tensor)
            layout()  # bounds are proved now, not when the bytes are wanted
            entries[names[0]] = TensorEntry(names[0], tensor.dtype, tensor.shape, layout, tuple(names[1:]))
        return entries


def _holds_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(item, TensorRef) for item in value.values())
