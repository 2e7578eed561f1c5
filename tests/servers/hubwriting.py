"""Add the parts of the Hub's API that writing needs to the server: repositories are made, pushed to and read back.

huggingface_hub 2.4 calls these endpoints: ``/api/repos/create``, ``/api/validate-yaml``, and for a model ``branch``,
``preupload``, ``commit`` (NDJSON), ``discussions`` (pull requests), ``xet-write-token``, ``xet-read-token`` and Git
LFS's ``info/lfs/objects/batch`` with its uploads. Like the Hub, it takes LFS objects only if their sha256 is their
name, refuses a commit whose parent is not the head (412) or whose LFS objects never arrived (400), and does not ask
again for objects that it has.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.cli.running import Ran, dsconv
from tests.servers.hubserver import LARGE, Hub, HubHandler, commit, git_hash, run_hub

ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)


@dataclass
class Fault:
    """What befalls the next ``times`` requests that match: a status, ``drop`` (the connection is closed before the
    request is
    heeded), ``half`` (after half of its body), ``deaf`` (it is heeded, and the answer lost), a function (the same,
    and it is called in between) or an event (nothing happens until it is set, and then the connection is closed).
    """

    request: str  # a pattern of "METHOD /path"
    what: int | str | Callable[[], object] | threading.Event
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class WritableHub(Hub):
    """``base`` holds each commit as a folder, ``objects`` the LFS objects by sha256, and ``received`` (sha256, bytes)
    of each upload.
    """

    base: Path = Path()
    privates: set[str] = field(default_factory=set)
    others: str = "others"  # an organization that the token cannot write to
    objects: dict[str, bytes] = field(default_factory=dict)
    received: list[tuple[str, int]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    pulls: int = 0
    faults: list[Fault] = field(default_factory=list)
    xet: Path | None = None  # the folder of hf_xet's local store, through which all large files then go
    # sha256 → (xet's hash, the file) of what the Hub's store holds.
    xet_files: dict[str, tuple[str, Path]] = field(default_factory=dict)

    def is_private(self, repo: str) -> bool:
        return repo in self.privates

    def make(self, repo: str, files: dict[str, bytes] | None = None, private: bool = False) -> None:
        """Make a repository with one commit."""
        if private:
            self.privates.add(repo)
        self.repos[repo] = {}
        self.put(repo, "main", None, {".gitattributes": ATTRIBUTES.encode(), **(files or {})}, [], "initial commit")

    def put(
        self, repo: str, revision: str, parent: Path | None, files: dict[str, bytes], deleted: list[str], message: str
    ) -> Path:
        folder = self.base / repo / str(len(self.commits))
        if parent is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(parent, folder)
        for name in deleted:
            (folder / name).unlink()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.repos[repo][revision] = folder
        self.commits.append(
            {"repo": repo, "revision": revision, "message": message, "files": sorted(files), "deleted": deleted}
        )
        return folder

    def revisions(self, repo: str) -> dict[str, Path]:
        return {**self.repos[repo], **{commit(folder): folder for folder in (self.base / repo).iterdir()}}

    def head(self, repo: str, revision: str = "main") -> Path:
        return self.repos[repo][revision]


class WritingHandler(HubHandler):
    def do_GET(self) -> None:
        if self._struck(b""):
            return
        target = unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-(?:write|read)-token/.+", target):
            self._xet_token(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions/(\d+)", target):
            self.json(
                {
                    "title": "t",
                    "num": int(match[2]),
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "draft",
                    "events": [],
                    "repo": {"name": match[1], "type": "model"},
                    "isPullRequest": True,
                    "changes": {"base": "refs/heads/main"},
                    "filesWithConflicts": [],
                }
            )
        else:
            super().do_GET()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        target = unquote(self.path.partition("?")[0])
        if target.endswith("/paths-info/" + target.rpartition("/")[2]):
            self.do_GET()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: WritableHub = self.owner
        hub.requests.append(f"{self.command} {target}")
        if self._struck(body):
            return
        if target != "/api/validate-yaml" and not target.startswith("/lfs/") and not self._may_write(target, body):
            return
        self._post(hub, target, body)

    def _post(self, hub: WritableHub, target: str, body: bytes) -> None:
        if target == "/api/repos/create":
            self._create(hub, json.loads(body))
            return
        if target == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
            return
        if match := re.fullmatch(r"/lfs/verify/(\w+)", target):
            self.answer(
                200 if match[1] in hub.objects and len(hub.objects[match[1]]) == json.loads(body)["size"] else 404
            )
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit|discussions)(?:/(.+))?", target)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)()", target)
        if not match or match[1] not in hub.repos:
            self.fail(404, "RepoNotFound")
            return
        repo, action, revision = match.groups()
        if action == "branch":
            known = revision in hub.repos[repo]
            hub.repos[repo].setdefault(revision, hub.head(repo))
            self.answer(409 if known else 200, b"{}")
        elif action == "discussions":
            hub.pulls += 1
            hub.repos[repo][f"refs/pr/{hub.pulls}"] = hub.head(repo)
            self.json({"num": hub.pulls})
        elif action == "batch":
            self._batch(hub, json.loads(body))
        elif revision not in hub.repos[repo]:
            self.fail(404, "RevisionNotFound")
        elif action == "preupload":
            self._preupload(hub.head(repo, revision), json.loads(body))
        else:
            self._commit(hub, repo, revision, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        hub: WritableHub = self.owner
        hub.requests.append(f"PUT {self.path}")
        nbytes = int(self.headers["Content-Length"])
        if self._struck(None):
            return
        data = self.rfile.read(nbytes)
        oid = self.path.rpartition("/")[2]
        hub.received.append((oid, len(data)))
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer(400, b"the object is not its sha256")
            return
        hub.objects[oid] = data
        self.answer(200)

    def _struck(self, body: bytes | None) -> bool:
        """Return whether a fault hit this request. ``body`` is None if it has not been read yet."""
        hub: WritableHub = self.owner
        request = f"{self.command} {unquote(self.path)}"
        fault = next((fault for fault in hub.faults if fault.times and re.search(fault.request, request)), None)
        if fault is None:
            return False
        fault.times -= 1
        if isinstance(fault.what, int):
            if body is None:
                self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(
                fault.what,
                json.dumps({"error": f"injected {fault.what}"}).encode(),
                Content_Type="application/json",
                **fault.headers,
            )
            return True
        if isinstance(fault.what, threading.Event):
            fault.what.wait(60)
        elif fault.what == "half" and body is None:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
        if (fault.what == "deaf" or callable(fault.what)) and body is not None:
            answer = self.answer
            self.answer = lambda *args, **kwargs: None  # type: ignore[method-assign]
            self._post(hub, unquote(self.path.partition("?")[0]), body)
            self.answer = answer  # type: ignore[method-assign]
            if callable(fault.what):
                fault.what()
        self.close_connection = True
        self.connection.close()
        return True

    def _may_write(self, target: str, body: bytes) -> bool:
        hub: WritableHub = self.owner
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            message = "Invalid credentials in Authorization header"
            self.answer(401, json.dumps({"error": message}).encode(), X_Error_Message=message)
            return False
        owner = (
            json.loads(body)["organization"]
            if target == "/api/repos/create"
            else target.removeprefix("/api/models/").lstrip("/").split("/")[0]
        )
        if owner == hub.others and not target.endswith("/discussions"):
            message = f"You don't have the rights to create or change a model under the namespace {owner!r}"
            self.answer(403, json.dumps({"error": message}).encode(), X_Error_Message=message)
            return False
        return True

    def _create(self, hub: WritableHub, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = json.dumps({"url": f"{hub.url}/{repo}"}).encode()
        if repo in hub.repos:
            self.answer(409, url)
            return
        hub.make(repo, private=wanted.get("visibility") == "private")
        self.answer(200, url)

    def _validate(self, content: str) -> None:
        import yaml

        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            sound = match is None or isinstance(yaml.safe_load(match[1]), dict)
        except yaml.YAMLError:
            sound = False
        found: dict[str, Any] = {"errors": [] if sound else [{"message": "the metadata is not YAML"}], "warnings": []}
        self.answer(200 if sound else 400, json.dumps(found).encode(), Content_Type="application/json")

    def _preupload(self, head: Path, wanted: dict[str, Any]) -> None:
        found = []
        for file in wanted["files"]:
            path = head / file["path"]
            large = path.suffix in LARGE or file["size"] > 10 << 20
            data = path.read_bytes() if path.is_file() else None
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_hash(data)
            assert len(base64.b64decode(file["sample"])) == min(512, file["size"])
            found.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.json({"files": found})

    def _batch(self, hub: WritableHub, wanted: dict[str, Any]) -> None:
        found = []
        for item in wanted["objects"]:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify/{item['oid']}"},
            }
            found.append({**item} if item["oid"] in hub.objects else {**item, "actions": actions})
        self.json({"transfer": "basic", "objects": found})

    def _commit(self, hub: WritableHub, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        head, header = hub.head(repo, revision), lines[0]["value"]
        if header.get("parentCommit", commit(head)) != commit(head):
            message = "A commit has happened since. Please refresh and try again."
            self.answer(412, json.dumps({"error": message}).encode(), X_Error_Message=message)
            return
        files, deleted = {}, []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
            elif value["oid"] in hub.xet_files:  # the download shows whether its chunks arrived
                files[value["path"]] = hub.xet_files[value["oid"]][1].read_bytes()
            elif len(hub.objects.get(value["oid"], b"")) != value["size"]:
                self.answer(
                    400,
                    b'{"error": "an LFS object that the commit names is not there"}',
                    Content_Type="application/json",
                )
                return
            else:
                files[value["path"]] = hub.objects[value["oid"]]
        folder = hub.put(repo, revision, head, files, deleted, header["summary"])
        url = f"{hub.url}/{repo}/commit/{commit(folder)}"
        self.json({"success": True, "commitOid": commit(folder), "commitUrl": url, "hookOutput": ""})

    def _xet_token(self, repo: str) -> None:
        hub: WritableHub = self.owner
        url = f"local://{hub.xet}"
        headers = {"X_Xet_Cas_Url": url, "X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": "4102444800"}
        self.answer(
            200,
            json.dumps({"casUrl": url, "accessToken": "t", "exp": 4102444800}).encode(),
            Content_Type="application/json",
            **headers,
        )

    def _file(self, hub: Hub, repo: str, folder: Path, name: str) -> None:
        assert isinstance(hub, WritableHub)
        path = folder / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if hub.xet and path.is_file() else ""
        if digest not in hub.xet_files:
            super()._file(hub, repo, folder, name)
        elif self.command == "HEAD":
            route = f"{hub.url}/api/models/{repo}/xet-read-token/{commit(folder)}"
            self.answer(200, ETag=f'"{digest}"', X_Linked_Size=str(path.stat().st_size), X_Repo_Commit=commit(folder),
                        X_Xet_Hash=hub.xet_files[digest][0], X_Xet_Refresh_Route=route)  # fmt: skip
        else:
            self.answer(500, b"large files come from the store")


@contextlib.contextmanager
def serve_writable_hub(base: Path, **options: Any) -> Iterator[WritableHub]:
    with run_hub(WritableHub({}, base=base, **options), WritingHandler) as hub:
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def download(hub: WritableHub, repo: str, target: Path, revision: str | None = None) -> dict[str, bytes]:
    """Return what ``snapshot_download`` gives, without its own files and those that the Hub adds."""
    import huggingface_hub

    huggingface_hub.snapshot_download(repo, local_dir=target, revision=revision, endpoint=hub.url, token=hub.token)
    return {
        name: data
        for name, data in contents(target).items()
        if name != ".gitattributes" and not name.startswith(".cache")
    }


class Shell:
    """Run dsconv against ``hub`` as a user does. huggingface_hub decides how the bytes travel, and really waits."""

    def __init__(self, hub: WritableHub, home: Path) -> None:
        self.home = home
        self.environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
        }

    def __call__(self, *arguments: str | Path, **environment: str) -> Ran:
        variables: dict[str, Any] = {**self.environment, **environment}
        return dsconv(*arguments, cwd=self.home, **variables)
