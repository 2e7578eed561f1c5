"""The tensor map of a whole checkpoint: its entries, and what else opening it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.errors import TensorNotFoundError
from dsconv.text import MAX_MESSAGE, clean, count, quote

if TYPE_CHECKING:
    from dsconv.checkpoint.map.training import Training


class Checkpoint(Mapping[str, TensorEntry]):
    """A read-only mapping of names to entries, and what else opening the checkpoint found.

    An alias (a tied name) is looked up like any other name, but iteration and ``len`` count each tensor once.

    Attributes:
        path: What was opened.
        format: The format's name.
        folder: Where config.json and the tokenizer may lie.
        step: The training step, if the checkpoint records it.
        world: The sizes of the run that saved it, such as ``data_parallel``.
        info: What else the format found out, for reports.
        warnings: What the user has to know.
        sources: The files whose bytes the map uses.
        signatures: The ``stat_signature`` of each source when it had been opened.
        is_deepspeed: Whether DeepSpeed wrote it, at any ZeRO stage.
        training: Makes the map of the optimizer's states, for formats that have one.
        no_training: Why there is none, if the format knows.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        entries: Mapping[str, TensorEntry],
        *,
        folder: Path | None = None,
        step: int | None = None,
        world: Mapping[str, int] | None = None,
        info: Mapping[str, Any] | None = None,
        warnings: tuple[str, ...] = (),
        sources: tuple[Path, ...] = (),
        is_deepspeed: bool = False,
        training: Callable[[], Training] | None = None,
        no_training: str = "",
    ) -> None:
        self.path = path
        self.format = format
        self.folder = folder or path
        self.step = step
        self.world = dict(world or {})
        self.info = dict(info or {})
        self.warnings = tuple(clean(text, MAX_MESSAGE) for text in warnings)
        self.sources = sources
        self.is_deepspeed = is_deepspeed
        self.training = training
        self.no_training = no_training
        self.signatures: dict[Path, tuple[int, int, int] | None] = {}
        self._entries = dict(entries)
        self._aliases = {alias: entry.name for entry in self._entries.values() for alias in entry.aliases}

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self._entries[self._aliases.get(name, name)]
        except KeyError:
            raise TensorNotFoundError(f"{self.path} has no tensor {quote(name)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def with_entries(
        self,
        entries: Mapping[str, TensorEntry],
        info: Mapping[str, Any],
        warnings: tuple[str, ...] = (),
        no_training: str = "",
    ) -> Checkpoint:
        """Return a checkpoint of other tensors, out of the same files. It has no training state.

        Args:
            entries: The tensors by name.
            info: What is added to ``info``.
            warnings: What is added to ``warnings``.
            no_training: Why there is no training state.
        """
        result = Checkpoint(
            self.path,
            self.format,
            entries,
            folder=self.folder,
            step=self.step,
            world=self.world,
            info={**self.info, **info},
            warnings=(*self.warnings, *warnings),
            sources=self.sources,
            is_deepspeed=self.is_deepspeed,
            no_training=no_training,
        )
        result.signatures = dict(self.signatures)
        return result

    @property
    def ties(self) -> dict[str, str]:
        """{alias: the name that holds the data}."""
        return dict(self._aliases)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self._entries.values())

    def __repr__(self) -> str:
        return f"<Checkpoint {self.format} at {self.path}: {count(len(self), 'tensor')}, {self.nbytes} bytes>"
