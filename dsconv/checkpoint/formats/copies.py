"""Compare two copies of a tensor by the checksums in their files, or by their bytes if those do not tell."""

from __future__ import annotations

from functools import partial

from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.reading import Sources, blocks, read_flat_into

BLOCK_BYTES = 1 << 20
# A larger copy is compared by WINDOWS blocks spread over it, since opening a checkpoint must not read a whole model.
WHOLE_BYTES = 64 << 20
WINDOWS = 64


def same_bytes(a_file: TorchFile, a: TensorRef, b_file: TorchFile, b: TensorRef) -> bool:
    """Return whether two tensors hold the same bytes, by the CRC-32s of the records that they lie in.

    The tensors' own bytes are read only if the records hold more than the tensors and differ. Tensors in files without
    checksums count as the same; the caller warns about such files.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if not a.numel:
        return True
    records = [file.archive.records[f"data/{tensor.storage.key}"] for file, tensor in ((a_file, a), (b_file, b))]
    if any(record.crc32 is None for record in records):
        return True
    views = [(record.nbytes, tensor.offset, tensor.strides) for record, tensor in zip(records, (a, b), strict=True)]
    if views[0] == views[1]:
        if records[0].crc32 == records[1].crc32:
            return True
        if records[0].nbytes == a.numel * a.dtype.itemsize:
            return False
    return _read_and_compare(a_file, a, b_file, b)


def _read_and_compare(a_file: TorchFile, a: TensorRef, b_file: TorchFile, b: TensorRef) -> bool:
    pairs = ((a_file, a), (b_file, b))
    entries = [TensorEntry("", tensor.dtype, tensor.shape, partial(file.pieces, tensor)) for file, tensor in pairs]
    with Sources() as sources:
        for start, numel in blocks(entries[0], BLOCK_BYTES):
            views = [memoryview(bytearray(numel * a.dtype.itemsize)) for _ in entries]
            for entry, view in zip(entries, views, strict=True):
                read_flat_into(entry, start, view, sources)
            if views[0] != views[1]:
                return False
    return True


def same(a: TensorEntry, a_start: int, b: TensorEntry, b_start: int, numel: int, sources: Sources) -> bool:
    """Return whether ``numel`` flat elements of ``a`` and ``b`` are equal, byte for byte.

    Two whole records with checksums are compared by those. Otherwise the bytes are compared: all of them up to 64 MB,
    and beyond that 64 blocks of 1 MB, the first and the last among them. A merge takes rank 0's copy, so a difference
    that is missed changes nothing in the output.

    Args:
        a: One tensor.
        a_start: The first flat element of it to compare.
        b: The other tensor.
        b_start: The first flat element of that.
        numel: How many elements to compare.
        sources: The open files.
    """
    if a.dtype != b.dtype or numel == 0:
        return a.dtype == b.dtype
    left = slice_pieces(a.layout, a_start, numel, name=a.name)
    right = slice_pieces(b.layout, b_start, numel, name=b.name)
    if len(left) == len(right) == 1:
        one, two = left[0].extent, right[0].extent
        whole = (
            one.nbytes == one.record.nbytes and two.nbytes == two.record.nbytes and left[0].strides == right[0].strides
        )
        if whole and one.record.crc32 is not None and two.record.crc32 is not None:
            return one.nbytes == two.nbytes and one.record.crc32 == two.record.crc32
    itemsize = a.dtype.itemsize
    step = BLOCK_BYTES // itemsize
    count = -(-numel // step)
    places = (
        range(count)
        if numel * itemsize <= WHOLE_BYTES
        else sorted({i * (count - 1) // (WINDOWS - 1) for i in range(WINDOWS)})
    )
    for place in places:
        start, size = place * step, min(step, numel - place * step)
        ours, theirs = bytearray(size * itemsize), bytearray(size * itemsize)
        read_flat_into(a, a_start + start, memoryview(ours), sources)
        read_flat_into(b, b_start + start, memoryview(theirs), sources)
        if ours != theirs:
            return False
    return True
