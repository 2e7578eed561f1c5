"""Whether two places of a checkpoint hold the same bytes, as copies of one weight on several ranks must."""

from __future__ import annotations

from dsconv.checkpoint.formats.joining import pieces_of
from dsconv.checkpoint.reading import Sources, read_flat_into
from dsconv.checkpoint.tensormap import TensorEntry

BLOCK_BYTES = 1 << 20
WHOLE_BYTES = 64 << 20  # a larger copy is compared by WINDOWS blocks spread over it: opening must not read a model
WINDOWS = 64


def same(a: TensorEntry, a_start: int, b: TensorEntry, b_start: int, numel: int, sources: Sources) -> bool:
    """Whether ``numel`` flat elements of each are equal, byte for byte.

    Where both are whole records with checksums, those are compared. Otherwise the bytes are: all of up to 64 MB, and of
    more 64 blocks of 1 MB, first and last among them. The copies are not what is merged (rank 0's are), so a difference
    that hides from that harms nothing that is written.
    """
    if a.dtype != b.dtype or numel == 0:
        return a.dtype == b.dtype
    left, right = pieces_of(a, a_start, numel), pieces_of(b, b_start, numel)
    if len(left) == len(right) == 1:
        one, two = left[0].extent, right[0].extent
        whole = one.nbytes == one.record.nbytes and two.nbytes == two.record.nbytes and left[0].strides == right[0].strides
        if whole and one.record.crc32 is not None and two.record.crc32 is not None:
            return one.nbytes == two.nbytes and one.record.crc32 == two.record.crc32
    itemsize = a.dtype.itemsize
    step = BLOCK_BYTES // itemsize
    count = -(-numel // step)
    places = range(count) if numel * itemsize <= WHOLE_BYTES else sorted({i * (count - 1) // (WINDOWS - 1) for i in range(WINDOWS)})
    for place in places:
        start, size = place * step, min(step, numel - place * step)
        ours, theirs = bytearray(size * itemsize), bytearray(size * itemsize)
        read_flat_into(a, a_start + start, memoryview(ours), sources)
        read_flat_into(b, b_start + start, memoryview(theirs), sources)
        if ours != theirs:
            return False
    return True
