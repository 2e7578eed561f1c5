"""Judge one broken input: it is read as before, refused, or a failure. Every input is held to the same limits."""

from __future__ import annotations

import ast
import codecs
import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.transfer.loading import load_tensors
from dsconv.checkpoint.transfer.reading import tensor_bytes
from dsconv.errors import DsconvError

LIMIT_SECONDS = 1.0  # of processor time per input, since a busy machine must not fail a test
LIMIT_BYTES = 512 << 20  # of address space beyond what the process has when the loop starts
SAME, REFUSED, OTHER = "same output", "refused", "other values"
MAX_MESSAGE_CHARS = 1000
# Events that code in a file would cause. None of them happens while a file is read.
FORBIDDEN = frozenset(
    {"exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.rename", "os.mkdir"}
    | {"subprocess.Popen", "pickle.find_class", "marshal.loads", "socket.connect", "shutil.rmtree", "ctypes.dlopen"}
)

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name → (dtype, shape, bytes)


class Failure(Exception):
    """Raised when dsconv breaks a promise."""


class _TooSlow(BaseException):
    pass


@dataclass
class _Watch:
    armed: bool = False
    event: str = ""


_watch = _Watch()
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "compile" and sys._getframe(1).f_code is ast.parse.__code__:
        return  # the installed source of transformers is parsed, and nothing is run
    if _watch.armed and event in FORBIDDEN:
        _watch.event = f"{event} {arguments!r:.200}"


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise _TooSlow


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limit the process's memory, and let ``judged`` watch what is run. Put this around a loop of ``judged``."""
    if not _hooked:
        sys.addaudithook(_audit)  # permanently, since a hook cannot be removed
        _hooked.append(True)
    for codec in ("latin1", "raw-unicode-escape", "unicode-escape"):
        codecs.lookup(codec)  # this imports Python's own module the first time
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def judged(read: Callable[[], str]) -> str:
    """Return the outcome of ``read``, which raises an error or returns whether it read the same as before. Raises
    Failure.
    """
    start = time.process_time()
    _watch.event = ""
    _watch.armed = True
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        outcome = read()
    except DsconvError as error:
        outcome = REFUSED
        message = " ".join(map(str, error.args))  # as it was raised: ``str`` would cut it
        if not str(error).isprintable() or len(message) > MAX_MESSAGE_CHARS:
            raise Failure(f"a message of {len(message)} characters: {message[:300]!a}") from None
    except Failure:
        raise
    except _TooSlow:
        raise Failure(f"over {LIMIT_SECONDS} s of processor time") from None
    except Exception as error:
        raise Failure(f"{type(error).__name__}: {error!s:.300}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _watch.armed = False
    if _watch.event:
        raise Failure(f"ran {_watch.event}")
    # Spent in one call into C, where signals are not handled.
    if (seconds := time.process_time() - start) > LIMIT_SECONDS:
        raise Failure(f"{seconds:.1f} s of processor time")
    return outcome


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """Return every tensor, read by the same copy that merges use, with its checksums checked."""
    loaded = load_tensors(checkpoint.values(), workers=1)
    return {
        name: (entry.dtype.name, entry.shape, bytes(tensor_bytes(loaded[entry.name])) if entry.numel else b"")
        for entry in checkpoint.values()
        for name in (entry.name, *entry.aliases)
    }
