"""Whether the copies of a tensor in two files are the same, read from the files' own checksums where they can tell."""

from __future__ import annotations

from functools import partial

from dsconv.checkpoint.standins import TensorRef
from dsconv.checkpoint.tensormap import TensorEntry
from dsconv.checkpoint.torch_file import TorchFile

BLOCK_BYTES = 8 << 20


def same_bytes(a_file: TorchFile, a: TensorRef, b_file: TorchFile, b: TensorRef) -> bool:
    """Compare by the CRC-32s of the records that hold the two; nothing is read.

    Only where the records hold more than the tensors, and differ, the tensors' own bytes are read. Files without checksums
    count as the same: the caller warns of them.
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
    from dsconv.checkpoint.reading import Sources, blocks, read_flat_into

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
