"""dsconv: sharded training checkpoints into safetensors, streaming, exact and safe.

What is exported here is imported when it is first used, so that ``import dsconv`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsconv._version import __version__

if TYPE_CHECKING:
    from dsconv.checkpoint import Checkpoint, TensorEntry, open_checkpoint
    from dsconv.convert.merge import MergeReport, merge
    from dsconv.convert.universal_writer import UniversalReport, to_universal
    from dsconv.convert.verify import VerifyReport, verify
    from dsconv.errors import DsconvError

_HOMES = {
    "Checkpoint": "dsconv.checkpoint",
    "TensorEntry": "dsconv.checkpoint",
    "open_checkpoint": "dsconv.checkpoint",
    "MergeReport": "dsconv.convert.merge",
    "merge": "dsconv.convert.merge",
    "UniversalReport": "dsconv.convert.universal_writer",
    "to_universal": "dsconv.convert.universal_writer",
    "VerifyReport": "dsconv.convert.verify",
    "verify": "dsconv.convert.verify",
    "DsconvError": "dsconv.errors",
}
__all__ = [
    "Checkpoint", "DsconvError", "MergeReport", "TensorEntry", "UniversalReport", "VerifyReport", "__version__", "merge",
    "open_checkpoint", "to_universal", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dsconv' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
