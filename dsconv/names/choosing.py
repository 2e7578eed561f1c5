"""Ask the tables of names, which are imported only where a checkpoint's names have a framework's mark."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.names.marks import framework_of

if TYPE_CHECKING:
    from dsconv.names.naming import Recognised


def with_hf_names(checkpoint: Checkpoint, config: Path | None) -> Checkpoint:
    """Return a checkpoint under Hugging Face's names and in its layouts; ``to_hf`` documents what it raises.

    Args:
        checkpoint: A checkpoint with a framework's names.
        config: The model's config.json.
    """
    from dsconv.names.naming import to_hf
    from dsconv.names.operations import Config

    return to_hf(checkpoint, Config.read(config))


def with_names(checkpoint: Checkpoint, config: Path | None, names: str) -> Checkpoint:
    """Return a checkpoint under a framework's names and in its layouts; ``to_hf`` and ``from_hf`` say what they raise.

    Args:
        checkpoint: A checkpoint with Hugging Face's names, or with those of any framework.
        config: The model's config.json.
        names: Whose names are wanted, a key of ``FRAMEWORKS``.
    """
    from dsconv.names.naming_back import from_hf
    from dsconv.names.operations import Config

    if names_of(checkpoint):
        checkpoint = with_hf_names(checkpoint, config)
    return from_hf(checkpoint, Config.read(config), names)


def as_hf(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """Return a checkpoint for a model of transformers: under Hugging Face's names where it has a framework's.

    Args:
        checkpoint: A checkpoint with any names.
        config: The model's configuration, of transformers.

    Raises:
        DsconvError: What ``to_hf`` raises.
    """
    if not names_of(checkpoint):
        return checkpoint
    from dsconv.names.naming import to_hf
    from dsconv.names.operations import Config

    return to_hf(checkpoint, Config(Path(type(config).__name__), config.to_dict()))


def hint_of(names: Iterable[str]) -> str:
    """Return what a merge says that keeps a framework's names; "" if no table has them."""
    recognised = _recognised(names)
    return "" if recognised is None else recognised.hint


def names_of(names: Iterable[str]) -> str:
    """Return the framework and the family of the names as text, or "" if no table has them."""
    return str(_recognised(names) or "")


def advice_of(names: Iterable[str], unexpected: Iterable[str]) -> str:
    """Return why names of a framework do not load, and which option helps; "" if ``unexpected`` are of none.

    Args:
        names: All names of the model.
        unexpected: Those that its architecture does not have.
    """
    framework = framework_of(unexpected)
    if framework is None:
        return ""
    recognised = _recognised(names)
    if recognised is None or recognised.unknown:
        return f"These are names of {framework}, which transformers does not load as they are"
    return f"These are names of {recognised}: merge with --names hf to have Hugging Face's"


def _recognised(names: Iterable[str]) -> Recognised | None:
    given = list(names)
    if framework_of(given) is None:
        return None
    from dsconv.names.naming import recognise

    return recognise(given)
