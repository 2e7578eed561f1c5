"""Write and read what validation compares: digests of every state that a rank holds, and the logits of a few rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsconv.checkpoint.transfer.reading import tensor_bytes
from dsconv.engine.backend import Backend
from dsconv.engine.data import Data

ROWS = 2


def write_states(folder: Path, backend: Backend) -> None:
    """Write FOLDER/states-rank-R.json: {state: {parameter: sha256 of this rank's part}}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"states-rank-{dist.get_rank()}.json").write_text(json.dumps(digests(backend), indent=1))


def write_logits(folder: Path, backend: Backend, data: Data) -> None:
    """Write FOLDER/logits.safetensors on rank 0, if the layout computes logits."""
    from safetensors.torch import save_file

    logits = backend.logits(data.samples[:ROWS])
    if dist.get_rank() == 0 and logits is not None:
        save_file(
            {"rows": data.samples[:ROWS].contiguous(), "logits": logits.contiguous()}, folder / "logits.safetensors"
        )


def digests(backend: Backend) -> dict[str, dict[str, str]]:
    """Return {state: {parameter: sha256 of this rank's part}}."""
    found: dict[str, dict[str, str]] = {}
    for name, state, tensor in backend.local_states():
        held = tensor.cpu().contiguous()  # bound to a name, so that it lives while its bytes are read
        found.setdefault(state, {})[name] = hashlib.sha256(tensor_bytes(held)).hexdigest()
    return found


def read_states(folder: Path) -> list[dict[str, dict[str, str]]]:
    """Return what ``write_states`` wrote, in the order of the ranks."""
    count = len(list(folder.glob("states-rank-*.json")))
    return [json.loads((folder / f"states-rank-{rank}.json").read_text()) for rank in range(count)]


def read_logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (rows, logits); None if the layout computed no logits."""
    from safetensors.torch import load_file

    path = folder / "logits.safetensors"
    if not path.is_file():
        return None
    found: dict[str, Any] = load_file(path)
    return found["rows"], found["logits"]
