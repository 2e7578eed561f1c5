"""Write files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

from dsconv.convert.folders import opened
from dsconv.errors import OutputError


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step; the data is on the disk when this returns.

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
