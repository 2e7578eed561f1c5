"""Conversions into S3 (moto's) through a proxy that answers 503, drops connections and loses requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dsconv
from dsconv.errors import DsconvError
from tests.fixtures import gloo
from tests.trained import Trained

CASE = "llama_frozen-z3-bf16-w3"
JOBS: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "merge": (dsconv.merge, {"max_shard_size": "4KB"}, ["--max-shard-size", "4KB"]),
    "to-dcp": (dsconv.to_dcp, {"max_shard_size": "9KB"}, ["--max-shard-size", "9KB"]),
    "to-universal": (dsconv.to_universal, {}, []),
}
MARKERS = {"merge": "model.safetensors.index.json", "to-dcp": ".metadata", "to-universal": "latest_universal"}
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
TRIES = 40


@dataclass
class FailingS3:
    """A proxy before S3. ``share`` of the requests fail: with 503, or by a connection that is dropped."""

    target: tuple[str, int]
    chosen: random.Random
    share: float = 0.0
    faults: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    fs: Any = None  # fsspec's file system on S3 itself


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FailingS3

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.owner.chosen.random() < self.owner.share:
            self.owner.faults += 1
            if self.owner.chosen.random() < 0.3:
                self.close_connection = True
                self.connection.close()
                return
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        upstream = http.client.HTTPConnection(*self.owner.target)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        self._answer(answer.status, answer.getheaders(), data)
        upstream.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection") and (
                name.lower() != "content-length" or self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def failing_s3(seed: int = 0) -> Iterator[FailingS3]:
    """A bucket ``hour`` on moto's server, behind the proxy that the environment's variables name."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    found = FailingS3(server.get_host_and_port(), random.Random(seed))
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": found}))
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    keys = {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "3",
    }  # fmt: skip
    found.environment = {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}"}
    before = {name: os.environ.get(name) for name in found.environment}
    os.environ.update(found.environment)
    host, port = found.target
    s3fs.S3FileSystem.clear_instance_cache()
    found.fs = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
    found.fs.mkdir("hour")
    try:
        yield found
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        server.stop()


@dataclass
class Outcome:
    """What became of one conversion."""

    faults: int = 0
    kills: int = 0
    failures: int = 0
    problems: list[str] = field(default_factory=list)


def convert(name: str, home: Path, s3: FailingS3, kills: int = 0, share: float = 0.2) -> Outcome:
    """Convert a checkpoint into S3 until it is there, through faults and ``kills``, and compare it with the disk's."""
    function, options, arguments = JOBS[name]
    source = Trained(gloo.ensure("zero", [CASE])[CASE]).checkpoint
    function(source, home / name / "out", **options)
    expected = {p.relative_to(home / name / "out").as_posix(): p.read_bytes() for p in (home / name / "out").rglob("*")
                if p.is_file()}  # fmt: skip
    target, outcome, before = f"s3://hour/{name}/out", Outcome(), s3.faults
    command = [sys.executable, "-m", "dsconv", name, str(source), target, *arguments]
    s3.share = share
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
        time.sleep(s3.chosen.uniform(1.0, 6.0))
        process.send_signal(signal.SIGKILL)
        outcome.kills += process.wait() == -signal.SIGKILL
        outcome.problems += _half(name, files(s3, name), expected)
        if MARKERS[name] in files(s3, name):
            s3.fs.rm(f"hour/{name}", recursive=True)
    for _ in range(TRIES):
        try:
            function(source, target, **options)
            break
        except DsconvError:
            outcome.failures += 1
            outcome.problems += _half(name, files(s3, name), expected)
    s3.share = 0.0
    outcome.faults = s3.faults - before
    if files(s3, name) != expected:
        outcome.problems.append(f"{name}: S3 has other files than the disk: {sorted(files(s3, name))}")
    if not dsconv.verify(source, target, allow_cast=True).equal:
        outcome.problems.append(f"{name}: what S3 has does not verify")
    return outcome


def files(s3: FailingS3, name: str) -> dict[str, bytes]:
    """What lies in the output's folder."""
    s3.fs.invalidate_cache()
    folder = f"hour/{name}/out"
    return {path.removeprefix(f"{folder}/"): s3.fs.cat_file(path) for path in s3.fs.find(folder)}


def _half(name: str, found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Tell where an output counts, by its marker, and is not whole."""
    whole = all(found.get(file) == data for file, data in expected.items())
    return [f"{name}: counts and is not whole: {sorted(found)}"] if MARKERS[name] in found and not whole else []
