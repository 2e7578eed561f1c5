"""The files of a universal checkpoint that dsconv writes itself: a pickle, and tensors that are streamed into it."""

from __future__ import annotations

from dataclasses import dataclass

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.convert.torch_writer import TorchArchive


@dataclass(frozen=True)
class Stream:
    """A tensor that is streamed into a file as ``dtype``; ``keys`` lead to it in the object that the file holds."""

    entry: TensorEntry
    dtype: DType
    keys: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StateFile:
    """``zero/<parameter>/<state>.pt``, or the model states of a source that has none.

    ``streams`` are in the order of ``archive.streamed``; there are none in a file of settings.
    """

    path: str
    archive: TorchArchive
    streams: tuple[Stream, ...] = ()
    role: str = "parameter"

    @property
    def nbytes(self) -> int:
        return self.archive.nbytes

    @property
    def data_bytes(self) -> int:
        """The number of bytes that are streamed."""
        return sum(stream.nbytes for stream in self.streams)
