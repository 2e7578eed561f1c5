"""Checkpoints in stores: everything that opens from disk opens from a store, with few requests and clear errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch

from dsconv import merge, open_checkpoint, verify
from dsconv.checkpoint.storage import stores
from dsconv.checkpoint.storage.local import open_for_reading
from dsconv.checkpoint.storage.roots import as_path
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    MalformedError,
    MissingShardError,
    RemoteError,
    UnsafeError,
    UnsupportedError,
)
from tests.cli.running import dsconv
from tests.servers.serving import FileServer, put, serve
from tests.trained import Trained, load_safetensors, same

ZERO3 = "llama_frozen-z3-bf16-w3"
ZERO2 = "gpt2-z2-bf16-w3"


@pytest.fixture(scope="module")
def folders(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one checkpoint of each kind on disk."""
    from huggingface_hub import save_torch_state_dict

    base = tmp_path_factory.mktemp("kinds")
    merge(trained(ZERO3).checkpoint, base / "safetensors", max_shard_size="4KB")
    state = load_safetensors(base / "safetensors")
    (base / "bin").mkdir()
    save_torch_state_dict(state, base / "bin", max_shard_size="4KB", safe_serialization=False)
    torch.save(state, base / "legacy.pt", _use_new_zipfile_serialization=False)
    return {"zero3": trained(ZERO3).checkpoint, "zero2": trained(ZERO2).checkpoint} | {
        p.name: p for p in base.iterdir()
    }


KINDS = ("zero3", "zero2", "safetensors", "bin", "legacy.pt")


@pytest.fixture(params=["memory", "s3", "http"])
def shelve(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """Return ``shelve(folder)``, which uploads a folder to a store and returns its URL."""
    if request.param == "http":
        servers: list[Any] = []

        def over_http(folder: Path) -> str:
            servers.append(serve(folder if folder.is_dir() else folder.parent))
            return str(servers[-1].__enter__().url + ("" if folder.is_dir() else f"/{folder.name}"))

        yield over_http
        for server in servers:
            server.__exit__(None, None, None)
        return
    fs = request.getfixturevalue(request.param)

    def into(folder: Path) -> str:
        if folder.is_dir():
            put(fs, folder, "shelf/my run")
            return f"{request.param}://shelf/my run"
        fs.pipe_file(f"shelf/{folder.name}", folder.read_bytes())
        return f"{request.param}://shelf/{folder.name}"

    yield into


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_opens_and_merges(
    kind: str, shelve: Callable[[Path], str], folders: dict[str, Path], tmp_path: Path
) -> None:
    local, url = open_checkpoint(folders[kind]), shelve(folders[kind])
    found = open_checkpoint(url)
    assert (found.format, found.step, found.world, found.ties, list(found)) == (
        local.format, local.step, local.world, local.ties, list(local)
    )  # fmt: skip
    assert str(found.path).startswith(url)
    name = next(name for name in found if len(found[name].shape) > 1)
    assert same(found[name].read((slice(1, 3),)), local[name].read()[1:3])
    assert verify(folders[kind], url).equal
    report = merge(url, tmp_path / "out", verify_output=True)
    here = merge(folders[kind], tmp_path / "here")
    assert (report.files, report.sidecars, report.ties, report.warnings) == (
        here.files,
        here.sidecars,
        here.ties,
        here.warnings,
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}


def test_the_command_line_takes_urls(s3: Any, s3_environment: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    put(s3, folders["zero3"], "shelf/run")
    shown = dsconv("inspect", "s3://shelf/run", "--json", **s3_environment)
    assert shown.code == 0, shown.err
    assert shown.json["format"] == "ZeRO-3"
    assert sum(file["bytes"] for file in shown.json["files"]) > 0
    merged = dsconv("zero-to-fp32", "s3://shelf/run", cwd=tmp_path, **s3_environment)  # OUT is local, not in the store
    assert merged.code == 0, merged.err
    assert verify("s3://shelf/run", tmp_path / "global_step2-fp32").equal
    with pytest.raises(CheckpointNotFoundError, match=r"^s3://shelf/nothing: no such file or folder$"):
        open_checkpoint("s3://shelf/nothing")
    no_server = {**s3_environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    unreachable = dsconv("inspect", "s3://shelf/run", **no_server)
    assert unreachable.code == 6
    assert unreachable.err.startswith("Error: s3://shelf/run: cannot be reached after ")


def test_a_url_of_a_file_may_bear_a_signature(folders: dict[str, Path], tmp_path: Path) -> None:
    with serve(folders["legacy.pt"].parent) as server:
        found = open_checkpoint(f"{server.url}/legacy.pt?signature=a%2Fb")
        assert all("?signature=a%2Fb" in path for _, path, _ in server.requests if "legacy" in path)
        assert verify(folders["legacy.pt"], found).equal


def test_odd_names_on_a_web_server_mean_themselves(folders: dict[str, Path], tmp_path: Path) -> None:
    """This also holds for a name in a file that would leave the folder if it were decoded again."""
    run = tmp_path / "public" / "my run #1 100%"
    shutil.copytree(folders["zero3"], run)
    (run / "global_step2").rename(run / "step 2%20#x")
    (run / "latest").write_text("step 2%20#x")
    with serve(tmp_path) as server:
        assert verify(folders["zero3"], f"{server.url}/public/{quote(run.name)}").equal
        with pytest.raises(CheckpointNotFoundError, match="public/my%20ru"):
            open_checkpoint(f"{server.url}/public/my ru")
        (run / "latest").write_text("%2e%2e/other")
        shutil.copytree(run / "step 2%20#x", tmp_path / "public" / "other")
        with pytest.raises(CheckpointNotFoundError, match="names '%2e%2e/other'"):
            open_checkpoint(f"{server.url}/public/{quote(run.name)}/")
        assert not any("/other" in path and "%252e" not in path for _, path, _ in server.requests)


def test_a_web_folder_without_listings_is_read_by_the_names_of_its_files(folders: dict[str, Path]) -> None:
    with serve(folders["safetensors"], "unlisted") as server:
        assert verify(folders["safetensors"], f"{server.url}/").equal
        with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
            open_checkpoint(f"{server.url}/elsewhere")


def test_opening_takes_few_requests_and_few_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    """The hundred headers of a zip, which lie between the tensors, are read together, and nothing else is read."""
    torch.save({f"layer.{i}": torch.full((200_000,), float(i)) for i in range(100)}, tmp_path / "big.pt")
    with serve(tmp_path) as server:
        found = open_checkpoint(f"{server.url}/big.pt")
        assert len(found) == 100
        assert server.bytes_sent < 400_000
        before = server.bytes_sent
        found["layer.7"].read((slice(5, 9),))
        assert server.bytes_sent - before < 200
    with serve(tmp_path) as server:
        (tmp_path / "small.pt").write_bytes(b"")
        torch.save({f"layer.{i}": torch.full((50,), float(i)) for i in range(300)}, tmp_path / "small.pt")
        open_checkpoint(f"{server.url}/small.pt")
        assert len(server.requests) < 15


MANNERS: dict[str, tuple[type[DsconvError], str, int]] = {
    "ignores-ranges": (RemoteError, "does not honour range requests", 6),
    "truncates": (RemoteError, "cannot be reached after 5 tries: (ClientPayloadError|IncompleteReadError)", 6),
    "shifts": (MalformedError, "truncated: asked for bytes", 3),
    "shrinks": (MalformedError, "truncated: asked for bytes", 3),
    "refuses": (RemoteError, "cannot be reached: ClientResponseError: 403", 6),
    "fails": (RemoteError, "cannot be reached after 5 tries: ClientResponseError: 503", 6),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_a_server_that_misbehaves_is_named(manner: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, words, code = MANNERS[manner]
    with serve(folders["safetensors"], manner) as server, pytest.raises(kind, match=words) as caught:
        open_checkpoint(server.url)
    assert str(caught.value).startswith(f"{server.url}/model-0000")
    assert caught.value.exit_code == code
    assert server.bytes_sent < sum(p.stat().st_size for p in folders["safetensors"].iterdir()) * 2


def test_a_server_that_turns_bad_during_a_merge_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    with serve(folders["zero3"]) as server:
        found = open_checkpoint(server.url)
        server.manner = "truncates"
        with pytest.raises(RemoteError, match=r"_states\.pt: cannot be reached after 5 tries"):
            merge(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transient_failures_are_retried(folders: dict[str, Path], tmp_path: Path) -> None:
    with serve(folders["zero3"], "flaky") as server:
        assert verify(folders["zero3"], server.url).equal
        assert len(server.failed) > 10


def test_a_missing_and_a_damaged_shard_are_named_with_their_url(
    memory: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    put(memory, folders["zero3"], "shelf/run")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path = f"/shelf/run/global_step2/{name}"
    data = memory.cat_file(path)
    memory.rm(path)
    with pytest.raises(MissingShardError, match=f"memory://shelf/run/global_step2.*{name}"):
        open_checkpoint("memory://shelf/run")
    memory.pipe_file(path, data[: len(data) // 2])
    with pytest.raises(MalformedError, match=f"memory://shelf/run/global_step2/{name}: truncated"):
        open_checkpoint("memory://shelf/run")
    pieces = [piece for entry in open_checkpoint(folders["zero3"]).values() for piece in entry.pieces]
    at = next(piece.extent.offset_bytes for piece in pieces if piece.extent.record.path.name == name)
    memory.pipe_file(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(MalformedError, match="CRC-32"):
        merge("memory://shelf/run", tmp_path / "out")
    memory.pipe_file("/shelf/run/latest", b"../x")
    with pytest.raises(MalformedError, match=r"memory://shelf/run/latest: '../x' is not the name of a tag"):
        open_checkpoint("memory://shelf/run")


def test_an_index_in_a_store_cannot_leave_its_folder(memory: Any, folders: dict[str, Path]) -> None:
    put(memory, folders["bin"], "shelf/bin")
    index = memory.cat_file("/shelf/bin/pytorch_model.bin.index.json")
    memory.pipe_file(
        "/shelf/bin/pytorch_model.bin.index.json", index.replace(b"pytorch_model-00001", b"https://x/model-00001")
    )
    with pytest.raises(UnsafeError, match="outside the folder"):
        open_checkpoint("memory://shelf/bin")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://x/y", r"nothing that is installed reads nonsense:// \(Protocol not known"),
        ("gs://x/y", r"pip install 'dsconv-toolkit\[gs\]'"),
    ],
)
def test_a_store_that_cannot_be_read(url: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(url)


def test_wrong_credentials_are_not_retried(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception): ...

    calls = []

    def fail() -> None:
        calls.append(1)
        raise NoCredentialsError("Unable to locate credentials")

    with pytest.raises(RemoteError, match=r"s3://x: cannot be reached: NoCredentialsError: .*check the credentials"):
        stores.Store(None).attempt("s3://x", fail)
    assert len(calls) == 1


def test_file_urls_are_local(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a b").symlink_to(folders["safetensors"])
    assert open_checkpoint(f"FILE://{tmp_path}/a%20b").path == tmp_path / "a b"
    assert str(as_path("MEMORY://shelf/Run")) == "memory://shelf/Run"
    assert open_checkpoint(f"file://{tmp_path}/a%20b").path == tmp_path / "a b"


def test_remote_paths_behave_like_pathlib(memory: Any) -> None:
    for name in ("a/x.pt", "a/y.tar.gz", "a/sub/z.pt", "b.json"):
        memory.pipe_file(f"/root/{name}", b"12345")
    root = as_path("memory://root/")
    assert type(root).__name__ == "RemotePath"
    assert (str(root), root.name, str(root.parent)) == ("memory://root", "root", "memory://root")
    file = root / "a" / "y.tar.gz"
    assert (file.name, file.stem, file.suffix, str(file.parent)) == ("y.tar.gz", "y.tar", ".gz", "memory://root/a")
    assert file == as_path("memory://root").joinpath("a", "y.tar.gz")
    assert hash(file) == hash(file.with_name("y.tar.gz"))
    assert (file.is_file(), file.is_dir(), file.exists(), file.stat().st_size) == (True, False, True, 5)
    assert not (root / "c").exists()
    assert [p.name for p in root.iterdir()] == ["a", "b.json"]
    assert [p.name for p in root.glob("a/*.pt")] == ["x.pt"]
    assert [str(p) for p in sorted(root.rglob("*.pt"))] == ["memory://root/a/sub/z.pt", "memory://root/a/x.pt"]
    assert (root / "b.json").read_text() == "12345"
    with pytest.raises(CheckpointNotFoundError, match="memory://root/c: no such file"):
        (root / "c").read_bytes()
    with pytest.raises(CheckpointNotFoundError, match="not a regular file"):
        open_for_reading(root / "a")


def test_reads_in_many_places_are_joined_and_exact(memory: Any) -> None:
    data = bytes(i * 7 % 251 for i in range(400_000))
    memory.pipe_file("/f.bin", data)
    spans = [(i * 1000 % 399_000, i % 900) for i in range(0, 3000, 7)] + [(399_999, 1), (5, 0), (0, 300_000)]
    with open_for_reading(as_path("memory://f.bin")) as file:
        assert file.read_many(spans) == [data[at : at + n] for at, n in spans]
        with pytest.raises(
            MalformedError, match=r"memory://f\.bin: truncated: expected 2 bytes at offset 399999, found 1"
        ):
            file.read(399_999, 2)
        with pytest.raises(MalformedError, match="truncated"):
            file.read_many([(0, 1), (400_000, 1)])


def test_runs_are_read_into_their_places(memory: Any, tmp_path: Path) -> None:
    data = bytes(i * 7 % 251 for i in range(400_000))
    memory.pipe_file("/f.bin", data)
    (tmp_path / "f.bin").write_bytes(data)
    for path in (as_path("memory://f.bin"), tmp_path / "f.bin"):
        with open_for_reading(path) as file:
            view = memoryview(bytearray(40))
            file.read_runs([399_990, 5, 200_000], 10, view, [30, 0, 15])
            assert bytes(view) == data[5:15] + bytes(5) + data[200_000:200_010] + bytes(5) + data[399_990:]
            with pytest.raises(MalformedError, match=r"f\.bin: truncated: expected 10 bytes at offset 399991, found 9"):
                file.read_runs([5, 399_991], 10, view, [0, 10])


def test_local_paths_need_no_fsspec(folders: dict[str, Path], tmp_path: Path) -> None:
    program = (
        f"import sys, dsconv\ndsconv.merge({str(folders['zero3'])!r}, {str(tmp_path / 'out')!r},"
        " verify_output=True)\nprint([name for name in ('fsspec', 'torch', 'huggingface_hub',"
        " 'dsconv.checkpoint.storage.remote') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_test_server_behaves_as_described(tmp_path: Path) -> None:
    """The server honours ranges as HTTP says, so that the tests above test dsconv and not the server."""
    import urllib.request

    (tmp_path / "a.bin").write_bytes(b"0123456789")
    with serve(tmp_path) as server:
        assert isinstance(server, FileServer)
        request = urllib.request.Request(f"{server.url}/a.bin", headers={"Range": "bytes=3-5"})
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"345", "bytes 3-5/10")


def test_a_missing_bucket_is_told_as_such(s3: Any, folders: dict[str, Path]) -> None:
    for url in ("s3://nothing/run", "s3://nothing"):
        with pytest.raises(RemoteError, match=f"{url}: there is no bucket 'nothing': check its name"):
            open_checkpoint(url)
    with pytest.raises(CheckpointNotFoundError, match="s3://shelf/run: no such file or folder"):
        open_checkpoint("s3://shelf/run")
