"""Rearrange the data of tensors when a model's names change: operations on views, each with its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsconv.checkpoint.config_files import load_config
from dsconv.checkpoint.map.patches import View
from dsconv.errors import UnsupportedError

MAX_SIZE = 1 << 40
MAX_HEADS = 4096  # of attention; into so many blocks a tensor is divided


class Config:
    """A model's config.json, which has the numbers that do not follow from shapes.

    Args:
        path: the file, for messages.
        values: what it holds.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path | None) -> Config | None:
        """Return the configuration in a file, or None for no file. Raises what ``load_config`` does."""
        return None if path is None else cls(path, load_config(path))

    def number(self, key: str, default: int | None = None, most: int = MAX_SIZE - 1) -> int:
        """Return a positive whole number. Raises UnsupportedError where there is none of at most ``most``, and no
        ``default``.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UnsupportedError(
                f"{self.path}: {key} is {value!r:.80}; a positive number of at most {most} is needed to arrange the"
                " weights"
            )
        return value

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        heads = self.number("num_attention_heads", most=MAX_HEADS)
        return self.number("head_dim", self.number("hidden_size") // heads)


class WrongShape(Exception):
    """Raised by an operation for a tensor that does not fit the configuration; the message says what was expected."""


class Operation(Protocol):
    """Turns one tensor of a framework into one or several of Hugging Face's, and back.

    Both raise WrongShape for tensors that do not fit the configuration.
    """

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        """Return Hugging Face's tensors, in the order of the rule's names."""
        ...

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        """Return the framework's tensor."""
        ...


@dataclass(frozen=True)
class Same:
    """Keeps the tensor as it is."""

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        return (view,)

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        return views[0]


@dataclass(frozen=True)
class RotaryPairs:
    """Rows of a projection whose heads are rotated in pairs of neighbours; Hugging Face rotates one half with the
    other (``rotate_half``).

    ``heads`` is the key of the number of heads in the configuration.
    """

    heads: str

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        heads = self._heads(view, config)
        return (view.interleave(config.head_dim // 2, heads),)

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        return views[0].interleave(2, self._heads(views[0], config))

    def _heads(self, view: View, config: Config) -> int:
        default = config.number("num_attention_heads", most=MAX_HEADS) if self.heads == "num_key_value_heads" else None
        heads = config.number(self.heads, default, MAX_HEADS)
        if config.head_dim % 2 or view.shape[0] != heads * config.head_dim:
            raise WrongShape(f"{heads} heads ({self.heads}) of {config.head_dim} rows, an even number")
        return heads


@dataclass(frozen=True)
class Transposed:
    """Swaps the last two dimensions."""

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        if view.ndim < 2:
            raise WrongShape("a matrix")
        return (view.transpose(-1, -2),)

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        return self.to_hf(views[0], config)[0]


@dataclass(frozen=True)
class GateAndUp:
    """Gate and up projection in one, whose rows come first; ``width`` is the key of the number of rows of each, and
    ``times`` that of a factor.
    """

    width: str
    times: str = ""

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        rows = config.number(self.width) * (config.number(self.times) if self.times else 1)
        if view.shape[0] != 2 * rows:
            raise WrongShape(f"{2 * rows} rows (2 × {self.width}{' × ' if self.times else ''}{self.times})")
        return view.split(rows)

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        return View.cat(views)


@dataclass(frozen=True)
class QueryGroups:
    """q, k and v in one: for each group of queries the rows of its heads, then those of its key and of its value."""

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        groups, sizes = self._sizes(config)
        if view.shape[0] != groups * sum(sizes):
            raise WrongShape(
                f"{groups * sum(sizes)} rows ({groups} groups of {sizes[0] // config.head_dim} query heads, a key and a"
                f" value of {config.head_dim} rows)"
            )
        parts = [group.split(sizes) for group in view.split(sum(sizes))]
        return [View.cat(same) for same in zip(*parts, strict=True)]

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        groups, sizes = self._sizes(config)
        for view, size in zip(views, sizes, strict=True):
            if view.shape[0] != groups * size:
                raise WrongShape(f"{groups * size} rows")
        parts = [view.split(size) for view, size in zip(views, sizes, strict=True)]
        return View.cat([part for group in zip(*parts, strict=True) for part in group])

    def _sizes(self, config: Config) -> tuple[int, tuple[int, int, int]]:
        heads = config.number("num_attention_heads", most=MAX_HEADS)
        groups = config.number("num_key_value_heads", heads, MAX_HEADS)
        if heads % groups:
            raise WrongShape(f"num_attention_heads ({heads}) that num_key_value_heads ({groups}) divides")
        return groups, (heads // groups * config.head_dim, config.head_dim, config.head_dim)


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the vocabulary; those after ``vocab_size`` are padding, which is left out."""

    def to_hf(self, view: View, config: Config) -> Sequence[View]:
        rows = config.number("vocab_size")
        if view.shape[0] < rows:
            raise WrongShape(f"at least {rows} rows (vocab_size)")
        return (view.narrow(0, 0, rows),)

    def from_hf(self, views: Sequence[View], config: Config) -> View:
        return views[0]
