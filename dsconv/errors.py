"""Every error that dsconv raises on purpose, with its exit code on the command line.

A message is one or two sentences that say which file, which tensor, what was expected, what was found and what to do.
Each class also derives from the matching built-in, so ``except FileNotFoundError`` works as usual.

Exit codes: 0 ok, 1 a bug of dsconv's or a failed rank, 2 usage, 3 unreadable or malformed, 4 refused as unsafe, 5
verification mismatch, 6 Hub or network, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import importlib.util
import sys

from dsconv.text import MAX_MESSAGE, clean, count, quote

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_UNSAFE = 4
EXIT_MISMATCH = 5
EXIT_HUB = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class DsconvError(Exception):
    """Base of all errors that dsconv raises on purpose.

    Its text is one line that a terminal or a log can only show (``text.clean``), since it may quote names from files.
    """

    exit_code = EXIT_UNREADABLE

    def __str__(self) -> str:
        return clean(" ".join(str(part) for part in self.args), MAX_MESSAGE)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({quote(str(self), MAX_MESSAGE)})"


class UsageError(DsconvError, ValueError):
    """The request is impossible: settings contradict each other, or no engine supports them."""

    exit_code = EXIT_USAGE


class CheckpointNotFoundError(DsconvError, FileNotFoundError, ValueError):
    """The path, the tag or the kind of file that makes a checkpoint does not exist.

    It is also the ValueError that DeepSpeed's ``zero_to_fp32.py`` raises without ``latest``.
    """


class SeveralModelsError(CheckpointNotFoundError):
    """A checkpoint holds several models, and which one is meant is not clear.

    Attributes:
        where: The file or folder.
        models: What ``item`` may be, each with the number of its tensors.

    ``advice`` says how to choose one where ``item`` is not at hand.
    """

    def __init__(self, where: object, models: dict[str, int], advice: str | None = None) -> None:
        shown = [f"{key!r:.100} ({count(held, 'tensor')})" for key, held in models.items()][:12]
        more = f" and {len(models) - len(shown)} more" if len(models) > len(shown) else ""
        first = next(iter(models), "")
        super().__init__(
            f"{where}: holds {len(models)} models: {', '.join(shown)}{more}. They are not mixed: "
            + (advice or f"choose one with --item, such as --item {first!r:.100} (item= in Python)")
        )
        self.where = where
        self.models = dict(models)


class MissingShardError(DsconvError, FileNotFoundError, ValueError):
    """The checkpoint refers to shard files that do not exist.

    It is also the ValueError that DeepSpeed's ``zero_to_fp32.py`` raises for a wrong number of files.
    """


class MalformedError(DsconvError, ValueError):
    """A file is truncated, corrupt, or does not follow its format."""


class InconsistentCheckpointError(DsconvError, ValueError):
    """The files are sound one by one, but do not belong to one checkpoint."""


class UnsupportedError(DsconvError, ValueError):
    """The checkpoint has a format or feature that this version does not support; the message names it."""


class MissingPackageError(UnsupportedError, ImportError):
    """What was asked for needs a package that is not installed; the message names the extra that brings it."""


class PartitionedExpertsError(UnsupportedError, NotImplementedError):
    """A script that joins the partitions of all ranks would put the experts of AutoEP at ZeRO-3 together wrongly.

    It is also the NotImplementedError that DeepSpeed's ``zero_to_fp32.py`` raises for such a checkpoint.
    """


class UnsafeError(DsconvError, ValueError):
    """A file asks to run code, or names a path outside its folder."""

    exit_code = EXIT_UNSAFE


class OutputError(DsconvError, OSError):
    """The output cannot be written: it exists, another run is writing it, or the disk is full."""


class RemoteError(DsconvError, OSError):
    """The Hub, a store or the network failed, after a few tries; the message names the URL."""

    exit_code = EXIT_HUB


class TensorNotFoundError(DsconvError, KeyError):
    """A checkpoint has no tensor of this name."""


class MismatchError(DsconvError):
    """Two checkpoints that should be equal differ."""

    exit_code = EXIT_MISMATCH


class ConfigMismatchError(DsconvError, ValueError):
    """A DeepSpeed config contradicts the values it was given."""

    exit_code = EXIT_MISMATCH


class RankFailedError(DsconvError, RuntimeError):
    """Another rank of a distributed load failed; the message is that rank's."""


class RunFailedError(DsconvError, RuntimeError):
    """A rank of a training run failed; the message is that rank's."""

    exit_code = EXIT_BUG


def require_packages(what: str, extra: str, *packages: str) -> None:
    """Raise MissingPackageError, which names the extra to install, unless all ``packages`` are installed.

    Args:
        what: What needs the packages, for the message.
        extra: The extra of dsconv that brings them.
        packages: Names to import.
    """
    for package in packages:
        if sys.modules.get(package) is not None:
            continue
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise missing_package(what, package, extra)


# The extra that brings a package which dsconv imports somewhere and its core does not need.
EXTRAS = {
    "accelerate": "train",
    "deepspeed": "train",
    "fsspec": "remote",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "plotly": "html",
    "safetensors": "train",
    "torch": "torch",
    "transformers": "train",
    "zstandard": "zstd",
}


def missing_package(what: str, package: str, extra: str) -> MissingPackageError:
    """Return the error for ``what``, which needs ``package``, which ``extra`` brings."""
    how = f"pip install 'dsconv-toolkit[{extra}]'"
    return MissingPackageError(f"{what} needs {package}, which is not installed and comes with dsconv[{extra}]: {how}")


def as_missing_package(what: str, error: ImportError, extra: str | None = None) -> MissingPackageError | None:
    """Return the error that names the extra for a failed import; None if no extra brings the missing package."""
    package = (error.name or "").partition(".")[0]
    if isinstance(error, MissingPackageError) or package not in EXTRAS or package in sys.modules:
        return None
    return missing_package(what, package, extra or EXTRAS[package])
