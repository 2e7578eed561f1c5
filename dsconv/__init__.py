"""dsconv converts sharded training checkpoints: streaming, exact and safe.

Names are imported when they are first used, so that ``import dsconv`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsconv._version import __version__

if TYPE_CHECKING:
    from dsconv import compat as compat
    from dsconv import engine as engine
    from dsconv import errors as errors
    from dsconv.checkpoint import Checkpoint, TensorEntry, open_checkpoint
    from dsconv.convert.compare import VerifyReport
    from dsconv.convert.dcp_writer import DcpReport, to_dcp
    from dsconv.convert.diff import DiffReport, diff
    from dsconv.convert.merge import MergeReport, merge
    from dsconv.convert.push import push
    from dsconv.convert.push_upload import PushReport
    from dsconv.convert.universal_writer import UniversalReport, to_universal
    from dsconv.convert.verify import verify
    from dsconv.errors import DsconvError
    from dsconv.loaders.report import LoadReport
    from dsconv.loaders.stream import stream_into
    from dsconv.loaders.tensor_parallel import load_tp
    from dsconv.loaders.zero3 import load_zero3
    from dsconv.zero_utils.config import DSConfig

_HOMES = {
    "Checkpoint": "dsconv.checkpoint",
    "TensorEntry": "dsconv.checkpoint",
    "open_checkpoint": "dsconv.checkpoint",
    "MergeReport": "dsconv.convert.merge",
    "merge": "dsconv.convert.merge",
    "PushReport": "dsconv.convert.push_upload",
    "push": "dsconv.convert.push",
    "UniversalReport": "dsconv.convert.universal_writer",
    "to_universal": "dsconv.convert.universal_writer",
    "DiffReport": "dsconv.convert.diff",
    "diff": "dsconv.convert.diff",
    "VerifyReport": "dsconv.convert.compare",
    "verify": "dsconv.convert.verify",
    "DcpReport": "dsconv.convert.dcp_writer",
    "to_dcp": "dsconv.convert.dcp_writer",
    "DSConfig": "dsconv.zero_utils.config",
    "DsconvError": "dsconv.errors",
    "LoadReport": "dsconv.loaders.report",
    "load_tp": "dsconv.loaders.tensor_parallel",
    "load_zero3": "dsconv.loaders.zero3",
    "stream_into": "dsconv.loaders.stream",
}
__all__ = [
    "Checkpoint",
    "DSConfig",
    "DcpReport",
    "DiffReport",
    "DsconvError",
    "LoadReport",
    "MergeReport",
    "PushReport",
    "TensorEntry",
    "UniversalReport",
    "VerifyReport",
    "__version__",
    "diff",
    "load_tp",
    "load_zero3",
    "merge",
    "open_checkpoint",
    "push",
    "stream_into",
    "to_dcp",
    "to_universal",
    "verify",
]


_MODULES = ("compat", "engine", "errors")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


if not TYPE_CHECKING:  # type checkers know the names above, and report all others

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"dsconv.{name}")
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'dsconv' has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(home), name)
        except ImportError as error:
            from dsconv.errors import as_missing_package

            extra = "train" if name in ("load_tp", "load_zero3") else None
            raise as_missing_package(f"dsconv.{name}", error, extra) or error from None
