"""Outputs that a run was putting into place when it was killed: how they are known, and what to do about them.

The writer (``convert/staging.py``, ``convert/upload.py``) gathers an output in the hidden folder ``STAGING`` of its
target. ``MOVING`` in there says what it moves; on the disk ``STARTED`` says that it has begun.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.local import is_remote, read_small
from dsconv.errors import RemoteError
from dsconv.urls import READ_ONLY

STAGING = ".dsconv-partial"
MOVING = "moving.json"
STARTED = "started"
PARTS = "parts.json"  # what the parts of an output agree on, where several processes write one
MAX_MOVING_BYTES = 64 << 20


def is_name(name: object) -> bool:
    """Return whether it names something that lies in a folder, and not elsewhere."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


def part_mark(number: int) -> str:
    """Return the name of the file that says that a part of an output is done."""
    return f"part-{number}.json"


def is_part_mark(name: str) -> bool:
    """Return whether ``part_mark`` gave a name."""
    return re.fullmatch(r"part-\d+\.json", name) is not None


def moving_in_store(names: Sequence[str], repeat: str) -> bytes:
    """Return the content of ``MOVING`` in a store: what lies half in place, and the command that repairs it."""
    return json.dumps({"names": list(names), "repeat": repeat}).encode()


def debris(target: Path) -> set[str]:
    """Return the names in ``target``, a folder of a store, that are parts of no output.

    A run that was killed while it put another output into place left them.
    """
    names = _read_moving(target).get("names")
    if not isinstance(names, list) or not all(map(is_name, names)):
        return set()  # dsconv did not write it, so what it names must stay
    return set(names)


def cut_off(folder: Path) -> str:
    """Return what to do about an output that was being put into ``folder`` when its run was killed; "" for none."""
    if is_remote(folder):
        if str(folder).startswith(READ_ONLY) or not (folder / STAGING / MOVING).is_file():
            return ""
        repeat = _read_moving(folder).get("repeat")
        command = f"{repeat}, with the options that it had" if isinstance(repeat, str) and repeat else "that command"
        then = f"repeat {command}: it needs no --force, and replaces them"
    elif (folder / STAGING / STARTED).is_file():
        then = "the next dsconv command that writes here finishes that: repeat the one that was cut off"
    else:
        return ""
    return (
        f"{folder}: a run was cut off while it put its output into place, and only some of the files are there: {then}"
    )


def half_done(folder: Path) -> str:
    """Return what to do about an output of which only some parts are written in ``folder``; "" for none."""
    if is_remote(folder) or not (folder / STAGING / PARTS).is_file():
        return ""
    return (
        f"{folder}: an output is being written there in parts, and not all of them are done: run the others, by the"
        " command that wrote these"
    )


def _read_moving(target: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(target / STAGING / MOVING, MAX_MOVING_BYTES))
    except RemoteError:
        raise
    except (OSError, ValueError):
        return {}
    if isinstance(found, list):  # as releases before 0.2 wrote it
        return {"names": found}
    return found if isinstance(found, dict) else {}
