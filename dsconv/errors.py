"""Every error that dsconv raises on purpose, and the exit code that the command line gives it.

An error is one sentence or two that say which file, which tensor, what was expected, what was found and what to do.
Each class is also the built-in error that fits, so that a caller who catches ``FileNotFoundError`` is served.
"""

from __future__ import annotations

EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_UNSAFE = 4
EXIT_MISMATCH = 5
EXIT_HUB = 6
EXIT_INTERRUPTED = 130


class DsconvError(Exception):
    """Base of all errors that dsconv raises on purpose."""

    exit_code = EXIT_UNREADABLE

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


class UsageError(DsconvError, ValueError):
    """What was asked for cannot be: settings that contradict each other, or that no engine has."""

    exit_code = EXIT_USAGE


class CheckpointNotFoundError(DsconvError, FileNotFoundError):
    """The path, the tag or the kind of file that makes a checkpoint is not there."""


class MissingShardError(DsconvError, FileNotFoundError):
    """The checkpoint says that it has more shard files than are there."""


class MalformedError(DsconvError, ValueError):
    """A file is truncated, corrupt, or does not hold what its format says."""


class InconsistentCheckpointError(DsconvError, ValueError):
    """Files that are sound one by one do not belong to one checkpoint."""


class UnsupportedError(DsconvError, ValueError):
    """A real format or feature that this version does not read; the message names it."""


class UnsafeError(DsconvError, ValueError):
    """A file asks for code to be run, or for a path outside its folder."""

    exit_code = EXIT_UNSAFE


class OutputError(DsconvError, OSError):
    """The output cannot be written: it exists, is being written by another run, or the disk is full."""


class RemoteError(DsconvError, OSError):
    """The Hub, a store or the network failed, after a few tries; the message names the URL."""

    exit_code = EXIT_HUB


class TensorNotFoundError(DsconvError, KeyError):
    """A checkpoint has no tensor of this name."""


class MismatchError(DsconvError):
    """Two checkpoints that were to be equal are not."""

    exit_code = EXIT_MISMATCH


class ConfigMismatchError(DsconvError, ValueError):
    """A DeepSpeed config says something else than the values it was given."""

    exit_code = EXIT_MISMATCH


class RankFailedError(DsconvError, RuntimeError):
    """Another rank of a distributed load failed; the message is its own."""


class RunFailedError(DsconvError, RuntimeError):
    """A rank of a training run failed; the message is its own."""

    exit_code = 1
