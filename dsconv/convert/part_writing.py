"""Write one part of an output, and put the output into place once all parts are done.

The same plan is made in every process and divided alike (``shares.py``); the parts meet in the hidden folder
(``part_folder.py``). What a part cannot know, the process that completes the set adds: the CRC-32s of tensors and
records that several parts read or wrote, the bytes around the tensors of a file that several share, and the small
files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import ProvenLayout, Record
from dsconv.checkpoint.storage.local import is_remote, stat_signature
from dsconv.checkpoint.storage.unfinished import STARTED, part_mark
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import CopyRun
from dsconv.checkpoint.transfer.record_checks import Fragments, joined_checks
from dsconv.convert.destination import Destination, PartReport, Written
from dsconv.convert.filling import WriteOptions, commit, fill_share
from dsconv.convert.folders import Folder
from dsconv.convert.marked_folders import MarkedFolder
from dsconv.convert.older import older_output
from dsconv.convert.part_folder import Meeting, Terms, abandon, part_names, put, read_mark
from dsconv.convert.parts import Part
from dsconv.convert.shares import Division, Share
from dsconv.convert.staging import Staging, conclude, is_missing_or_debris, require_space
from dsconv.errors import DsconvError, MalformedError, MismatchError, OutputError, UnsupportedError

DESCRIBED = 512  # tensors whose places in the source are part of a plan's digest
RECEIPT = "user.dsconv.parts"  # an attribute of the commit marker
Verify = Callable[[Path], None] | None


def write_part(
    destination: Destination, checkpoint: Checkpoint, target: Path, part: Part, options: WriteOptions, verify: Verify
) -> Written:
    """Write one part of an output into the folder where the parts meet; the last one to be done puts it into place.

    Args:
        destination: what to write.
        checkpoint: the source.
        target: the folder, on a disk that all processes share.
        part: which part this process writes.
        options: how to write.
        verify: see ``writing.write``; only the process that completes the set calls it.

    Returns:
        What the copy of this part did, or of all parts if this process put the output into place.

    Raises:
        OutputError: the output exists (without ``force``), another run is at work there, the parts that lie there are
            of another output, or the disk refuses.
        UnsupportedError: the output cannot be divided, or goes into a store.
        MalformedError: a source cannot be read, was damaged, or was written to meanwhile.
        MismatchError: ``verify`` found a difference. Nothing was kept.
    """
    if is_remote(target):
        raise UnsupportedError(
            f"{target}: the parts of an output meet in a folder of a disk that they share, not in a store: leave out"
            " --part"
        )
    division = Division(destination, part.of)
    share = division.share(part)
    terms = _terms(division, checkpoint, part.of, options)
    meeting = Meeting(
        target,
        terms,
        _names(destination, part.of),
        lambda: _check(destination, target, options),
        lambda: _has_receipt(destination, target, terms),
        options.fsync is not False,
    )
    if meeting.placed():
        return Written(part=PartReport(part.number, part.of, share.nbytes, (), True))
    created = is_missing_or_debris(target)
    marker = _Marker(destination, target)
    written = Written()
    try:
        with meeting.joined() as found:
            if found is not None:
                older_output(destination, target, options.force)
                with meeting.claimed(found[1], part.number):
                    if part.number in meeting.missing(found[1]):
                        written = _copy(destination, share, checkpoint, found, part, options)
                missing = meeting.missing(found[1])
        if found is not None and missing:
            written.part = PartReport(part.number, part.of, share.nbytes, missing)
            return written
        with meeting.alone() as found:
            if found is not None:
                written = _put_in_place(destination, division, checkpoint, found, meeting, options, verify)
    except BaseException as error:
        meeting.tidy()
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()  # this works only if nothing was put there
        if isinstance(error, OSError) and not isinstance(error, DsconvError):
            raise OutputError(f"{target}: writing part {part} failed: {error.strerror or error}") from None
        raise
    if found is None and not meeting.placed():
        marker.require_new(options.force)
    written.part = PartReport(part.number, part.of, share.nbytes, (), True, found is not None)
    return written


def _copy(
    destination: Destination,
    share: Share,
    checkpoint: Checkpoint,
    found: tuple[Folder, MarkedFolder],
    part: Part,
    options: WriteOptions,
) -> Written:
    """Write a part, and mark it as done. Raises what ``write_part`` does."""
    folder, hidden = found
    require_space(folder.path, share.nbytes)
    sync = options.fsync is not False
    run, scattered = fill_share(destination, share, checkpoint, Staging(folder, hidden, sync, shared=True), options)
    data = json.dumps(_mark(share, hidden, run, scattered)).encode()
    put(hidden, part_mark(part.number), data, sync)
    return Written(run.stats.bytes_read, run.stats.overflowed, nonfinite=run.stats.nonfinite)


class _Marker:
    """The commit marker of a target, by which a process knows that another one has put the output into place."""

    def __init__(self, destination: Destination, target: Path) -> None:
        self._name = destination.commit_order[-1]
        self._target = target
        self._before = self._signature()

    def _signature(self) -> list[int] | None:
        if not self._target.is_dir():
            return None
        with Folder.open(self._target) as folder:
            return folder.signature(self._name)

    def require_new(self, replaced: bool) -> None:
        """Raise OutputError unless it has come; where an older output was to be replaced, it must be another one."""
        now = self._signature()
        if now is None or (replaced and now == self._before):
            raise OutputError(
                f"{self._target}: all parts were done, and the process that was to put them into place did not: its own"
                " error says why"
            )


def _terms(division: Division, checkpoint: Checkpoint, of: int, options: WriteOptions) -> Terms:
    """Return what this process and the other ones must agree on."""
    files = {path: number for number, path in enumerate(dict.fromkeys((*checkpoint.sources, *checkpoint.signatures)))}
    # A file is known by size and time: two machines may see other inodes. In a store it is known by size and ETag.
    stamps = [(path.name, (checkpoint.signatures.get(path) or stat_signature(path) or ())[:2]) for path in files]
    source = (checkpoint.format, checkpoint.step, sorted(checkpoint.world.items()), stamps)
    info = json.dumps(checkpoint.info, sort_keys=True, default=repr)
    asked = (options.settings, options.fsync, options.sha256)
    return Terms(of, __version__, _digest([source, info]), _digest(asked), _digest(_described(division, files)))


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _described(division: Division, files: Mapping[Path, int]) -> Iterator[object]:
    """Yield what is written and where, and of some tensors from where in the source they come.

    The source, its stamps and the options decide that for all of them alike; of a checkpoint of many ranks, the list
    would have millions of entries.
    """
    yield division.cuts
    for filling in division.files.values():
        file = filling.file
        yield file.name, file.nbytes, file.data_bytes, hashlib.sha256(file.head).digest()
    step = -(-len(division.tensors) // DESCRIBED) or 1
    for number, tensor in enumerate(division.tensors):
        entry = tensor.entry
        ranges = [(filled.file.file.name, filled.offset_bytes, filled.nbytes) for filled in tensor.ranges]
        yield entry.name, entry.dtype.name, entry.shape, tensor.target.dtype.name, ranges
        if number % step == 0:
            pieces = entry.layout.pieces_in(0) if isinstance(entry.layout, ProvenLayout) else entry.pieces
            yield [
                (files.get(piece.extent.record.path), piece.extent.offset_bytes, piece.start, piece.numel, piece.region)
                for piece in pieces
            ]


def _names(destination: Destination, of: int) -> tuple[str, ...]:
    """Return the names of all that is put into the hidden folder."""
    files = (file.name.partition("/")[0] for file in destination.files)
    return tuple(dict.fromkeys((*files, *destination.commit_order, *part_names(of))))


def _check(destination: Destination, target: Path, options: WriteOptions) -> None:
    older_output(destination, target, options.force)
    require_space(target, sum(file.nbytes for file in destination.files))


def _mark(share: Share, hidden: Folder, run: CopyRun, scattered: Iterable[Record]) -> dict[str, Any]:
    """Return what the process that completes the set has to know of a part that is done."""
    files = {}
    for mine in share.files:
        name = mine.filling.file.name
        ranges = [(r.offset_bytes, r.checksum.fragments) for r in mine.filling.ranges if r.nbytes]
        files[name] = {"inode": _inode(hidden, name), "ranges": ranges}
    read = [(record, check.fragments) for record, check in run.checks.items() if check.fragments]
    records = [
        (str(record.path), record.offset_bytes, record.nbytes, record.crc32, record.name, fragments)
        for record, fragments in (*read, *((record, None) for record in scattered))
    ]
    stats = run.stats
    return {
        "files": files,
        "records": records,
        "bytes_read": stats.bytes_read,
        "overflowed": stats.overflowed,
        "nonfinite": stats.nonfinite,
    }


def _put_in_place(
    destination: Destination,
    division: Division,
    checkpoint: Checkpoint,
    found: tuple[Folder, MarkedFolder],
    meeting: Meeting,
    options: WriteOptions,
    verify: Verify,
) -> Written:
    """Complete what the parts have written, and move it into the target."""
    folder, hidden = found
    place = Staging(folder, hidden, meeting.sync, shared=True)
    try:
        old = older_output(destination, meeting.target, options.force)
        for name in destination.links:
            hidden.remove_marked(name)  # a process that was killed here left it; the file must have one name now
        written = _joined(division, checkpoint, hidden, meeting, options)
        for filling in division.shared_files():
            file = place.create(filling.file.name, filling.file.nbytes, False, False)
            file.begin(b"", destination.rest(filling.file.name))
            file.finish()
        if options.sha256:
            written.digests = place.digests(list(division.files), options.progress)
        commit(destination, place, written, old, lambda path: _check_and_sign(destination, meeting, hidden, verify))
    except BaseException as error:
        if hidden.stat(STARTED) is not None:
            conclude(place, hidden)
        elif isinstance(error, (MalformedError, MismatchError)):  # no other process could do better
            with contextlib.suppress(OSError):
                abandon(hidden)
        raise
    conclude(place, hidden)
    return written


def _check_and_sign(destination: Destination, meeting: Meeting, hidden: MarkedFolder, verify: Verify) -> None:
    """Do what comes right before the files move: verify them, and leave the receipt at the commit marker.

    The receipt tells a process that is started again after the end that nothing is left to do. It is an attribute of
    the file, so that the output's bytes are those of one process. A file system without attributes does without.
    """
    if verify is not None:
        verify(hidden.path)
    with contextlib.suppress(OSError):
        descriptor = hidden.open_file(destination.commit_order[-1], os.O_RDONLY)
        try:
            os.setxattr(descriptor, RECEIPT, _receipt(destination, hidden, meeting.terms))
        finally:
            os.close(descriptor)


def _has_receipt(destination: Destination, target: Path, terms: Terms) -> bool:
    """Return whether the target holds this very output, as the parts have put it there."""
    with contextlib.suppress(OSError), Folder.open(target) as folder:
        descriptor = folder.open_file(destination.commit_order[-1], os.O_RDONLY)
        try:
            return os.getxattr(descriptor, RECEIPT) == _receipt(destination, folder, terms)
        finally:
            os.close(descriptor)
    return False


def _receipt(destination: Destination, folder: Folder, terms: Terms) -> bytes:
    """Return what tells the output from any other: the terms of its parts, and the signatures of its files."""
    signatures = [folder.signature(name) for name in destination.commit_order]
    return _digest([terms, signatures]).encode()


def _joined(
    division: Division, checkpoint: Checkpoint, hidden: MarkedFolder, meeting: Meeting, options: WriteOptions
) -> Written:
    """Join what the parts noted: the checksums of tensors go to their ranges, and those of records are checked.

    Raises:
        OutputError: what they noted is not all that was to be written, or other files lie there since.
        MalformedError: a record fails its checksum.
    """
    written = Written()
    overflowed, nonfinite = Counter[str](), Counter[str]()
    fragments: dict[Record, list[Fragments | None]] = {}
    paths = {str(path): path for path in checkpoint.sources}
    ranges: dict[str, dict[int, RunningChecksum]] = {}
    for name, filling in division.files.items():
        of_file = ranges[name] = {}
        for filled in filling.ranges:
            if filled.nbytes:  # what this process wrote itself is in its own part's note too
                of_file[filled.offset_bytes] = filled.checksum = RunningChecksum(filled.nbytes)
    for number in range(1, meeting.terms.of + 1):
        mark = read_mark(hidden, number)
        try:
            for name, noted in mark["files"].items():
                if _inode(hidden, name) != noted["inode"]:
                    raise _other_files(hidden, name)
                for offset_bytes, of_range in noted["ranges"]:
                    for start, end, crc in of_range:
                        ranges[name][offset_bytes].add(start, end - start, crc)
            for path, offset_bytes, nbytes, crc32, name, of_record in mark["records"]:
                record = Record(paths.get(path) or Path(path), offset_bytes, nbytes, crc32, name)
                noted = None if of_record is None else [(start, end, crc) for start, end, crc in of_record]
                fragments.setdefault(record, []).append(noted)
            overflowed.update(mark["overflowed"])
            nonfinite.update(mark["nonfinite"])
            written.bytes_read += mark["bytes_read"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _other_files(hidden, part_mark(number)) from None
    for name, of_file in ranges.items():
        if not all(checksum.complete for checksum in of_file.values()):
            raise _other_files(hidden, name)
    checks, extra = joined_checks(fragments)
    run = CopyRun(options.workers_for(checkpoint.path), checks, None, checkpoint.signatures)
    run.run(extra)
    run.check_records()
    written.bytes_read += run.stats.bytes_read
    written.overflowed, written.nonfinite = dict(overflowed), dict(nonfinite)
    return written


def _inode(hidden: Folder, name: str) -> int | None:
    found = hidden.stat(name)
    return None if found is None else found.st_ino


def _other_files(hidden: Folder, name: str) -> OutputError:
    return OutputError(
        f"{hidden.path / name} is not what the parts wrote: remove {hidden.path}, and run all parts again"
    )
