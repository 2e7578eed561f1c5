"""Servers that attack who reads from them: what they say in errors, headers, listings and the Hub's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from attacks.displays import MARKUP
from attacks.downloads import ESCAPES, Download, safetensors, weights
from tests.servers.hostile import Answer, give, give_range

SIGNED = "https://user:secret@bucket.example/x?X-Amz-Signature=5ec2e7"
SAID = f"{ESCAPES} {SIGNED} {MARKUP} " + "x" * 5000
FILE = safetensors({"a": 1.0})
READ = ("inspect {url}/ckpt/", "merge {url}/ckpt/model.safetensors out --no-fsync")
FROM_HUB = ("inspect org/model", "merge org/model out --no-fsync")


def raw(status: int, reason: str, headers: Mapping[str, str], body: bytes) -> Answer:
    """Send bytes that ``http.server`` would refuse to send."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        lines = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        handler.wfile.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass"))
        if handler.command != "HEAD":
            handler.wfile.write(body)
        handler.close_connection = True

    return answer


def plain(text: str) -> str:
    """Return text that fits in a line of a header."""
    return text.replace("\r", "").replace("\n", "").replace("\u2028", "")


def refusing(status: int) -> Answer:
    """Refuse everything, with escapes, markup and a signed address in the reason, in headers and in the body."""
    said = plain(SAID)[:400]
    error = {"X-Error-Message": said, "X-Error-Code": said, "WWW-Authenticate": said, "X-Request-Id": said}
    return raw(status, said, error, json.dumps({"error": SAID}).encode())


def listing(page: str) -> Answer:
    """Serve a folder whose listing is ``page``, and sound weights in it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/"):
            give(handler, 200, page.encode("utf-8", "surrogatepass"), Content_Type="text/html")
        elif handler.path.endswith("model.safetensors"):
            give_range(handler, FILE)
        else:
            give(handler, 404, b"")

    return answer


def hub(info: Mapping[str, Any]) -> Answer:
    """Answer as the Hub does, with ``info`` about each repository."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if "/resolve/" in handler.path:
            give_range(handler, FILE, ETag='"abc"', X_Repo_Commit="0" * 40)
        else:
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            body = {"id": "org/model", "sha": "0" * 40, "private": False, "tags": [], "siblings": [], **info}
            give(handler, 200, json.dumps(body).encode(), Content_Type="application/json")

    return answer


def siblings(*names: object, size: object = len(FILE)) -> dict[str, Any]:
    return {"siblings": [{"rfilename": name, "size": size} for name in names]}


def nothing(box: Path) -> None:
    (box / "ckpt").mkdir()


def sound_weights(box: Path) -> None:
    weights(box)


def numbers(handler: BaseHTTPRequestHandler) -> None:
    """Give lengths that are digits to Python and no numbers, and numbers of 5,000 digits."""
    length = "9" * 5000 if "Range" in handler.headers else "²"
    raw(206, "OK", {"Content-Range": f"bytes ²-{length}/{length}", "ETag": plain(ESCAPES)}, FILE)(handler)


LISTED = (
    f"{plain(ESCAPES)}.safetensors", "../../x.bin", "%2e%2e%2fy.bin", "x" * 5000, "model.safetensors", "config.json/",
    "\ud800.bin",
)  # fmt: skip
LINKS = "".join(f'<a href="{name}">x</a>' for name in LISTED)
ODD_NAMES = (
    "model.safetensors", f"{ESCAPES}.bin", "../../outside/model.safetensors", "/etc/passwd", "a/" * 100_000 + "b",
    "\ud800.json", f"pytorch_model_fsdp_{'9' * 5000}/x", f"model_world_size_{'9' * 5000}_rank_0.pt", 3, None, "\0",
)  # fmt: skip
ONE = siblings("model.safetensors")
SERVERS = [
    Download("refuses with 403 and escapes", nothing, READ, refusing(403)),
    Download("refuses with 404 and escapes", nothing, READ, refusing(404)),
    Download("lengths that are no numbers", nothing, READ, numbers),
    Download("a listing of hostile names", nothing, READ[:1], listing(LINKS)),
    Download("a listing of a million open tags", nothing, READ[:1], listing("<a " * 300_000 + "<!--" * 200_000)),
    Download("the Hub refuses with 401 and escapes", nothing, FROM_HUB, refusing(401)),
    Download("the Hub refuses a push with 403 and escapes", sound_weights, ("push ckpt org/x",), refusing(403)),
    Download("the Hub lists hostile names", nothing, FROM_HUB, hub(siblings(*ODD_NAMES))),
    Download("the Hub gives sizes of other types", nothing, FROM_HUB, hub(siblings("model.safetensors", size="x"))),
    Download("the Hub's commit is a path", nothing, FROM_HUB, hub({"sha": "../../outside", **ONE})),
]
