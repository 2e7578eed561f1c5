"""Samples in an order that depends on nothing but the seed, and the place in it, which is a run's to keep.

A step takes the next ``batch_size`` samples of the epoch's shuffled order, over all ranks, whatever their number; so a
run that goes on with another layout sees the data that it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsconv.errors import CheckpointNotFoundError, MalformedError, UsageError

SYNTHETIC_SAMPLES = 512  # an epoch of synthetic data


@dataclass
class Position:
    """Where in the data a run is: ``taken`` samples of epoch ``epoch``. Steps end on gradient accumulation
    boundaries.
    """

    epoch: int = 0
    taken: int = 0


class Data:
    """Rows of ``seq_len`` token ids, int64, and an order of them for each epoch."""

    def __init__(self, samples: torch.Tensor, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._orders: dict[int, torch.Tensor] = {}

    def order(self, epoch: int) -> torch.Tensor:
        """The permutation of an epoch, made by a generator of its own."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._orders = {epoch: torch.randperm(len(self.samples), generator=generator)}
        return self._orders[epoch]

    def take(self, position: Position, count: int) -> torch.Tensor:
        """The next ``count`` samples, [count, seq_len], after which ``position`` is behind them; epochs follow each
        other.
        """
        rows = []
        while count:
            order = self.order(position.epoch)
            chosen = order[position.taken : position.taken + count]
            rows.append(self.samples[chosen])
            count -= len(chosen)
            position.taken += len(chosen)
            if position.taken == len(order):
                position.epoch, position.taken = position.epoch + 1, 0
        return torch.cat(rows)


def open_data(spec: str, seq_len: int, vocab_size: int, seed: int, model_folder: Path | None) -> Data:
    """``synthetic``, a text file, or token ids as an ``.npy`` array.

    Text is split by the tokenizer in the model's folder; without one its bytes are the tokens. Raises
    CheckpointNotFoundError, UsageError where there is less than one sample, MalformedError for ids outside the
    vocabulary.
    """
    if spec == "synthetic":
        return Data(_synthetic(seq_len, vocab_size, seed), seed)
    path = Path(spec)
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"--data {spec}: there is no such file; give a text file, an .npy array of token ids, or 'synthetic'"
        )
    ids = _array(path) if path.suffix == ".npy" else _text(path, vocab_size, model_folder)
    rows = len(ids) // seq_len
    if not rows:
        raise UsageError(f"--data {spec} has {len(ids)} tokens, fewer than one sample of --seq-len {seq_len}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise MalformedError(
            f"{spec} has token ids from {int(ids.min())} to {int(ids.max())}: the model's vocabulary has {vocab_size}"
        )
    return Data(ids[: rows * seq_len].reshape(rows, seq_len), seed)


def _synthetic(seq_len: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Sequences that can be learned: from a random start each token is the last one plus a step of the sequence's
    own.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, vocab_size, (SYNTHETIC_SAMPLES, 1), generator=generator)
    stride = torch.randint(1, 8, (SYNTHETIC_SAMPLES, 1), generator=generator)
    return (start + stride * torch.arange(seq_len)) % vocab_size


def _array(path: Path) -> torch.Tensor:
    import numpy

    try:
        found: Any = numpy.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise MalformedError(f"{path} is not an .npy array: {error}") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise MalformedError(
            f"{path} is an array of {found.ndim} dimensions of {found.dtype}: token ids are one row of integers"
        )
    return torch.from_numpy(found.astype(numpy.int64))


def _text(path: Path, vocab_size: int, model_folder: Path | None) -> torch.Tensor:
    if model_folder is not None and any(model_folder.glob("tokenizer*")):
        from transformers import AutoTokenizer

        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MalformedError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if vocab_size < 256:
        raise UsageError(
            f"--data {path}: the model has no tokenizer, and its vocabulary of {vocab_size} is too small for bytes"
        )
    return torch.frombuffer(bytearray(path.read_bytes() or b"\0"), dtype=torch.uint8).to(torch.int64)
