"""Give the same file to other tools, each in its own process, so that a payload cannot harm this one."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 10.0
MEMORY_BYTES = 16 << 30  # of address space, which torch alone takes much of


def in_child(action: Callable[[], str], folder: Path) -> str:
    """Run ``action`` in a child process, in ``folder`` and with closed streams. Return its result, the name of the
    exception that ended it, or "no answer".
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run(action, folder, reading, writing)
    os.close(writing)
    deadline = time.monotonic() + SECONDS
    answer = b""
    while (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        if not (chunk := os.read(reading, 4096)):
            break
        answer += chunk
        if answer.endswith(b"\0"):
            break
    os.close(reading)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer.decode("utf-8", "replace").rstrip("\0") or "no answer"


def _run(action: Callable[[], str], folder: Path, reading: int, writing: int) -> None:
    answer = "no answer"
    try:
        os.setsid()
        os.close(reading)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.chdir(folder)
        atexit._clear()  # run only the handlers that the program registers, not those of this process
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            answer = action()
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is the answer
            answer = type(error).__name__
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # run what the program registered for the end of the process
    finally:
        with contextlib.suppress(OSError):
            os.write(writing, answer.encode()[:4000] + b"\0")
        os._exit(0)


def unpickled(file: Path) -> str:
    """Read the file with Python's own pickle, which makes no promises."""
    import pickle

    with file.open("rb") as stream:
        pickle.load(stream)
    return "read"


def weights_only(file: Path) -> str:
    import torch

    torch.load(file, weights_only=True)
    return "read"


def zero_to_fp32(checkpoint: Path) -> str:
    """Read the file with DeepSpeed's script, which loads with weights_only=False."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return "read"


def picklescan(file: Path) -> str:
    """Return picklescan's verdict: ``dangerous``, ``suspicious`` (it does not know a name), ``error`` (it could not
    scan the file) or ``clean``.
    """
    from picklescan.scanner import scan_file_path

    result = scan_file_path(str(file))
    if result.issues_count:
        return "dangerous"
    return "error" if result.scan_err else "suspicious" if result.suspicious_count else "clean"


def dsconv(path: Path) -> str:
    from dsconv import open_checkpoint
    from dsconv.errors import DsconvError, UnsafeError

    try:
        open_checkpoint(path)
    except UnsafeError as error:
        return f"unsafe: {error}"
    except DsconvError as error:
        return f"refused: {error}"
    return "read"
