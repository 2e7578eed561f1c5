"""Reads every format into a tensor map. Metadata only; nothing a file names is ever run."""

from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.tensormap import Checkpoint, Extent, Piece, Record, TensorEntry

__all__ = ["Checkpoint", "Extent", "Piece", "Record", "TensorEntry", "open_checkpoint"]
