"""Output to stores: the same files as on disk, and nothing that looks like a model unless it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv import merge, open_checkpoint, to_dcp, to_universal, verify
from dsconv.checkpoint import Checkpoint, TensorEntry
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.regions import box
from dsconv.checkpoint.map.tensors import Piece
from dsconv.checkpoint.storage import stores
from dsconv.checkpoint.storage.stores import Store, Writer
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.copy import BLOCK_BYTES
from dsconv.compat import convert_zero_checkpoint_to_fp32_state_dict
from dsconv.convert import dcp_layout, upload
from dsconv.errors import (
    DsconvError,
    MalformedError,
    MismatchError,
    MissingShardError,
    OutputError,
    RemoteError,
)
from tests.cli.running import dsconv
from tests.servers.serving import put
from tests.trained import Trained, load_safetensors, same

ZERO3 = "llama_frozen-z3-bf16-w3"
STORES = ["memory", "s3"]
URL = "shelf/my model"


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Any:
    """Return a file system of fsspec. The tests write to ``url(fs)``."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _nothing_waits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are small, and are sent as large ones are."""
    monkeypatch.setattr(upload, "MAX_HELD_BYTES", 0)


def url(fs: Any) -> str:
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return f"{protocol}://{URL}"


def files_in(fs: Any) -> dict[str, bytes]:
    """Return the content of every file in the output folder by name, hidden files included."""
    fs.invalidate_cache()
    return {path.rpartition("my model/")[2]: fs.cat_file(path) for path in fs.find(URL)} if fs.exists(URL) else {}


def uploads_in_progress(fs: Any) -> int:
    return len(fs.list_multipart_uploads("shelf")) if "s3" in fs.protocol else 0


def files_on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "4KB"}, {"dtype": "bf16", "max_shard_size": "4KB", "sha256": True, "workers": 3}]
)
def test_a_store_gets_what_the_disk_gets(
    store: Any, options: dict[str, Any], trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source = trained(ZERO3).checkpoint
    here = merge(source, tmp_path / "out", **options)
    there = merge(source, url(store), verify_output=True, **options)
    assert there.verified
    assert there.output == url(store)
    assert (there.files, there.sidecars, there.warnings) == (here.files, here.sidecars, here.warnings)
    assert files_in(store) == files_on_disk(tmp_path / "out")
    assert uploads_in_progress(store) == 0
    if options.get("sha256"):
        manifest = json.loads(files_in(store)["dsconv.manifest.json"])
        assert len(manifest["files"]) > 2
        for name, said in manifest["files"].items():
            assert said["sha256"] == hashlib.sha256(files_in(store)[name]).hexdigest()


def test_from_store_to_store(s3: Any, s3_environment: Any, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    put(s3, trained(ZERO3).checkpoint, "shelf/run")
    ran = dsconv(
        "zero-to-fp32", "s3://shelf/run", f"s3://{URL}", "--verify", "--max-shard-size", "6KB", **s3_environment
    )
    assert ran.code == 0, ran.err
    assert verify(trained(ZERO3).checkpoint, f"s3://{URL}").equal
    again = dsconv("zero-to-fp32", "s3://shelf/run", f"s3://{URL}", **s3_environment)
    assert (again.code, "already holds a model" in again.err) == (3, True)


def test_views_large_tensors_and_overflow(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors take several blocks and several parts of an upload, are strided, share bytes, are empty, or are
    scalars.
    """
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    base = torch.arange(900_000, dtype=torch.float32)
    state = {
        "long": torch.arange(BLOCK_BYTES // 4 + 300_001, dtype=torch.int32),
        "columns": base.view(300, 3000)[:, 1:2500],
        "rows": base[100:800_000],
        "huge": torch.tensor([1e30, 2.0, float("inf")]),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    torch.save(state, tmp_path / "a.pt")
    report = merge(tmp_path / "a.pt", url(store), dtype="fp16", verify_output=True)
    assert report.overflowed == merge(tmp_path / "a.pt", tmp_path / "out", dtype="fp16").overflowed
    assert files_in(store) == files_on_disk(tmp_path / "out")
    merge(tmp_path / "a.pt", url(store), force=True)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "model.safetensors").write_bytes(files_in(store)["model.safetensors"])
    found = load_safetensors(tmp_path / "back")
    assert set(found) == set(state)
    assert all(same(found[name], tensor) for name, tensor in state.items())


def test_shards_of_boxes(store: Any, tmp_path: Path) -> None:
    """The pieces fill boxes, as in tensor-parallel formats, and the checksums of their records are checked too."""
    full = torch.arange(9 * 14, dtype=torch.float64).view(9, 14)
    boxes = [box((0, 0), (4, 14)), box((4, 0), (5, 6)), box((4, 6), (5, 8))]
    parts = [full[:4], full[4:, :6], full[4:, 6:]]
    torch.save([part.contiguous() for part in parts], tmp_path / "shards.pt")

    def opened(path: Path) -> Checkpoint:
        file = TorchFile(path)
        pieces = tuple(
            Piece(file.pieces(ref)[0].extent, 0, ref.numel, region=region)
            for ref, region in zip(file.root, boxes, strict=True)
        )
        entry = TensorEntry("w", BY_NAME["float64"], (9, 14), partial(tuple, pieces))
        return Checkpoint(path, "boxes", {"w": entry}, folder=tmp_path, sources=(path,))

    merge(opened(tmp_path / "shards.pt"), url(store), verify_output=True)
    assert same(open_checkpoint(url(store))["w"].read(), full)
    data = bytearray((tmp_path / "shards.pt").read_bytes())
    extent = opened(tmp_path / "shards.pt")["w"].pieces[1].extent
    data[extent.offset_bytes + 3] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    with pytest.raises(MalformedError, match=r"damaged\.pt: record .* fails its CRC-32"):
        merge(opened(tmp_path / "damaged.pt"), url(store), force=True)
    assert same(open_checkpoint(url(store))["w"].read(), full)  # the older model is unchanged


def test_force_replaces_all_of_an_older_model(store: Any, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source = trained(ZERO3).checkpoint
    merge(source, url(store), max_shard_size="4KB")
    store.pipe_file(f"{URL}/notes.txt", b"mine")
    before = files_in(store)
    with pytest.raises(OutputError, match=r"already holds a model \(model\.safetensors\.index\.json\); give --force"):
        merge(source, url(store))
    assert files_in(store) == before
    merge(source, url(store), dtype="bf16", force=True)
    merge(source, tmp_path / "out", dtype="bf16")
    assert files_in(store) == {**files_on_disk(tmp_path / "out"), "notes.txt": b"mine"}


def test_a_dry_run_writes_nothing(store: Any, trained: Callable[[str], Trained]) -> None:
    assert merge(trained(ZERO3).checkpoint, url(store), dry_run=True).plan
    assert files_in(store) == {}


class Interrupt:
    """A progress callback that raises, or ends the process, halfway through."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == "copy" and done * 2 > total:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), MemoryError()], ids=repr)
def test_an_interrupted_upload_leaves_nothing(
    store: Any, error: BaseException, trained: Callable[[str], Trained]
) -> None:
    with pytest.raises(type(error)):
        merge(trained(ZERO3).checkpoint, url(store), max_shard_size="4KB", progress=Interrupt(error))
    assert files_in(store) == {}
    assert uploads_in_progress(store) == 0


def test_an_interrupted_upload_leaves_the_older_model(store: Any, trained: Callable[[str], Trained]) -> None:
    merge(trained(ZERO3).checkpoint, url(store))
    before = files_in(store)
    with pytest.raises(KeyboardInterrupt):
        merge(trained(ZERO3).checkpoint, url(store), dtype="bf16", force=True, progress=Interrupt(KeyboardInterrupt()))
    assert files_in(store) == before


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_leaves_no_model(how: str, s3: Any, s3_environment: Any, tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.full((1_500_000,), float(i)) for i in range(8)}, tmp_path / "a.pt")
    program = "\n".join([
        "import os, signal, sys, dsconv.cli, dsconv.cli.console as console",
        "def kill(phase, done, total):",
        f"    if done * 2 > total: os.kill(os.getpid(), signal.{how})",
        "import contextlib",
        "console.progress = lambda quiet: contextlib.nullcontext(kill)",
        f"dsconv.cli.main(['merge', {str(tmp_path / 'a.pt')!r}, 's3://{URL}', '--max-shard-size', '20MB'])",
    ])  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **s3_environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == (-signal.SIGKILL if how == "SIGKILL" else 128 + signal.SIGTERM), ran.stderr
    assert files_in(s3) == {}
    if how == "SIGTERM":
        assert uploads_in_progress(s3) == 0
    merge(tmp_path / "a.pt", f"s3://{URL}", verify_output=True)  # without --force


class Stopped(Exception): ...


def test_debris_of_a_run_that_was_putting_files_in_place_is_recognised(
    store: Any, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is stopped between two shards leaves no index, so no model. The next run removes everything without
    --force.
    """
    commit, count = Writer.commit, [0]

    def second_fails(writer: Writer) -> None:
        count[0] += 1
        if count[0] == 2:
            raise Stopped
        commit(writer)

    source = trained(ZERO3).checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", second_fails)
        with pytest.raises(Stopped):
            merge(source, url(store), max_shard_size="4KB")
    assert [name for name in files_in(store) if name.endswith(".safetensors")] == ["model-00001-of-00005.safetensors"]
    with pytest.raises(MissingShardError) as caught:
        open_checkpoint(url(store))
    assert "a run was cut off while it put its output into place" in str(caught.value)
    assert f"repeat dsconv merge {source}" in str(caught.value)
    assert f" '{url(store)}', with the options that it had" in str(caught.value)
    merge(source, url(store))
    merge(source, tmp_path / "out")
    assert files_in(store) == files_on_disk(tmp_path / "out")


def test_the_index_comes_after_all_that_it_names(
    store: Any, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = Store.write, []

    def noting(self: Store, place: str, data: bytes) -> None:
        if place.endswith(".index.json"):
            seen.append(
                set(json.loads(data)["weight_map"].values()) | {"config.json", "dsconv.manifest.json"}
                <= set(files_in(store))
            )
        write(self, place, data)

    monkeypatch.setattr(Store, "write", noting)
    merge(trained(ZERO3).checkpoint, url(store), max_shard_size="4KB")
    assert seen == [True]


def test_a_mismatch_removes_the_output(
    store: Any, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Writer.write

    def flip(writer: Writer, data: Any) -> None:
        changed = bytearray(data)
        changed[-1] ^= 1
        write(writer, data if bytes(data[8:9]) == b"{" else memoryview(changed))

    monkeypatch.setattr(Writer, "write", flip)
    with pytest.raises(MismatchError, match="what was written differs"):
        merge(trained(ZERO3).checkpoint, url(store), verify_output=True)
    assert not [name for name in files_in(store) if "safetensors" in name or "manifest" in name]


REFUSED: dict[str, tuple[str, dict[str, Any], type[DsconvError], str, int]] = {
    "fsync": ("memory://x", {"fsync": True}, OutputError, "memory://x: --fsync and --no-fsync are for local disks", 3),
    "no fsync": ("memory://x", {"fsync": False}, OutputError, "Leave them out", 3),
    "a web server": ("http://127.0.0.1:9/x/", {}, OutputError, "http:// is read only here", 3),
    "the Hub": ("hf://org/model", {}, OutputError, "hf:// is read only here", 3),
    "no such bucket": (
        "s3://nothing/model",
        {},
        RemoteError,
        "s3://nothing/model: there is no bucket 'nothing': check its name",
        6,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_store_cannot_do_is_refused(
    name: str, s3: Any, memory: Any, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options, kind, words, code = REFUSED[name]
    if name == "the Hub":
        monkeypatch.setattr("dsconv.convert.writing.older_output", lambda destination, target, force: [])
    with pytest.raises(kind, match=words) as caught:
        merge(trained(ZERO3).checkpoint, target, **options)
    assert caught.value.exit_code == code
    assert memory.find("/") == []


def test_a_file_in_the_place_of_the_folder(memory: Any, trained: Callable[[str], Trained]) -> None:
    memory.pipe_file("/x", b"mine")
    with pytest.raises(OutputError, match="memory://x is a file"):
        merge(trained(ZERO3).checkpoint, "memory://x", force=True)


def test_the_functions_of_zero_to_fp32(memory: Any, trained: Callable[[str], Trained]) -> None:
    source = trained(ZERO3).checkpoint
    convert_zero_checkpoint_to_fp32_state_dict(source, f"memory://{URL}", safe_serialization=True)
    convert_zero_checkpoint_to_fp32_state_dict(source, f"memory://{URL}", safe_serialization=True)
    assert "model.safetensors" in files_in(memory)
    with pytest.raises(OutputError, match=r"\.bin files are written to a disk only; give safe_serialization=True"):
        convert_zero_checkpoint_to_fp32_state_dict(source, f"memory://{URL}")


def test_memory_stays_below_the_size_of_the_model(s3: Any, s3_environment: Any, tmp_path: Path) -> None:
    """Models of 48, 192 and 480 MB took 147 to 214 MB, most of which were parts of the upload in flight."""
    torch.save({f"w{i}": torch.zeros(4_000_000) for i in range(20)}, tmp_path / "a.pt")
    program = (
        "import dsconv\n"
        f"dsconv.merge({str(tmp_path / 'a.pt')!r}, 's3://shelf/model')\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    environment = {**os.environ, **s3_environment}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 250_000
    assert s3.info("shelf/model/model.safetensors")["size"] > 320_000_000


CONVERSIONS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "dcp": (to_dcp, "llama_tied-z3-bf16-w2", {"prefix": "model."}),
    "dcp in several files": (to_dcp, ZERO3, {"max_shard_size": "9KB"}),
    "dcp of a cast": (to_dcp, "llama_tied-z2-fp32-w1", {"dtype": "bf16"}),
    "universal": (to_universal, ZERO3, {}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_store_gets_the_same_conversion_as_the_disk(
    name: str, store: Any, trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, case, options = CONVERSIONS[name]
    monkeypatch.setattr(dcp_layout, "CHUNK_BYTES", 2048)  # tensors of several chunks, some of them in two files
    monkeypatch.setattr(upload, "MAX_HELD_BYTES", 20_000)  # some files wait in memory, others are sent at once
    source = trained(case).checkpoint
    out = tmp_path / "shelf" / "my model"
    here = convert(source, out, **options)
    there = convert(source, url(store), **options)
    assert (there.output, there.files, there.nbytes) == (url(store), here.files, here.nbytes)
    found = files_in(store)
    assert found == {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert uploads_in_progress(store) == 0
    if convert is to_universal:
        assert store.cat_file("shelf/latest_universal") == (out.parent / "latest_universal").read_bytes()
    with pytest.raises(OutputError, match=r"already holds .*; give --force to replace it"):
        convert(source, url(store), **options)
    store.pipe_file(f"{URL}/zero/stale/fp32.pt" if convert is to_universal else f"{URL}/__7_0.distcp", b"older")
    if convert is to_universal and "memory" in store.protocol:
        assert convert(source, url(store), force=True, verify_output=True, **options).verified
    else:
        convert(source, url(store), force=True, **options)
    assert files_in(store) == found
    assert verify(source, url(store), allow_cast=True).equal


def test_a_conversion_that_is_cut_off_in_a_store_is_no_checkpoint(
    store: Any, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained(ZERO3).checkpoint
    for convert in (to_dcp, to_universal):
        with pytest.raises(KeyboardInterrupt):
            convert(source, url(store), progress=Interrupt(KeyboardInterrupt()))
        assert files_in(store) == {}
        assert uploads_in_progress(store) == 0
    order: list[str] = []
    write = Store.write

    def note(self: Store, place: str, data: bytes) -> None:
        order.append(place.rpartition("/")[2])
        assert place.endswith("moving.json") or "__0_0.distcp" in files_in(store)
        write(self, place, data)

    monkeypatch.setattr(Store, "write", note)
    to_dcp(source, url(store))
    assert order == ["moving.json", ".metadata"]
