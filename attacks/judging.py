"""Run the commands of a download as a user does, each in its own process, and report every broken promise."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

from attacks.downloads import SECRET, SECRET_VALUE, Download, folder, safetensors
from tests.servers.serving import serve

CODES = (0, 2, 3, 4)  # done, usage, unreadable or malformed, refused as unsafe
MISMATCH, HUB = 5, 6
# The limits that docs/safety.md promises for an input of n bytes (holes in sparse files do not count), beyond what the
# same command takes on a sound download of a few bytes: that is the start of Python and of the packages it imports.
BASE_SECONDS, SECONDS_PER_BYTE = 1.0, 2e-6
BASE_BYTES, BYTES_PER_BYTE = 64 << 20, 100
LIMIT_SECONDS = 60
SECRETS = (SECRET, struct.pack("<f", SECRET_VALUE))
TOKEN = "hf_0TheTokenOfTheAttackedUser"  # noqa: S105 - it must not be shown
# What dsconv's pages are made of. Markup from a file's name would bring other elements and attributes.
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "thead", "tbody", "tr", "th",
    "td", "details", "summary", "footer", "script",
}  # fmt: skip
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "id", "style", "type"}
Usage = tuple[float, int]  # processor time in seconds, and the peak of memory in bytes


def allowed(box: Path) -> Usage:
    """Return what the download may cost beyond a sound one of a few bytes."""
    nbytes = sum(path.lstat().st_blocks * 512 for path in (box / "ckpt").rglob("*") if not path.is_symlink())
    return BASE_SECONDS + nbytes * SECONDS_PER_BYTE, BASE_BYTES + nbytes * BYTES_PER_BYTE


@functools.cache
def sound(command: str, serves: bool) -> Usage:
    """Return what a command costs on a sound download of one tensor, or on a server that serves it."""
    with tempfile.TemporaryDirectory() as name:
        box = Path(name)
        folder(box, model_safetensors=safetensors({"layers.0.a": 1.0}))
        (box / "outside").mkdir()
        (box / "outside" / "model.safetensors").write_bytes(safetensors({"layers.0.a": SECRET_VALUE}))
        with serve(box) if serves else contextlib.nullcontext() as server:
            _, _, _, usage = run(command, box, server.url if server else "")
    if usage is None:
        raise RuntimeError(f"no answer from a sound download: {command}")
    return usage


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
    before, more = state_of(outside), allowed(box)
    found = []
    with download.serving() as url:
        for command in download.commands:
            found += [f"{command}: {fault}" for fault in judged(command, box, url, more)]
            if state_of(outside) != before:
                return [*found, f"{command}: files outside of the download changed"]
    return found + [f"{path} holds the secret" for path in leaks(box)]


def judged(command: str, box: Path, url: str, more: Usage) -> list[str]:
    """Run one command and return the promises that its exit code, output, pages, time or memory breaks."""
    code, out, err, usage = run(command, box, url)
    text = out + err
    if usage is None:
        return [f"no answer within {LIMIT_SECONDS} s"]
    base = sound(command, bool(url))
    codes = {
        *CODES,
        *([MISMATCH] if command.startswith("verify") else []),
        *([HUB] if url or "org/" in command else []),
    }
    found = []
    if code not in codes:
        found.append(f"exit code {code}: {text[-300:]!a}")
    if "Traceback" in text:
        found.append(f"a traceback: {text[-300:]!a}")
    if any(not char.isprintable() and char != "\n" for char in text):
        found.append(f"control characters in its output: {text[:300]!a}")
    if SECRET.decode() in text or TOKEN in text:
        found.append("the secret in its output")
    if "--json" in command:
        found += json_faults(out)
    for page in box.glob("*.html"):
        found += [f"{page.name}: {fault}" for fault in page_faults(page.read_text(encoding="utf-8"))]
    if usage[0] > base[0] + more[0]:
        found.append(f"{usage[0]:.1f} s of processor time; {base[0]:.1f} s and {more[0]:.1f} more are allowed")
    if usage[1] > base[1] + more[1]:
        found.append(f"{usage[1] >> 20} MB of memory; {base[1] >> 20} MB and {more[1] >> 20} more are allowed")
    return found


def run(command: str, box: Path, url: str = "") -> tuple[int, str, str, Usage | None]:
    """Run one command in ``box``; return its exit code, both streams, and what it cost (None if it was killed)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_COLOR": "1"}
    environment |= {"HF_TOKEN": TOKEN, "HF_ENDPOINT": url or "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(box / "cache"), "HF_HUB_CACHE": str(box / "cache")}
    with (box / "said").open("w+b") as said, (box / "errors").open("w+b") as errors:
        arguments = [sys.executable, "-m", "dsconv", *shlex.split(command.replace("{url}", url))]
        process = subprocess.Popen(
            arguments, cwd=box, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=errors
        )
        usage = wait(process)
        texts = []
        for stream in (said, errors):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return process.returncode, texts[0], texts[1], usage


def json_faults(text: str) -> list[str]:
    """Return why a command's output is not one JSON object in ASCII."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(text, parse_constant=constant)
    except ValueError as error:
        return [f"not JSON: {error}: {text[:200]!a}"]
    return [] if isinstance(found, dict) and text.isascii() else ["not one object in ASCII"]


class Elements(HTMLParser):
    """What of a page dsconv does not write."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"<{tag}>"] if tag not in ELEMENTS else []
        self.found += [f"<{tag} {name}>" for name, _ in attrs if name not in ATTRIBUTES]


def page_faults(text: str) -> list[str]:
    """Return the elements of a page that came from a file's text."""
    parser = Elements()
    parser.feed(text)
    return parser.found


def wait(process: subprocess.Popen[bytes]) -> Usage | None:
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
