"""Read every format into a tensor map. Only metadata is read, and nothing that a file names is ever run."""

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import Extent, Piece, Record, TensorEntry
from dsconv.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "Extent", "Piece", "Record", "TensorEntry", "open_checkpoint"]
