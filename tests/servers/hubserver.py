"""A small server that implements the parts of the Hub's API that reading needs, over folders on the disk.

huggingface_hub 2.4 calls these endpoints: ``/api/models/ID[/revision/REV]``, ``…/tree/REV``, ``…/paths-info/REV`` and
``/ID/resolve/REV/FILE``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote

from tests.servers.serving import Handler

LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".model")  # from the .gitattributes that the Hub gives each repository


@dataclass
class Hub:
    """``repos`` is {id: {revision: folder}}. A ``private`` repository needs the token; a ``broken`` one always answers
    500.
    """

    repos: dict[str, dict[str, Path]]
    url: str = ""
    private: str = ""
    gated: str = ""
    token: str = "hf_secret"  # noqa: S105
    broken: bool = False
    bytes_sent: int = 0
    requests: list[str] = field(default_factory=list)

    def is_private(self, repo: str) -> bool:
        return repo == self.private

    def revisions(self, repo: str) -> dict[str, Path]:
        """Return the folder of each branch and commit of a repository."""
        return {**self.repos[repo], **{commit(folder): folder for folder in self.repos[repo].values()}}

    def downloads(self) -> list[str]:
        """Return the files that were fetched."""
        return [
            request.rpartition("/")[2]
            for request in self.requests
            if request.startswith("GET") and "/resolve/" in request
        ]


def commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode(), usedforsecurity=False).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": commit(path)}
    data = path.read_bytes()
    found = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
    if path.suffix in LARGE:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HubHandler(Handler):
    owner: Any

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        hub: Hub = self.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {target}")
        if hub.broken:
            self.answer(500)
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", target) or re.fullmatch(
            r"/([^/]+/[^/]+)/(resolve)/(.+)", target
        )
        if not match or match[1] not in hub.repos:
            self.fail(404, "RepoNotFound")
            return
        repo, action, rest = match.groups()
        if hub.is_private(repo) and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.fail(401, "RepoNotFound")
            return
        known = hub.revisions(repo)
        revision = next(
            (name for name in known if (rest or "main") == name or (rest or "").startswith(name + "/")), None
        )
        if revision is None:
            self.fail(404, "RevisionNotFound")
            return
        folder = known[revision]
        inside = (rest or "main")[len(revision) + 1 :]
        if action in (None, "revision"):
            files = [
                {"rfilename": e["path"], "size": e["size"]} for e in self._tree(folder, True) if e["type"] == "file"
            ]
            self.json(
                {
                    "id": repo,
                    "sha": commit(folder),
                    "siblings": files,
                    "private": hub.is_private(repo),
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                }
            )
        elif action == "tree":
            query = parse_qs(self.path.partition("?")[2])
            if not (folder / inside).is_dir():
                self.fail(404, "EntryNotFound")
                return
            self.json(self._tree(folder, query.get("recursive", ["false"])[0].lower() == "true", folder / inside))
        elif action == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.json([entry(folder, folder / path) for path in paths if (folder / path).exists()])
        else:
            self._file(hub, repo, folder, inside)

    do_HEAD = do_GET
    do_POST = do_GET

    def _tree(self, folder: Path, recursive: bool, start: Path | None = None) -> list[dict[str, Any]]:
        start = start or folder
        return [entry(folder, path) for path in sorted(start.rglob("*") if recursive else start.iterdir())]

    def _file(self, hub: Hub, repo: str, folder: Path, name: str) -> None:
        path = folder / name
        if hub.gated == repo and name.endswith((".bin", ".safetensors")):
            self.fail(403, "GatedRepo")
            return
        if not path.is_file():
            self.fail(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{commit(path)}"', "X_Repo_Commit": commit(folder), "Accept_Ranges": "bytes"}
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            self.answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)
            return
        self.answer(200, data, **headers)


@contextlib.contextmanager
def serve_hub(repos: dict[str, dict[str, Path]], **options: Any) -> Iterator[Hub]:
    with run_hub(Hub(repos, **options), HubHandler) as hub:
        yield hub


AHub = TypeVar("AHub", bound=Hub)


@contextlib.contextmanager
def run_hub(hub: AHub, handler: type[HubHandler]) -> Iterator[AHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"owner": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
