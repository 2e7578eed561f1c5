"""Ask transformers itself whether a folder loads: ``python -m dsconv.convert.loading_probe FOLDER ARCHITECTURE``.

The folder holds a config.json and safetensors files whose data may be holes: the model is built on the meta device,
with transformers' own renaming and fusing of weights, so that no byte of a tensor is read (transformers
``modeling_utils.py``, ``from_pretrained(…, device_map="meta", output_loading_info=True)``)."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


def probe(folder: str, architecture: str) -> dict[str, Any]:
    """Return ``missing``, ``unexpected`` and ``mismatched`` names, or an ``error`` that says why there is no answer.

    Args:
        folder: Where config.json and the files lie.
        architecture: The class of transformers.
    """
    import torch
    import transformers
    from transformers.utils import logging

    kind = getattr(transformers, architecture, None)
    if kind is None:
        return {"error": f"transformers has no {architecture}"}
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            _, info = kind.from_pretrained(
                folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
            )
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in there, there is no answer
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    mismatched = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys", ()))
    return {
        "missing": sorted(set(info["missing_keys"]) - set(mismatched)),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": mismatched,
    }


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], sys.argv[2])))
