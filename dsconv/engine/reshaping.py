"""A checkpoint of the engine's for ranks laid out otherwise: a universal one, by the parameters' names in the transformers model."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.universal_writer import to_universal
from dsconv.engine.options import Layout


def write_universal(checkpoint: Path, output: Path, layout: Layout) -> None:
    """Convert ``checkpoint`` for ``layout``. Raises what ``to_universal`` raises."""
    to_universal(open_checkpoint(checkpoint), output, fsync=False)
    shutil.copy(checkpoint / "engine.json", output / "engine.json")
