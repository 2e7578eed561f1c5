"""Folders of safetensors are read as the safetensors library reads them, and refused wherever it refuses them."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import dsconv
from dsconv.checkpoint import open_checkpoint
from dsconv.checkpoint.formats.huggingface import safetensors
from dsconv.checkpoint.formats.huggingface.safetensors import INDEX, SINGLE, read_file
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.storage.roots import PathRoot
from dsconv.checkpoint.torchfile.file import read_extent
from dsconv.errors import (
    CheckpointNotFoundError,
    DsconvError,
    MalformedError,
    MissingShardError,
    UnsafeError,
    UnsupportedError,
)
from tests.checkpoint.building import names_file_and_is_short

Header = dict[str, Any]
FUZZ = settings(
    derandomize=True, deadline=None, database=None, max_examples=700, suppress_health_check=list(HealthCheck)
)


def detect(path: Path) -> bool:
    return safetensors.detect(PathRoot(path), None)


def read(path: Path) -> Checkpoint:
    return safetensors.read(PathRoot(path), None)


def save(tensors: dict[str, Any], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    return path


def file_bytes(header: Header | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def item(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": offsets}


def the_library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            list(file.keys())
    except (SafetensorError, OSError):
        return False
    return True


def we_accept(path: Path) -> bool:
    try:
        read_file(path)
    except DsconvError as caught:
        error = caught
    else:
        return True
    assert names_file_and_is_short(error, path)
    return False


# Sound files


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_dtype_comes_back(name: str, tmp_path: Path) -> None:
    numbers = torch.arange(24, dtype=torch.uint8).repeat(8)
    value = numbers.view(getattr(torch, name)) if name != "bool" else numbers % 2 == 0
    (entry,) = read_file(save({"x": value}, tmp_path / "a.safetensors")).values()
    assert entry.dtype == BY_NAME[name]
    assert entry.shape == tuple(value.shape)
    (piece,) = entry.pieces
    assert read_extent(piece.extent) == bytes(value.view(torch.uint8).numpy())


def test_shapes_of_every_kind_come_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "cube": torch.arange(24.0).view(2, 3, 4),
        "größe": torch.ones(2, dtype=torch.float16),
    }
    checkpoint = read(save(tensors, tmp_path / SINGLE))
    assert set(checkpoint) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(checkpoint[name].read(), value)
    assert checkpoint["empty"].pieces == ()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save({"x": torch.ones(2)}, tmp_path / SINGLE)
    assert detect(tmp_path)
    checkpoint = read(tmp_path)
    assert list(checkpoint) == ["x"]
    assert checkpoint.warnings == ()
    assert checkpoint.sources == (tmp_path / SINGLE,)


def test_a_folder_with_an_adapter(tmp_path: Path) -> None:
    assert not detect(tmp_path)
    save({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert detect(tmp_path)
    assert list(read(tmp_path)) == ["lora"]


def index(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1.6e1}, "weight_map": weight_map, **more}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save({"c": torch.full((4,), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    index(
        tmp_path,
        {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    )
    return tmp_path


def test_a_folder_with_shards(sharded: Path) -> None:
    checkpoint = read(sharded)
    assert list(checkpoint) == ["a", "b", "c"]
    assert torch.equal(checkpoint["c"].read(), torch.full((4,), 2.0))
    assert [source.name for source in checkpoint.sources] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_one_file_beside_an_index_is_what_transformers_reads(sharded: Path) -> None:
    save({"x": torch.ones(2)}, sharded / SINGLE)
    checkpoint = read(sharded)
    assert list(checkpoint) == ["x"]
    assert "both model.safetensors and model.safetensors.index.json" in checkpoint.warnings[0]


# The index


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        MissingShardError, match=r"index\.json names 1 missing file, .* 'model-00002-of-00002\.safetensors'"
    ):
        read(sharded)


def test_a_tensor_that_its_file_lacks_is_named(sharded: Path) -> None:
    index(sharded, {"a": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        MissingShardError, match=r"index\.json places 'd' in model-00002-of-00002\.safetensors, which does not hold it"
    ):
        read(sharded)


def test_a_tensor_that_the_index_does_not_place_is_left_out_and_reported(sharded: Path) -> None:
    index(sharded, {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"})
    checkpoint = read(sharded)
    assert list(checkpoint) == ["a", "c"]
    assert checkpoint.warnings == (
        "model-00001-of-00002.safetensors holds 'b', which the index does not place there: left out",
    )


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "..\\b",
        "a\0b",
        "x/",
        7,
        None,
        ["a"],
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(file: Any, sharded: Path) -> None:
    index(sharded, {"a": "model-00001-of-00002.safetensors", "evil": file})
    with pytest.raises(UnsafeError) as caught:
        read(sharded)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(f"{sharded / INDEX}: weight_map puts 'evil' in ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' is given twice"),
        (b'{"weight_map": {"\\ud800": "x"}}', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'{"weight_map": {"a": "' + b"x" * 2000 + b'"}}', "a name of over 255 bytes"),
        (b'{"weight_map": {"a": "\\ud800' + b"x" * 253 + b'"}}', "a name of over 255 bytes"),
        (b'{"weight_map": ' + b"[" * 100_000, "not JSON"),
        (b'{"weight_map": {"a": ' + b'{"a": ' * 50_000, "not JSON"),
    ],
)
def test_a_broken_index_is_malformed(text: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(MalformedError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / INDEX}: ")
    assert says in str(caught.value)


def test_an_index_over_the_limit_is_not_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv.checkpoint.formats.huggingface.index.MAX_INDEX_BYTES", 10)
    with pytest.raises(MalformedError, match="the limit is 10"):
        read(sharded)


# The header

EIGHT = bytes(8)
DEEP = b"[" * 100_000
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "truncated"),
    "text": (b"this is a text file, not tensors\n" * 3, "truncated or not safetensors"),
    "no header": (file_bytes(b""), "does not start with {"),
    "a header longer than the file": (
        file_bytes({"a": item()}, EIGHT, length=1000),
        "a header of 1000 bytes in a file of",
    ),
    "a header of 2**64 - 1 bytes": (file_bytes({}, length=(1 << 64) - 1), "a header of 18446744073709551615 bytes"),
    "a header cut short": (file_bytes({"a": item()}, EIGHT, length=20), "not JSON"),
    "a header that starts with a space": (file_bytes(b' {"a": 1}'), "does not start with {"),
    "a list": (file_bytes(b"[]"), "does not start with {"),
    "not JSON": (file_bytes(b"{nonsense}"), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": {}}'), "not JSON"),
    "UTF-16": (file_bytes("{}".encode("utf-16-le")), "not JSON"),
    "surrogates in UTF-8": (
        file_bytes(b'{"\xed\xa0\x80": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "not JSON",
    ),
    "half a surrogate pair": (file_bytes({"\ud800": item()}, EIGHT), "not JSON"),
    "half a surrogate pair in the metadata": (
        file_bytes({"__metadata__": {"a": "\ud800"}}),
        "half of a surrogate pair",
    ),
    "deep": (file_bytes(b'{"a": ' + DEEP), "not JSON"),
    "deep objects": (file_bytes(b'{"a": ' * 50_000), "not JSON"),
    "deep and closed": (file_bytes(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"), "entry of 'a' is malformed"),
    "a name twice": (
        file_bytes(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            EIGHT,
        ),
        "'a' is given twice",
    ),
    "a field twice": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "'dtype' is given twice",
    ),
    "an entry that is a list": (file_bytes({"a": ["F32", [2], [0, 8]]}, EIGHT), "entry of 'a' is malformed"),
    "an entry that is null": (file_bytes({"a": None}), "entry of 'a' is malformed"),
    "an entry without a shape": (
        file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
        "entry of 'a' is malformed",
    ),
    "an unknown field": (file_bytes({"a": {**item(), "stride": [1]}}, EIGHT), "entry of 'a' is malformed"),
    "a dtype that is a list": (file_bytes({"a": item(dtype=["F32"])}, EIGHT), "entry of 'a' is malformed"),
    "a shape that is a number": (file_bytes({"a": item(shape=2)}, EIGHT), "entry of 'a' is malformed"),
    "a shape that is text": (file_bytes({"a": item(shape="")}, bytes(4)), "entry of 'a' is malformed"),
    "a shape below zero": (file_bytes({"a": item(shape=(-2,))}, EIGHT), "entry of 'a' is malformed"),
    "a shape of minus zero": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "the integer -0",
    ),
    "a shape of a float": (file_bytes({"a": item(shape=(2.0,))}, EIGHT), "entry of 'a' is malformed"),
    "a shape of a boolean": (file_bytes({"a": item("F64", (True,))}, EIGHT), "entry of 'a' is malformed"),
    "a shape of 2**63": (file_bytes({"a": item(shape=(1 << 63,))}, EIGHT), "entry of 'a' is malformed"),
    "a shape of 5000 digits": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', EIGHT),
        "the integer 999",
    ),
    "a shape of NaN": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT),
        "NaN is not a JSON value",
    ),
    "a shape that overflows": (
        file_bytes({"a": item(shape=(1 << 40, 1 << 40, 0), offsets=(0, 0))}),
        "more bytes than can be counted",
    ),
    "three offsets": (file_bytes({"a": item(offsets=(0, 4, 8))}, EIGHT), "entry of 'a' is malformed"),
    "offsets as an object": (file_bytes({"a": item(offsets={"0": 1, "8": 2})}, EIGHT), "entry of 'a' is malformed"),
    "offsets below zero": (file_bytes({"a": item(offsets=(-8, 0))}, EIGHT), "entry of 'a' is malformed"),
    "offsets backwards": (file_bytes({"a": item(offsets=(8, 0))}, EIGHT), "entry of 'a' is malformed"),
    "offsets that are booleans": (
        file_bytes({"a": item("U8", (1,), (False, True))}, b"x"),
        "entry of 'a' is malformed",
    ),
    "offsets that are floats": (file_bytes({"a": item(offsets=(0.0, 8.0))}, EIGHT), "entry of 'a' is malformed"),
    "a size that is wrong": (
        file_bytes({"a": item(shape=(3,))}, EIGHT),
        "'a' of float32 [3] should have 12 bytes, has 8",
    ),
    "a size that is wrong of a very long name": (
        file_bytes({"a" * 10_000: item(shape=(3,))}, EIGHT),
        "should have 12 bytes",
    ),
    "a hole at the start": (
        file_bytes({"a": item(offsets=(4, 12))}, bytes(12)),
        "'a' begins at byte 4 of the data, expected 0",
    ),
    "a hole between": (
        file_bytes({"a": item(), "b": item(offsets=(12, 20))}, bytes(20)),
        "'b' begins at byte 12 of the data, expected 8",
    ),
    "an overlap": (
        file_bytes({"a": item(), "b": item(offsets=(4, 12))}, bytes(12)),
        "'b' begins at byte 4 of the data, expected 8",
    ),
    "the same bytes twice": (file_bytes({"a": item(), "b": item()}, EIGHT), "begins at byte 0 of the data, expected 8"),
    "data cut short": (file_bytes({"a": item()}, bytes(7)), "truncated: the header describes"),
    "no data": (file_bytes({"a": item()}), "truncated: the header describes"),
    "bytes after the data": (file_bytes({"a": item()}, bytes(9)), "trailing bytes: the header describes"),
    "data and no tensors": (file_bytes({}, b"x"), "trailing bytes"),
    "metadata that are a list": (file_bytes({"__metadata__": []}), "__metadata__ should map text to text"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ should map text to text"),
    "metadata of lists": (file_bytes({"__metadata__": {"a": [[[[1]]]]}}), "__metadata__ should map text to text"),
}


@pytest.mark.parametrize("title", BAD)
def test_a_broken_header_is_malformed(title: str, tmp_path: Path) -> None:
    data, says = BAD[title]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(MalformedError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) < 500


# safetensors accepts these: the last of two entries counts, and an unknown field is skipped. Other readers may differ,
# so dsconv refuses them.
STRICTER_THAN_THE_LIBRARY = {"a name twice", "an unknown field", "an entry that is a list"}


@pytest.mark.parametrize("title", sorted(set(BAD) - STRICTER_THAN_THE_LIBRARY))
def test_the_library_refuses_these_too(title: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(BAD[title][0])
    assert not the_library_accepts(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("dtype", ["F2", "Q8", "f32", ""])
def test_a_dtype_that_is_not_read_is_named(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"x": item(dtype=dtype)}, EIGHT))
    with pytest.raises(UnsupportedError, match=rf"a\.safetensors: 'x' is of dtype '{dtype}'"):
        read(path)


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes(b"{}", length=100_000_001))
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(MalformedError, match="a header of 100000001 bytes; the limit is 100000000"):
        read(path)
    assert not the_library_accepts(path)


def test_headers_that_the_library_takes_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for data in (
        file_bytes({}),
        file_bytes(b"{}   \n"),
        file_bytes({"__metadata__": {"format": "pt"}}),
        file_bytes({"__metadata__": None, "a": item()}, EIGHT),
        file_bytes({"b": item(offsets=(8, 16)), "a": item()}, bytes(16)),
        file_bytes({"a": item(shape=(0, 1 << 40), offsets=(0, 0)), "b": item()}, EIGHT),
        file_bytes({"a": item(shape=(), offsets=(0, 4))}, bytes(4)),
        file_bytes({"": item()}, EIGHT),
    ):
        path.write_bytes(data)
        assert the_library_accepts(path)
        assert we_accept(path)


def test_a_shape_without_elements_that_torch_cannot_make_is_malformed(tmp_path: Path) -> None:
    """safetensors multiplies in order and accepts it, since 0 × anything is 0. torch leaves the zeros out of the
    product.
    """
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"a": item(shape=(0, 1 << 40, 1 << 40), offsets=(0, 0))}))
    assert the_library_accepts(path)
    with pytest.raises(MalformedError, match=r"a\.safetensors: 'a' has the shape .* which torch cannot make"):
        open_checkpoint(path)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no\.safetensors: no such file"):
        read_file(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="not a regular file"):
        read_file(tmp_path)


# Mutations: dsconv refuses whatever the library refuses

SOUND: Header = {
    "__metadata__": {"format": "pt"},
    "a": item("F32", (2, 3), (0, 24)),
    "b": item("BF16", (4,), (24, 32)),
    "empty": item("I64", (0,), (32, 32)),
    "c": item("BOOL", (1,), (32, 33)),
}
ODD: list[Any] = [
    0,
    1,
    -1,
    2,
    24,
    33,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    1.0,
    0.5,
    True,
    None,
    "",
    "F32",
    "F4",
    "U8",
    [],
    [0],
    {},
]
ODD += [[0, 24], [24, 32], [0, 33], [33, 33], {"a": "b"}, float("nan"), "\ud800"]


def _mutant(seed: int) -> bytes:
    """Return a sound file with a few values of its header replaced, removed, doubled or retyped."""
    chance = random.Random(seed)
    header: Header = json.loads(json.dumps(SOUND))
    data = bytes(33)
    for _ in range(chance.randrange(1, 4)):
        name = chance.choice(list(header))
        entry = header[name]
        change = chance.randrange(8)
        if change == 0:
            header[name] = chance.choice(ODD)
        elif change == 1:
            del header[name]
        elif change == 2:
            header[chance.choice(["x", "__metadata__", "", "a", "\ud800"])] = entry
        elif change == 3 and isinstance(entry, dict):
            entry[chance.choice([*entry, "x"])] = chance.choice(ODD)
        elif change == 4 and isinstance(entry, dict) and entry:
            del entry[chance.choice(list(entry))]
        elif change >= 5 and isinstance(entry, dict):
            field = entry.get(chance.choice(["shape", "data_offsets"]))
            if isinstance(field, list) and field:
                field[chance.randrange(len(field))] = chance.choice(ODD)
        if not header:
            break
    raw = json.dumps(header).encode()
    return file_bytes(raw, chance.choice([data, data, data, data[:32], data + b"x", b""]))


def test_what_the_library_refuses_in_a_mutated_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mutant.safetensors"
    seen = {True: 0, False: 0}

    @FUZZ
    @given(st.integers(0, 1 << 32))
    def check(seed: int) -> None:
        path.write_bytes(_mutant(seed))
        ours, theirs = we_accept(path), the_library_accepts(path)
        assert theirs or not ours
        seen[theirs] += 1

    check()
    assert seen[False] > 100


def test_what_the_library_refuses_in_mutated_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mutant.safetensors"
    sound = file_bytes(SOUND, bytes(33))
    head = len(sound) - 33
    worst = 0.0
    pieces = st.one_of(
        st.binary(min_size=0, max_size=3),
        st.sampled_from(
            [
                b"-0",
                b"1e1",
                b"1.0",
                b"NaN",
                b'"',
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b"null",
                b"\\ud800",
                b"\\u0061",
                b"\xed\xa0\x80",
            ]
        ),
    )

    @FUZZ
    @given(
        st.lists(st.tuples(st.integers(0, head + 4), st.integers(0, 3), pieces), min_size=1, max_size=3), st.booleans()
    )
    def check(changes: list[tuple[int, int, bytes]], repair: bool) -> None:
        nonlocal worst
        data = sound
        for at, cut, put in changes:
            data = data[:at] + put + data[at + cut :]
        if repair and len(data) > 41:  # so that the header is wrong, and not its length
            data = struct.pack("<Q", len(data) - 41) + data[8:]
        path.write_bytes(data)
        before = time.process_time()
        ours = we_accept(path)
        worst = max(worst, time.process_time() - before)
        assert the_library_accepts(path) or not ours

    check()
    assert worst < 1.0


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F4", [2, 6], 6), ("F6_E2M3", [3, 4], 9), ("F6_E3M2", [8], 6), ("F8_E8M0", [3], 3), ("F4", [0, 3, 2], 0)],
)
def test_a_copy_need_not_understand_a_dtype(dtype: str, shape: list[int], nbytes: int, tmp_path: Path) -> None:
    """Elements smaller than a byte keep their header and bytes, and --dtype does not change them."""
    data = bytes(range(nbytes))
    header = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    (tmp_path / SINGLE).write_bytes(file_bytes(header, data))
    dsconv.merge(tmp_path, tmp_path / "out", dtype="bf16", verify_output=True, fsync=False)
    written = (tmp_path / "out" / SINGLE).read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert json.loads(written[8 : 8 + length])["x"] == header["x"]
    assert written[8 + length :] == data


def test_rows_that_do_not_end_with_a_byte_are_refused(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    (tmp_path / SINGLE).write_bytes(file_bytes(header, bytes(3)))
    with pytest.raises(UnsupportedError, match=r"'x' of F4 \[2, 3\] has rows that do not end with a byte"):
        dsconv.open_checkpoint(tmp_path)


def test_an_optimizer_among_the_weights_is_left_out_and_reported(tmp_path: Path) -> None:
    weights = {"a.w": torch.ones(2, 3), "b.w": torch.ones(3)}
    states = {
        f"optimizer.state.{name}.{slot}": torch.zeros_like(tensor)
        for name, tensor in weights.items()
        for slot in ("exp_avg", "exp_avg_sq")
    }
    save_file(weights | states, tmp_path / "both.safetensors")
    found = open_checkpoint(tmp_path / "both.safetensors")
    assert set(found) == set(weights)
    assert found.info["left_out"] == {"optimizer": 4}
    assert "took 'optimizer' for an optimizer's" in found.warnings[0]
    state = {f"state.{i}.{slot}": torch.ones(2, 3) for i in (0, 1) for slot in ("exp_avg", "exp_avg_sq", "step")}
    save_file(state, tmp_path / "optimizer.safetensors")
    with pytest.raises(UnsupportedError, match="no tensor of a model"):
        open_checkpoint(tmp_path / "optimizer.safetensors")
