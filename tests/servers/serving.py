"""Servers for the tests: a file server over HTTP, honest or not, and moto's S3."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote


@dataclass
class FileServer:
    """Serve the files of ``folder`` under ``url``. ``manner`` says how it treats a request for a weights file.

    honest, ignores-ranges, truncates (closes half way), shifts (gives other bytes than asked for), shrinks (the file
    became shorter), refuses (403), fails (503), flaky (each request fails once, then is served), unlisted (honest,
    lists no folder).
    """

    folder: Path
    manner: str = "honest"
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    bytes_sent: int = 0
    failed: set[tuple[str, str]] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet; the second packet would be delayed
    owner: FileServer

    def log_message(self, *args: Any) -> None: ...

    def sent(self, nbytes: int) -> None:
        self.owner.bytes_sent += nbytes

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent(len(body))

    def do_GET(self) -> None:
        server = self.owner
        wanted = self.headers.get("Range", "")
        server.requests.append((self.command, self.path, wanted))
        inside = self.path.partition("?")[0]
        path = server.folder / unquote(inside).strip("/")
        weights = path.suffix in (".pt", ".safetensors", ".bin")
        manner = server.manner if weights else "honest"
        if path.is_dir():
            if server.manner == "unlisted":
                self.answer(404)
            elif not inside.endswith("/"):
                self.answer(301, Location=f"{inside}/")
            else:
                links = "".join(f'<a href="{quote(p.name)}{"/" * p.is_dir()}">x</a>\n' for p in sorted(path.iterdir()))
                self.answer(200, links.encode(), Content_Type="text/html")
            return
        if not path.is_file():
            self.answer(404)
            return
        if manner in ("refuses", "fails"):
            self.answer(403 if manner == "refuses" else 503)
            return
        key = (self.path, wanted)
        if manner == "flaky" and key not in server.failed:
            server.failed.add(key)
            if len(server.failed) % 2:
                self.answer(503)
            else:
                self.close_connection = True
                self.connection.close()
            return
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if not match or manner == "ignores-ranges":
            self.answer(200, path.read_bytes())
            return
        start, stop = int(match[1]), min(int(match[2]) + 1, size)
        if start >= size:
            self.answer(416, Content_Range=f"bytes */{size}")
            return
        probe = (start, stop) == (0, 1)
        if manner == "shrinks" and not probe:
            stop = max(start + 1, stop - 1)
        said = f"bytes {start}-{stop - 1}/{size}"
        if manner == "shifts" and not probe:
            said = f"bytes {start + 1}-{stop}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        if manner == "truncates" and not probe:
            self.send_response(206)
            self.send_header("Content-Range", said)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.answer(206, body, Content_Range=said)

    do_HEAD = do_GET


@contextlib.contextmanager
def serve(folder: Path, manner: str = "honest") -> Iterator[FileServer]:
    owner = FileServer(folder, manner)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": owner}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    owner.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield owner
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def put(fs: Any, source: Path, target: str) -> None:
    """Upload a folder to a file system of fsspec."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{target}/{path.relative_to(source)}", path.read_bytes())
