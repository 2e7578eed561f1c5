"""The reasons why the pickle machine stops. ``machine.Machine.run`` makes each a DsconvError that names the file."""

from __future__ import annotations


class BadPickle(Exception):
    """The pickle breaks its own grammar, or a limit of this reader. Becomes MalformedError."""


class BadArguments(Exception):
    """A function of the allowlist got arguments that the real function would not take. Becomes MalformedError."""


class UnsupportedGlobal(Exception):
    """A sound file holds a tensor of a kind that dsconv does not read. Becomes UnsupportedError."""


class Refused(Exception):
    """The pickle calls something that no checkpoint has a use for. Becomes UnsafeError."""
