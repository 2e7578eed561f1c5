"""What an output would replace in the folder that it goes to."""

from __future__ import annotations

from pathlib import Path

from dsconv.checkpoint.storage.local import is_remote
from dsconv.convert.destination import Destination
from dsconv.convert.folders import Folder, refuse_link, refuse_special
from dsconv.convert.staging import refuse_existing
from dsconv.errors import OutputError


def older_output(destination: Destination, target: Path, force: bool) -> list[str]:
    """Return the names of an older output in ``target``, its commit marker first.

    Raises:
        OutputError: there is one and ``force`` is not given, or the output must not go there.
    """
    if not is_remote(target):
        refuse_link(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    names = destination.older(target) if target.is_dir() else []
    if target.is_dir() and not is_remote(target):
        with Folder.open(target) as folder:
            inner = {file.name.partition("/")[0] for file in destination.files if "/" in file.name}
            refuse_special(folder, [*destination.commit_order, *names], inner)
    refuse_existing(target, names, destination.what, force)
    return names
