"""A pickle machine that cannot run anything.

Every pickle that dsconv reads goes through ``load``. The machine knows the opcodes of protocols 0 to 5, builds plain
data, and lets a file call only the functions of ``allowlist.CONSTRUCTORS``. It is written out rather than derived from
``pickle.Unpickler`` because the C machine allocates what a file tells it to (a memo number of 2**31, a text of 2**40)
and hashes what a file nests, before a ``find_class`` hook sees anything.

An opcode takes some 0.5 µs. ``budget.WorkBudget`` bounds what a pickle costs beyond that, in memory and in time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles.errors import BadArguments, BadPickle, Refused, UnsupportedGlobal
from dsconv.checkpoint.pickles.opcodes import OPERATIONS
from dsconv.checkpoint.pickles.state import MAX_PICKLE_BYTES, MachineState
from dsconv.errors import DsconvError, MalformedError, UnsupportedError

__all__ = ["MAX_PICKLE_BYTES", "Machine", "load"]

STOP = ord(".")


def load(
    data: bytes,
    path: Path,
    persistent_load: Callable[[Any], Any],
    what: str = "data.pkl",
) -> Any:
    """Return the object that a pickle describes, of plain Python data and the classes of ``values``.

    Args:
        data: The pickle. Bytes after its end are not read.
        path: The file that messages name.
        persistent_load: Makes a value of a persistent id. It may raise DsconvError or ValueError.
        what: What the pickle is, for messages.

    Raises:
        UnsafeError: The pickle names or calls what is not on the allowlist. The message says which name.
        UnsupportedError: A tensor is of a kind that dsconv does not read.
        MalformedError: It is not a pickle, is truncated, or exceeds a limit.
    """
    return Machine(data, path, persistent_load, what).run()


class Machine(MachineState):
    """One run over one pickle."""

    def run(self) -> Any:
        """Read up to STOP and return the object; raise as ``load`` does."""
        data = self.data
        end = len(data)
        try:
            while self.position < end:
                code = data[self.position]
                self.position += 1
                if code == STOP:
                    if self.marks or len(self.stack) != 1:
                        raise BadPickle("stops with an unfinished stack")
                    return self.stack[0]
                operation = OPERATIONS[code]
                if operation is None:
                    raise BadPickle(f"has an unknown opcode 0x{code:02x}")
                operation(self)
            raise BadPickle("is truncated")
        except DsconvError:  # from refuse or persistent_load; these are ValueErrors too, so first
            raise
        except BadPickle as error:
            raise MalformedError(f"{self.path}: {self.what} {error} at its byte {self.position}") from None
        except BadArguments as error:
            raise MalformedError(f"{self.path}: {self.what} holds {error}, at its byte {self.position}") from None
        except Refused as error:
            raise self.refuse(str(error)) from None
        except UnsupportedGlobal as error:
            raise UnsupportedError(f"{self.path}: {self.what} holds {error}, at its byte {self.position}") from None
        except (IndexError, struct.error, ValueError, TypeError, OverflowError) as error:
            raise MalformedError(
                f"{self.path}: {self.what} is corrupt at its byte {self.position} ({type(error).__name__}:"
                f" {error!s:.200})"
            ) from None
