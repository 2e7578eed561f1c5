"""Web servers: files are read by range requests. Answers are checked, since a server may ignore the range or end early.

One request for the first byte tells whether a file exists, how long it is (``Content-Range``) and whether the server
honours ranges. A server's own listing of a folder is used where it gives one; a URL that ends in ``/`` is a folder in
any case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from dsconv.checkpoint.storage.stores import Stat, Store
from dsconv.errors import MalformedError, RemoteError

ABSENT = (404, 410)
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass(frozen=True)
class Probe:
    """What one request found out: ``nbytes`` None is a length that the server does not tell."""

    is_dir: bool
    nbytes: int | None
    ranges: bool


class HttpStore(Store):
    """A web server. ``fs`` is fsspec's HTTPFileSystem; its session makes the requests."""

    lists_all = False
    encoded = True
    tries = 5

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self.probes: dict[str, Probe | None] = {}

    def probe(self, url: str) -> Probe | None:
        from fsspec.asyn import sync

        if url not in self.probes:
            self.probes[url] = self.attempt(url, lambda: sync(self.fs.loop, self._probe, url))
        return self.probes[url]

    def stat(self, url: str) -> Stat | None:
        probe = self.probe(url)
        return None if probe is None else Stat(probe.is_dir, probe.nbytes or 0)

    def list(self, url: str) -> dict[str, Stat]:
        def names() -> dict[str, Stat]:
            try:
                found = self.fs.ls(url + "/", detail=False)
            except FileNotFoundError:
                return {}
            below = [item for item in found if item.startswith(url + "/") and item != url + "/"]
            return {
                unquote(item.rstrip("/").rpartition("/")[2]): Stat(item.endswith("/"))
                for item in below
                if "?" not in item
            }

        try:
            return self.attempt(url, names)
        except RemoteError:  # many servers refuse to list a folder whose files they give
            return {}

    def require_ranges(self, url: str) -> None:
        probe = self.probe(url)
        if probe is not None and (not probe.ranges or probe.nbytes is None):
            raise RemoteError(
                f"{url}: the server does not honour range requests (it answers with the whole file); "
                "download the files and give their folder"
            )

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        from fsspec.asyn import sync

        data: bytes = self.attempt(url, lambda: sync(self.fs.loop, self._read_range, url, start, stop))
        return data

    async def _get(self, url: str, start: int, stop: int) -> Any:
        from yarl import URL

        session = await self.fs.set_session()
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        return session.get(URL(url, encoded=True), headers=headers, **self.fs.kwargs)

    async def _probe(self, url: str) -> Probe | None:
        async with await self._get(url, 0, 1) as answer:
            if answer.status in ABSENT:
                return None
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 416:  # no first byte: the file is empty
                return Probe(False, int(found[3]) if found else 0, True)
            answer.raise_for_status()
            is_dir = answer.url.path.endswith("/")  # after redirects; true for a bare host too
            if answer.status == 206 and found:
                return Probe(is_dir, int(found[3]), True)
            length = answer.headers.get("Content-Length", "")
            return Probe(is_dir, int(length) if length.isdigit() else None, False)

    async def _read_range(self, url: str, start: int, stop: int) -> bytes:
        async with await self._get(url, start, stop) as answer:
            answer.raise_for_status()
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != 206 or not found:
                raise RemoteError(
                    f"{url}: the server does not honour range requests: asked for bytes {start} to {stop}, it answers"
                    f" {answer.status}"
                )
            if found[1] is None or (int(found[1]), int(found[2])) != (start, stop - 1):
                raise MalformedError(
                    f"{url}: truncated: asked for bytes {start} to {stop}, the server gives"
                    f" {answer.headers['Content-Range']!r}"
                )
            return bytes(await answer.content.readexactly(stop - start))
