"""Read an index, which says which file of a Hugging Face folder holds which tensor, and read JSON strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.storage.local import open_for_reading
from dsconv.errors import (
    CheckpointNotFoundError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    SeveralModelsError,
    UnsafeError,
)
from dsconv.text import count as counted

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")  # of the name without its suffix
MAX_INDEX_BYTES = 100_000_000  # as much as safetensors allows a header
MAX_INTEGER_DIGITS = 19
MAX_NAME_BYTES = 255  # of a file, on any file system of Linux


def read_indexed(
    index: Path, read_file: Callable[[Path], dict[str, TensorEntry]], fetch: Callable[[Iterable[Path]], None]
) -> tuple[dict[str, TensorEntry], list[Path], list[str]]:
    """Read all files that an index names.

    Args:
        index: The ``*.index.json``; the files lie beside it.
        read_file: Reads the entries of one file.
        fetch: ``Root.fetch``; it is called with the files, before they are read.

    Returns:
        The entries, the files in the order in which the index first names them, and warnings.

    Raises:
        MissingShardError: A file or a tensor that the index names is missing.
        DsconvError: Whatever ``weight_map_of`` and ``read_file`` raise.
    """
    weight_map = weight_map_of(index)
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingShardError(
            f"{index} names {counted(len(missing), 'missing file')}, the first {safe_repr(missing[0], 255)}"
        )
    fetch(files)
    entries: dict[str, TensorEntry] = {}
    warnings = []
    held = set()
    for file in files:
        for name, entry in read_file(file).items():
            names = [each for each in (name, *entry.aliases) if weight_map.get(each) == file.name]
            strays = [each for each in (name, *entry.aliases) if each not in names]
            warnings += [
                f"{file.name} holds {safe_repr(stray)}, which the index does not place there: left out"
                for stray in strays
            ]
            if names:
                entries[names[0]] = replace(entry, name=names[0], aliases=tuple(names[1:]))
                held.update(names)
    lost = [name for name in weight_map if name not in held]
    if lost:
        raise MissingShardError(f"{index} places {safe_repr(lost[0])} in {weight_map[lost[0]]}, which does not hold it")
    return entries, files, warnings


def read_numbered(
    folder: Path, shards: list[Path], index_name: str, read_file: Callable[[Path], dict[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    """Read all shards of a folder that has no index; their names (``NAME-00001-of-00003``) say how many there are.

    Args:
        folder: The folder, for messages.
        shards: The files.
        index_name: The index that is missing, for messages.
        read_file: Reads the entries of one file.

    Raises:
        InconsistentCheckpointError: The files are from two saves, or hold a tensor twice.
        MissingShardError: A number is missing.
    """
    found = {int(match["number"]): (match, shard) for shard in shards if (match := SHARD.fullmatch(shard.stem))}
    kinds = {(match["stem"], int(match["count"])) for match, _ in found.values()}
    if len(kinds) != 1 or len(found) != len(shards):
        raise InconsistentCheckpointError(
            f"{folder}: {shards[0].name} and the other shards are not from one save, and there is no {index_name} that"
            " says which ones belong together"
        )
    ((stem, count),) = kinds
    missing = sorted(set(range(1, count + 1)) - set(found))
    if missing:
        raise MissingShardError(
            f"{folder}: lacks {len(missing)} of {counted(count, 'file')}, such as"
            f" {stem}-{missing[0]:05d}-of-{count:05d}{shards[0].suffix}"
        )
    entries: dict[str, TensorEntry] = {}
    for number in sorted(found):
        for name, entry in read_file(found[number][1]).items():
            if name in entries:
                raise InconsistentCheckpointError(
                    f"{folder}: {safe_repr(name)} is in two of the files, and there is no {index_name} that says which"
                    " one to take"
                )
            entries[name] = entry
    return entries


def set_size(file: Path) -> int:
    """Return of how many files of a model a file is one, by its name; 0 where it is whole."""
    match = SHARD.fullmatch(file.stem)
    return 0 if match is None or int(match["count"]) < 2 else int(match["count"])


def set_warning(file: Path) -> list[str]:
    """Return a warning if a file was given alone, but its name says that it is one of several."""
    count = set_size(file)
    if not count:
        return []
    return [f"{file.name} is one of {count} files of a model, but was read alone: give {file.parent} for all of them"]


def pick_file(folder: Path, first: str, item: str | None, count: Callable[[Path], int]) -> tuple[Path, dict[str, int]]:
    """Choose the file of a folder in which accelerate saved several models: ``model.safetensors``, ``model_1…``.

    accelerate ``checkpointing.py`` ``save_accelerator_state`` numbers the models that it prepared.

    Args:
        folder: The folder.
        first: The name of the first model's file.
        item: The stem of the file that is wanted; None if there is one model.
        count: Returns the number of tensors in a file.

    Returns:
        The file, and the number of tensors of every model if there are several.

    Raises:
        SeveralModelsError: There are several, and ``item`` is None.
        CheckpointNotFoundError: No file is called so.
    """
    stem, _, suffix = first.rpartition(".")
    others = sorted(path for path in folder.glob(f"{stem}_*.{suffix}") if path.stem[len(stem) + 1 :].isdecimal())
    if not others:
        return folder / first, {}
    models = {path.stem: count(path) for path in (folder / first, *others)}
    if item is None:
        raise SeveralModelsError(folder, models)
    if item not in models:
        raise CheckpointNotFoundError(
            f"{folder}: no model is called {safe_repr(item)}; it holds {', '.join(map(safe_repr, models))}"
        )
    return folder / f"{item}.{suffix}", models


def weight_map_of(path: Path) -> dict[str, str]:
    """Return {tensor: file name} of an index.

    Raises:
        MalformedError: It is not an index, or is larger than ``MAX_INDEX_BYTES``.
        UnsafeError: A file name leaves the folder.
    """
    with open_for_reading(path) as file:
        if file.nbytes > MAX_INDEX_BYTES:
            raise MalformedError(f"{path}: an index of {file.nbytes} bytes; the limit is {MAX_INDEX_BYTES}")
        index = parse_json(file.read(0, file.nbytes), path, "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file or "\0" in file:
            raise UnsafeError(
                f"{path}: weight_map puts {safe_repr(name)} in {safe_repr(file)}, outside the folder; refused"
            )
        if len(file.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise MalformedError(
                f"{path}: weight_map puts {safe_repr(name)} in {safe_repr(file)}, a name of over {MAX_NAME_BYTES} bytes"
            )
    return weight_map


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object as strictly as serde_json does.

    Python's own parser guesses encodings and accepts NaN, -0, repeated keys and half surrogates.

    Args:
        raw: The bytes.
        path: The file that errors name.
        what: What errors call it, such as ``the header``.

    Raises:
        MalformedError: It is not JSON, or not an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: {what} is not JSON: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: {what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{safe_repr(twice)} is given twice")
    for name in found:
        name.encode()  # raises UnicodeEncodeError for half of a surrogate pair, which is no text
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS or digits == "-0":
        raise ValueError(f"the integer {digits:.30}")
    return int(digits)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
