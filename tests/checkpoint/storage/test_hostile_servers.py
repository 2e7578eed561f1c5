"""Servers that redirect, change files, compress, or never end: no token is sent to another host, and no byte is
misplaced.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dsconv import merge, open_checkpoint
from dsconv.checkpoint.storage import http, stores
from dsconv.checkpoint.storage.roots import as_path
from dsconv.errors import DsconvError, MalformedError, RemoteError
from tests.trained import same

FULL = torch.arange(4096, dtype=torch.float32)
FILE = save({"w": FULL})
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Start a server, and give its URL and the headers of all requests that it gets."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def give(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def give_range(handler: BaseHTTPRequestHandler, data: bytes, **headers: str) -> None:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if wanted is None:
        give(handler, 200, data, **headers)
        return
    start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
    give(handler, 206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)


def only_weights(answer: Answer) -> Answer:
    def answers(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("model.safetensors"):
            answer(handler)
        else:
            give(handler, 404, b"")

    return answers


def test_a_password_is_not_sent_to_another_host() -> None:
    with serving(only_weights(lambda handler: give_range(handler, FILE))) as (elsewhere, seen_there):
        there = elsewhere.replace("127.0.0.1", "localhost")

        def redirect(handler: BaseHTTPRequestHandler) -> None:
            give(handler, 302, b"", Location=f"{there}/model.safetensors")

        with serving(only_weights(redirect)) as (url, seen_here):
            found = open_checkpoint(f"{url.replace('//', '//user:secret@')}/model.safetensors")
            assert same(found["w"].read(), FULL)
    assert any("authorization" in headers for headers in seen_here)
    assert seen_there
    assert not any("authorization" in headers or "cookie" in headers for headers in seen_there)


def test_the_token_of_the_hub_is_not_sent_to_another_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub redirects downloads to a store on another host, for ``org/model`` and for ``hf://org/model``."""
    with serving(lambda handler: give_range(handler, FILE)) as (elsewhere, seen_there):
        there = elsewhere.replace("127.0.0.1", "localhost")

        def hub(handler: BaseHTTPRequestHandler) -> None:
            sha, name = "0" * 40, "model.safetensors"
            if "/resolve/" in handler.path:
                headers = {"X_Repo_Commit": sha, "X_Linked_Size": str(len(FILE)), "X_Linked_ETag": '"abc"'}
                give(handler, 302, b"", Location=f"{there}/blob", ETag='"abc"', **headers)
            elif "/tree/" in handler.path or "/paths-info/" in handler.path:
                length = int(handler.headers.get("Content-Length") or 0)
                handler.rfile.read(length)
                row = f'{{"type": "file", "path": "{name}", "size": {len(FILE)}, "oid": "abc"}}'
                give(handler, 200, f"[{row}]".encode(), Content_Type="application/json")
            else:
                files = f'[{{"rfilename": "{name}", "size": {len(FILE)}}}]'
                body = f'{{"id": "org/model", "sha": "{sha}", "siblings": {files}, "private": true, "tags": []}}'
                give(handler, 200, body.encode(), Content_Type="application/json")

        with serving(hub) as (url, seen_here):
            monkeypatch.setenv("HF_ENDPOINT", url)
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
            monkeypatch.setenv("HF_HUB_OFFLINE", "0")
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
            assert same(open_checkpoint("org/model")["w"].read(), FULL)
    assert any(headers.get("authorization") == "Bearer hf_secret" for headers in seen_here)
    assert seen_there
    assert not any("hf_secret" in value for headers in seen_there for value in headers.values())


@pytest.mark.parametrize("what", ["etag", "length"])
def test_a_file_that_changes_between_requests_is_noticed(what: str, tmp_path: Path) -> None:
    state = {"data": FILE, "etag": '"1"'}
    with serving(only_weights(lambda handler: give_range(handler, state["data"], ETag=state["etag"]))) as (url, _):  # type: ignore[arg-type]
        found = open_checkpoint(f"{url}/model.safetensors")
        assert same(found["w"].read(), FULL)
        if what == "etag":
            state |= {"data": save({"w": -FULL}), "etag": '"2"'}
        else:
            state["data"] = FILE + b"more"
        with pytest.raises(MalformedError, match=r"model\.safetensors: it was written to while it was read"):
            found["w"].read()
        with pytest.raises(MalformedError, match=r"model\.safetensors: it was written to while it was read"):
            merge(found, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_file_of_a_bucket_that_changes_while_it_is_copied_is_noticed(s3: Any, tmp_path: Path) -> None:
    s3.pipe_file("shelf/model.safetensors", FILE)
    merge("s3://shelf/model.safetensors", tmp_path / "fine", fsync=False)
    opened = open_checkpoint("s3://shelf/model.safetensors")
    s3.pipe_file("shelf/model.safetensors", save({"w": -FULL}))
    with pytest.raises(MalformedError, match=r"model\.safetensors: it was written to while it was read"):
        merge(opened, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_compressed_ranges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compressed(handler: BaseHTTPRequestHandler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"])
        assert wanted is not None
        start, stop = int(wanted[1]), int(wanted[2]) + 1
        body = gzip.compress(FILE[start:stop])
        said = f"bytes {start}-{stop - 1}/{len(FILE)}"
        give(handler, 206, body, Content_Range=said, Content_Encoding="gzip")

    with (
        serving(only_weights(compressed)) as (url, _),
        pytest.raises(RemoteError, match=r"model\.safetensors: the server compresses"),
    ):
        open_checkpoint(f"{url}/model.safetensors")


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = b"x" * 65536
    while True:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))


def test_bodies_without_an_end_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_PAGE_BYTES", 1 << 20)
    with serving(endless) as (url, _):
        with pytest.raises(DsconvError, match="does not honour range requests"):
            open_checkpoint(f"{url}/model.safetensors")
        with pytest.raises(MalformedError, match=r"config\.json: has more than 1000 bytes"):
            as_path(f"{url}/config.json").read_small(1000)  # type: ignore[attr-defined]  # a RemotePath
        assert list(as_path(f"{url}/folder/").iterdir()) == []


def test_a_body_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.1)
    ended = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Range") == "bytes=0-0":
            give_range(handler, FILE)
            return
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-7/{len(FILE)}")
        handler.send_header("Content-Length", "8")
        handler.end_headers()
        handler.wfile.write(FILE[:3])
        handler.wfile.flush()
        ended.wait(30)

    with serving(only_weights(drip)) as (url, seen):
        with pytest.raises(RemoteError, match="cannot be reached"):
            open_checkpoint(f"{url}/model.safetensors")
        assert sum(headers["path"].endswith("model.safetensors") for headers in seen) < 5
        ended.set()
