"""Web servers: files are read by range requests. Answers are checked, since a server may ignore the range or end early.

One request for the first byte tells whether a file exists, how long it is (``Content-Range``) and whether the server
honours ranges. A server's own listing of a folder is used where it gives one; a URL that ends in ``/`` is a folder in
any case.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

from dsconv.checkpoint.storage.stores import Stat, Store
from dsconv.errors import MalformedError, RemoteError
from dsconv.text import quote

ABSENT = (404, 410)
ANSWER_SECONDS = 300  # for a whole answer, of at most 8 MB
SILENCE_SECONDS = 60  # in which not a byte comes
MAX_PAGE_BYTES = 16 << 20  # a server's listing of a folder
# A link of a page: no part of the pattern crosses a bracket, so that the search takes linear time.
LINK = re.compile(r"""<a\s[^<>]*?(?<![\w-])href\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s"'<>]+))""", re.IGNORECASE)
CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")


@dataclass(frozen=True)
class Probe:
    """What one request found out: ``nbytes`` None is a length that the server does not tell."""

    is_dir: bool
    nbytes: int | None
    ranges: bool
    etag: str = ""


def links_of(page: str) -> list[str]:
    """Return the ``href`` of each link of a page, in linear time."""
    found = ("".join(filter(None, match.groups())) for match in LINK.finditer(page))
    return [html.unescape(link) for link in found if link]


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
        return None if probe is None else Stat(probe.is_dir, probe.nbytes or 0, etag=probe.etag)

    def stat_again(self, url: str) -> Stat | None:
        self.probes.pop(url, None)
        return self.stat(url)

    def list(self, url: str) -> dict[str, Stat]:
        from fsspec.asyn import sync

        try:
            page = self.attempt(url, lambda: sync(self.fs.loop, self._read_all, url + "/", MAX_PAGE_BYTES))
        except (RemoteError, MalformedError):  # many servers refuse to list a folder whose files they give
            return {}
        links = links_of(page.decode("utf-8", "replace"))
        inside = (urljoin(url + "/", link).removeprefix(url + "/") for link in links)
        names = (name for name in inside if name and "?" not in name and "#" not in name and "://" not in name)
        return {unquote(name.rstrip("/")): Stat(name.endswith("/")) for name in names if "/" not in name.rstrip("/")}

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

    def read_all(self, url: str, limit_bytes: int) -> bytes:
        from fsspec.asyn import sync

        data: bytes = self.attempt(url, lambda: sync(self.fs.loop, self._read_all, url, limit_bytes))
        return data

    async def _get(self, url: str, wanted: str = "") -> Any:
        from aiohttp import ClientTimeout
        from yarl import URL

        session = await self.fs.set_session()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={wanted}"} if wanted else {})}
        timeout = ClientTimeout(total=ANSWER_SECONDS, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        return session.get(URL(url, encoded=True), headers=headers, **{"timeout": timeout, **self.fs.kwargs})

    async def _read_all(self, url: str, limit_bytes: int) -> bytes:
        """Return a whole answer, which may have no end: no more than the limit is read."""
        async with await self._get(url) as answer:
            answer.raise_for_status()
            data = bytearray()
            async for part in answer.content.iter_chunked(64 << 10):
                data += part
                if len(data) > limit_bytes:
                    raise MalformedError(f"{url}: has more than {limit_bytes} bytes, the most that such a file has")
            return bytes(data)

    async def _probe(self, url: str) -> Probe | None:
        async with await self._get(url, "0-0") as answer:
            if answer.status in ABSENT:
                return None
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 416:  # no first byte: the file is empty
                return Probe(False, int(found[3]) if found else 0, True)
            answer.raise_for_status()
            is_dir = answer.url.path.endswith("/")  # after redirects; true for a bare host too
            if answer.status == 206 and found:
                return Probe(is_dir, int(found[3]), True, _etag(answer))
            length = answer.headers.get("Content-Length", "")
            return Probe(is_dir, int(length) if length.isdecimal() and len(length) < 20 else None, False, _etag(answer))

    async def _read_range(self, url: str, start: int, stop: int) -> bytes:
        async with await self._get(url, f"{start}-{stop - 1}") as answer:
            answer.raise_for_status()
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != 206 or not found:
                raise RemoteError(
                    f"{url}: the server does not honour range requests: asked for bytes {start} to {stop}, it answers"
                    f" {answer.status}"
                )
            probe = self.probes.get(url)
            if probe is not None and (probe.nbytes, probe.etag) != (int(found[3]), _etag(answer)):
                raise MalformedError(f"{url}: it was written to while it was read: run again when nothing writes to it")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise RemoteError(
                    f"{url}: the server compresses the file although it was asked not to"
                    f" ({quote(answer.headers['Content-Encoding'])}), so the bytes cannot be placed; download the file"
                )
            if found[1] is None or (int(found[1]), int(found[2])) != (start, stop - 1):
                raise MalformedError(
                    f"{url}: truncated: asked for bytes {start} to {stop}, the server gives"
                    f" {quote(answer.headers['Content-Range'])}"
                )
            return bytes(await answer.content.readexactly(stop - start))


def _etag(answer: Any) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
