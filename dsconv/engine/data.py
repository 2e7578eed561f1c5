"""Training samples in an order that depends only on the seed, and a run's position in that order.

A step takes the next ``batch_size`` samples of the epoch's shuffled order over all ranks, however many there are. A run
that is resumed in another layout therefore sees the same data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsconv.errors import CheckpointNotFoundError, MalformedError, UsageError
from dsconv.text import count as counted
from dsconv.urls import local_path

SYNTHETIC_SAMPLES = 512  # an epoch of synthetic data


@dataclass
class Position:
    """A run's position in the data: it has taken ``taken`` samples of epoch ``epoch``."""

    epoch: int = 0
    taken: int = 0


class Data:
    """Rows of ``seq_len`` token ids (int64), with an order for each epoch."""

    def __init__(self, samples: torch.Tensor, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._orders: dict[int, torch.Tensor] = {}

    def order(self, epoch: int) -> torch.Tensor:
        """Return the permutation of an epoch, which its own generator draws."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._orders = {epoch: torch.randperm(len(self.samples), generator=generator)}
        return self._orders[epoch]

    def take(self, position: Position, count: int) -> torch.Tensor:
        """Return the next ``count`` samples, of shape [count, seq_len], and advance ``position`` past them.

        An epoch that ends is followed by the next.
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
    """Open a run's data.

    Args:
        spec: ``synthetic``, a text file, or an ``.npy`` array of token ids. The tokenizer in the model's folder splits
            text; without one its bytes are the tokens.
        seq_len: Tokens of a sample.
        vocab_size: The number of token ids that the model knows.
        seed: The seed of the order.
        model_folder: The folder of the model, if it has one.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        UsageError: The file has less than one sample.
        MalformedError: The file has token ids outside the vocabulary, or cannot be read.
    """
    if spec == "synthetic":
        return Data(_synthetic(seq_len, vocab_size, seed), seed)
    path = local_path(spec, "--data")
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"--data {spec}: no such file; give a text file, an .npy array of token ids, or 'synthetic'"
        )
    ids = _array(path) if path.suffix == ".npy" else _text(path, vocab_size, model_folder)
    rows = len(ids) // seq_len
    if not rows:
        raise UsageError(
            f"--data {spec} has {counted(len(ids), 'token')}, fewer than one sample of --seq-len {seq_len}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise MalformedError(
            f"{spec} has token ids from {int(ids.min())} to {int(ids.max())}: the model has {vocab_size}"
        )
    return Data(ids[: rows * seq_len].reshape(rows, seq_len), seed)


def _synthetic(seq_len: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Return sequences that can be learned: each starts at random and counts on by a random stride of its own."""
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
            f"{path} is an array of {found.dtype} with {counted(found.ndim, 'dimension')}; expected one dimension of"
            " integers"
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
