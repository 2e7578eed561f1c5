"""Train, stop, resume, prove: a run on DeepSpeed or on torch's DTensor parallelism that keeps all of its state."""

from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.running import RunReport, resume, train

__all__ = ["Layout", "RunOptions", "RunReport", "resume", "train"]
