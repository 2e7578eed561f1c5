"""Write files that are whole or absent, and read what the engine wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.local import read_small
from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.convert.folders import opened
from dsconv.errors import DsconvError, MalformedError, OutputError

MAX_JSON_BYTES = 16 << 20
# What JSON has for a field of the engine's data classes, by its annotation.
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "str | None": (str, type(None)),
    "float | None": (int, float, type(None)), "tuple[str, ...]": (list, tuple), "Mapping[str, Any]": (dict,),
}  # fmt: skip


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step; the data is on disk when this returns.

    Raises:
        OutputError: a link has the name of the file, or the system refuses.
    """
    try:
        with opened(path.parent, make=True) as folder:
            folder.replace_file(path.name, data)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that the engine wrote.

    Raises:
        CheckpointNotFoundError: The file does not exist, or it is not a regular one.
        MalformedError: It is larger than any such file, or holds no JSON object.
    """
    try:
        found = load_json(read_small(path, MAX_JSON_BYTES))
    except DsconvError:
        raise
    except ValueError as error:
        raise MalformedError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise MalformedError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def check_types(path: Path, kind: type, found: Mapping[str, Any]) -> None:
    """Raise MalformedError unless the values of a JSON object have the types of a data class's fields.

    Args:
        path: The file, for the message.
        kind: The data class. Fields of other types than those of ``TYPES`` are not checked.
        found: {field: value}.
    """
    for field in fields(kind):
        wanted = TYPES.get(str(field.type))
        if field.name not in found or wanted is None:
            continue
        value = found[field.name]
        fits = type(value) in wanted and not (type(value) is int and abs(value) >= 1 << 63)
        if fits and isinstance(value, (list, tuple)):
            fits = all(isinstance(one, str) for one in value)
        if not fits:
            raise MalformedError(
                f"{path}: {field.name} should be {field.type}, found {type(value).__name__}; give the file that"
                " dsconv wrote"
            )
