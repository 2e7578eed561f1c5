"""Ask transformers itself whether a folder loads: ``python -m dsconv.convert.loading_probe FOLDER ARCHITECTURE``.

The folder holds a config.json and safetensors files whose data may be holes: the model is built on the meta device,
with transformers' own renaming and fusing of weights, so that no byte of a tensor is read (transformers
``modeling_utils.py``, ``from_pretrained(…, device_map="meta", output_loading_info=True)``)."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import Any

MAX_DATA_BYTES = 8 << 30
MAX_CPU_SECONDS = 60


def probe(folder: str, architecture: str) -> dict[str, Any]:
    """Return ``missing``, ``unexpected`` and ``mismatched`` names, or an ``error`` that says why there is no answer.

    Args:
        folder: Where config.json and the files lie.
        architecture: The class of transformers.
    """
    import transformers
    from transformers.utils import logging

    kind: Any = getattr(transformers, architecture, None)
    if not _is_model(kind, transformers.PreTrainedModel):
        return {"error": f"transformers has no model {architecture}"}
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        _, info = kind.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in there, there is no answer
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    mismatched = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys", ()))
    return {
        "missing": sorted(set(info["missing_keys"]) - set(mismatched)),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": mismatched,
    }


def _is_model(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def limit() -> None:
    """Limit the memory and the time of this process, which a configuration must not use up."""
    for kind, most in ((resource.RLIMIT_DATA, MAX_DATA_BYTES), (resource.RLIMIT_CPU, MAX_CPU_SECONDS)):
        with contextlib.suppress(OSError, ValueError):  # a lower limit holds already, or the system knows none
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    limit()
    print(json.dumps(probe(sys.argv[1], sys.argv[2])))
