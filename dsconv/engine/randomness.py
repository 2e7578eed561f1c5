"""Seed, save and restore a rank's random generators: Python's, NumPy's, torch's, and DeepSpeed's named ones."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from dsconv.errors import MalformedError


def seed_everything(seed: int, stream: int) -> None:
    """Seed every generator from the run's seed and the rank's stream; CRC-32 keeps neighbouring streams apart."""
    import zlib

    import numpy

    mixed = zlib.crc32(f"{seed}/{stream}".encode())
    random.seed(mixed)
    numpy.random.seed(mixed)
    torch.manual_seed(mixed)  # the CPU's and every device's


def _tracker() -> dict[str, torch.Tensor]:
    """Return the states of DeepSpeed's named CUDA generators; only its activation checkpointing makes any."""
    checkpointing = sys.modules.get("deepspeed.runtime.activation_checkpointing.checkpointing")
    return dict(checkpointing.get_cuda_rng_tracker().get_states()) if checkpointing is not None else {}


def save_randomness(path: Path) -> None:
    """Write the state of every generator of this process to a safetensors file, without a pickle."""
    import numpy
    from safetensors.torch import save_file

    generator: Any = numpy.random.get_state(legacy=True)
    name, keys, place, has_gauss, gauss = generator
    version, internal, gauss_next = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(numpy.int64))}
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    tensors |= {f"deepspeed.{name}": state for name, state in _tracker().items()}
    rest = {"numpy": [name, int(place), int(has_gauss), float(gauss)], "python": [version, gauss_next]}
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"generators": json.dumps(rest)}
    )


def restore_randomness(path: Path) -> None:
    """Restore what ``save_randomness`` wrote. Raises MalformedError for any other file."""
    import numpy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            rest = json.loads((file.metadata() or {})["generators"])
        torch.set_rng_state(tensors["torch"])
        name, place, has_gauss, gauss = rest["numpy"]
        numpy.random.set_state((name, tensors["numpy"].numpy().astype(numpy.uint32), place, has_gauss, gauss))
        version, gauss_next = rest["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))
    except (OSError, KeyError, ValueError, SafetensorError, RuntimeError) as error:
        raise MalformedError(f"{path} does not hold the states of random generators: {error}") from None
    if torch.cuda.is_available():
        states = [
            tensors[key] for key in sorted((k for k in tensors if k.startswith("cuda.")), key=lambda k: int(k[5:]))
        ]
        torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])
    named = {key.removeprefix("deepspeed."): state for key, state in tensors.items() if key.startswith("deepspeed.")}
    if named:
        from deepspeed.runtime.activation_checkpointing import checkpointing

        checkpointing.get_cuda_rng_tracker().set_states(named)
