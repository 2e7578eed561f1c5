"""Run the commands of a download as a user does, each in its own process, and report every broken promise."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

from attacks.downloads import SECRET, SECRET_VALUE, Download, safetensors

CODES = (0, 2, 3, 4)  # done, usage, unreadable or malformed, refused as unsafe
MISMATCH = 5
# The limits that docs/safety.md promises for an input of n bytes (holes in sparse files do not count).
BASE_SECONDS, SECONDS_PER_BYTE = 3.0, 2e-6  # with the start of Python, beside other processes
BASE_BYTES, BYTES_PER_BYTE = 100 << 20, 100
LIMIT_SECONDS = 30
SECRETS = (SECRET, struct.pack("<f", SECRET_VALUE))


def allowed(box: Path) -> tuple[float, int]:
    """Return the processor time in seconds and the memory in bytes that the download may cost."""
    nbytes = sum(path.lstat().st_blocks * 512 for path in (box / "ckpt").rglob("*") if not path.is_symlink())
    return BASE_SECONDS + nbytes * SECONDS_PER_BYTE, BASE_BYTES + nbytes * BYTES_PER_BYTE


def state_of(folder: Path) -> dict[str, str]:
    """Return the digest of each file in a folder, and the target of each link, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def faults(download: Download, box: Path) -> list[str]:
    """Make the download in ``box``, run its commands, and return the broken promises."""
    outside = box / "outside"
    outside.mkdir(parents=True)
    (outside / "secret").write_bytes(SECRET + b" and nothing else\n")
    (outside / "weights.safetensors").write_bytes(safetensors({"b": SECRET_VALUE}))
    (outside / "model.safetensors").write_bytes(safetensors({"a": SECRET_VALUE}))
    download.make(box)
    before, (seconds, nbytes) = state_of(outside), allowed(box)
    found = []
    for command in download.commands:
        found += [f"{command}: {fault}" for fault in run(command, box, seconds, nbytes)]
        if state_of(outside) != before:
            return [*found, f"{command}: files outside of the download changed"]
    return found + [f"{path} holds the secret" for path in leaks(box)]


def run(command: str, box: Path, seconds: float, nbytes: int) -> list[str]:
    """Run one command and return the promises that its exit code, output, time or memory breaks."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_COLOR": "1"}
    with (box / "said").open("w+b") as said:
        arguments = [sys.executable, "-m", "dsconv", *shlex.split(command)]
        process = subprocess.Popen(
            arguments, cwd=box, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        usage = wait(process)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if usage is None:
        return [f"no answer within {LIMIT_SECONDS} s"]
    spent, peak = usage
    codes = (*CODES, MISMATCH) if command.startswith("verify") else CODES
    found = []
    if process.returncode not in codes:
        found.append(f"exit code {process.returncode}: {text[-300:]!a}")
    if "Traceback" in text:
        found.append(f"a traceback: {text[-300:]!a}")
    if any(not char.isprintable() and char != "\n" for char in text):
        found.append(f"control characters in its output: {text[:300]!a}")
    if SECRET.decode() in text:
        found.append("the secret in its output")
    if spent > seconds:
        found.append(f"{spent:.1f} s of processor time, where {seconds:.1f} s are allowed")
    if peak > nbytes:
        found.append(f"{peak >> 20} MB of memory, where {nbytes >> 20} MB are allowed")
    return found


def wait(process: subprocess.Popen[bytes]) -> tuple[float, int] | None:
    """Wait for a process and return its processor time and peak memory, or None if it had to be killed.

    The peak is the program's own, whereas ``wait4`` includes the memory of the process that forked it.
    """
    deadline, peak = time.monotonic() + LIMIT_SECONDS, 0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            name = next(line for line in lines if line.startswith("Name:"))
            if "python" in name:
                high = next(line for line in lines if line.startswith("VmHWM:"))
                peak = max(peak, int(high.split()[1]) * 1024)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime, peak
        time.sleep(0.005)
    process.kill()
    process.wait()
    return None


def leaks(box: Path) -> list[str]:
    """Return the files, except for links and those in ``box/outside``, that hold the secret."""
    return [
        str(path.relative_to(box))
        for top in ("out", "out2")
        for path in (box / top).rglob("*")
        if path.is_file() and not path.is_symlink() and any(secret in path.read_bytes() for secret in SECRETS)
    ]
