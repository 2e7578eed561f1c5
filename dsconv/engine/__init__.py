"""Train, stop, resume and validate runs on DeepSpeed or torch's DTensor parallelism, keeping all of their state."""

from dsconv.engine.options import Layout, RunOptions
from dsconv.engine.running import RunReport, resume, train

__all__ = ["Layout", "RunOptions", "RunReport", "resume", "train"]
