"""The writer behind every output: merge, to-universal and to-dcp hand it a ``Destination``, and it does the rest.

It refuses an output that is there already, opens the place (a folder on disk or of a store; only ``open_place``
knows which), has its files filled (``filling.py``), and puts everything into place, the commit marker last. One part of
several goes its own way (``part_writing.py``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.storage.local import is_remote, stat_signature
from dsconv.convert.destination import Destination, Place, Written
from dsconv.convert.filling import WriteOptions as WriteOptions
from dsconv.convert.filling import commit, fill
from dsconv.convert.older import older_output
from dsconv.convert.staging import open_staging, require_space
from dsconv.errors import OutputError
from dsconv.text import redact


def write(
    destination: Destination,
    checkpoint: Checkpoint,
    target: Path,
    options: WriteOptions,
    verify: Callable[[Path], None] | None = None,
) -> Written:
    """Write an output, whole or not at all.

    Args:
        destination: what to write.
        checkpoint: the source, by whose signatures changes of its files are noticed.
        target: the folder, on disk or in a store.
        options: how to write.
        verify: reads back what was written into a folder and raises MismatchError where it differs.

    Returns:
        What the copy did.

    Raises:
        OutputError: the output exists (without ``force``), is being written by another run, does not fit the disk or
            cannot be written.
        MalformedError: a source cannot be read, was damaged, or was written to meanwhile.
        MismatchError: ``verify`` found a difference. Nothing was kept.
        RemoteError: a store failed.
    """
    for path in destination.sources:
        checkpoint.signatures.setdefault(path, stat_signature(path))
    if options.part is not None:
        from dsconv.convert.part_writing import write_part

        return write_part(destination, checkpoint, target, options.part, options, verify)
    older_output(destination, target, options.force)
    if not is_remote(target):
        require_space(target, sum(file.nbytes for file in destination.files))
    with open_place(target, options.fsync, _command(destination, checkpoint, target)) as place:
        old = older_output(destination, target, options.force)  # again, now that no other run can write there
        written = fill(destination, checkpoint, place, options)
        commit(destination, place, written, old, verify)
    return written


def _command(destination: Destination, checkpoint: Checkpoint, target: Path) -> str:
    """Return the command that makes the output, without the options that it had; "" where there is none."""
    words = (destination.command, redact(str(checkpoint.path)), redact(str(target)))
    return f"dsconv {shlex.join(words)}" if destination.command else ""


def refuse_target(destination: Destination, target: Path, options: WriteOptions) -> list[str]:
    """Raise what ``write`` would refuse the target with, without touching it. A dry run ends as the run would.

    Whether another run is writing there is not looked at.

    Returns:
        A warning if the disk has too little space now: a plan is often made before the space is.

    Raises:
        OutputError: the output exists (without ``force``) or cannot be written to.
    """
    older_output(destination, target, options.force)
    if is_remote(target):
        _refuse_fsync(target, options.fsync)
        return []
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise OutputError(f"{target} cannot be made: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{target} cannot be written: {existing} is not writable; name another folder")
    try:
        require_space(target, sum(file.nbytes for file in destination.files))
    except OutputError as error:
        return [f"without --dry-run this is refused: {error}"]
    return []


def _refuse_fsync(target: Path, fsync: bool | None) -> None:
    if fsync is not None:
        raise OutputError(
            f"{target}: --fsync and --no-fsync are for local disks. Leave them out: a store keeps what it acknowledges"
        )


@contextlib.contextmanager
def open_place(target: Path, fsync: bool | None, repeat: str = "") -> Iterator[Place]:
    """Open the folder ``target`` on disk or of a store for one run. What was not committed is gone at the end.

    Args:
        target: the folder.
        fsync: see ``WriteOptions``.
        repeat: the command that makes the output, for those who find it half in place in a store.

    Raises:
        OutputError: another run is at work there, or it cannot be written to.
    """
    if not is_remote(target):
        with open_staging(target, fsync is not False) as staging:
            yield staging
        return
    _refuse_fsync(target, fsync)
    from dsconv.convert.upload import open_upload

    with open_upload(target, repeat) as upload:
        yield upload
