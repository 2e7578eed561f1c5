"""Servers that redirect, change files, compress, or never end: no token is sent to another host, and no byte is
misplaced.
"""

from __future__ import annotations

import gzip
import re
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from attacks.servers import ODD_NAMES, hub, refusing, siblings
from dsconv import merge, open_checkpoint
from dsconv.checkpoint.storage import http, stores
from dsconv.checkpoint.storage.hub import HubRoot, open_repo
from dsconv.checkpoint.storage.roots import as_path
from dsconv.errors import DsconvError, MalformedError, RemoteError
from tests.servers.hostile import Answer, give, give_range, serving
from tests.trained import same

FULL = torch.arange(4096, dtype=torch.float32)
FILE = save({"w": FULL})


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

        def redirecting(handler: BaseHTTPRequestHandler) -> None:
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

        with serving(redirecting) as (url, seen_here):
            use_hub(url, monkeypatch, tmp_path / "cache")
            assert same(open_checkpoint("org/model")["w"].read(), FULL)
    assert any(headers.get("authorization") == "Bearer hf_secret" for headers in seen_here)
    assert seen_there
    assert not any("hf_secret" in value for headers in seen_there for value in headers.values())


@pytest.mark.parametrize(
    ("page", "links"),
    [
        ('<A class="x" HREF = "a%20b.bin">x</a> <a href=\'c.bin\'> <a href=d.bin>', ["a%20b.bin", "c.bin", "d.bin"]),
        ('<a href="a&amp;b.bin">', ["a&b.bin"]),
        ('<abbr href="no"> <a name="no"> <a data-x="1" href=""> <a href="x', []),
        ("<a " * 500_000, []),
        ("<a" + " href" * 500_000, []),
        ('<a href="' + "x" * 2_000_000, []),
        ("<!--" * 500_000 + '<a href="x">', ["x"]),
    ],
    ids=range(7),
)
def test_the_links_of_a_page_are_found_in_linear_time(page: str, links: list[str]) -> None:
    began = time.process_time()
    assert http.links_of(page) == links
    assert time.process_time() - began < 1


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for name, value in (("HF_ENDPOINT", url), ("HF_TOKEN", "hf_secret"), ("HF_HUB_OFFLINE", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_a_commit_and_names_of_no_hub_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commit becomes a folder's name in the cache, and the names become paths in it."""
    for sha in ("../../outside", "main", "0" * 39, "", "0" * 40 + "\n"):
        with serving(hub({"sha": sha, **siblings("model.safetensors")})) as (url, _):
            use_hub(url, monkeypatch, tmp_path / "cache")
            with pytest.raises(RemoteError, match="does not answer as the Hub does: it calls a commit '"):
                open_checkpoint("org/model")
    with serving(hub(siblings(*ODD_NAMES))) as (url, _):
        use_hub(url, monkeypatch, tmp_path / "cache")
        root = open_repo("org/model", None)
        assert isinstance(root, HubRoot)
        assert sorted(root.sizes) == ["\x1b]0;owned\x07" + ODD_NAMES[1][len("\x1b]0;owned\x07") :], "model.safetensors"]
        assert list(open_checkpoint("org/model")) == ["a"]


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_what_a_server_says_is_shown_as_text(status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    with serving(refusing(status)) as (url, _):
        use_hub(url, monkeypatch, tmp_path / "cache")
        for source in (f"{url}/model.safetensors", "org/model", "hf://org/model"):
            with pytest.raises(DsconvError) as caught:
                open_checkpoint(source)
            said = str(caught.value)
            assert said.isprintable()
            assert len(said) < 1000
            assert not any(word in said for word in ("Signature", "user:secret", "hf_secret"))


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
