"""Convert a checkpoint of the engine for another layout: to a universal one with the new layout's names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.renaming import renamed
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.universal_writer import to_universal
from dsconv.engine.options import Layout
from dsconv.errors import InconsistentCheckpointError
from dsconv.text import quote


def write_universal(checkpoint: Path, output: Path, layout: Layout, config: Any) -> None:
    """Write ``checkpoint`` as a universal one to ``output`` for ``layout``, which has ZeRO.

    ``config`` is the model's configuration. Raises what ``to_universal`` raises.
    """
    source = open_checkpoint(checkpoint)  # has the names of transformers in every layout
    if layout.pp > 1:
        source = _for_pipeline(source, config)
    # The engine trains every weight; what is left are second names of tied ones, which no loader looks for.
    to_universal(source, output, exclude_frozen=layout.pp > 1, fsync=False)
    shutil.copy(checkpoint / "engine.json", output / "engine.json")


def _for_pipeline(source: Checkpoint, config: Any) -> Checkpoint:
    from dsconv.engine.pipeline_layers import pipeline_names

    names = pipeline_names(config)
    missing = [name for name in names if name not in source]
    if missing:
        raise InconsistentCheckpointError(
            f"{source.path} has no {quote(missing[0])}, which a pipeline stage of the {config.model_type} holds"
        )
    return renamed(source, names)
