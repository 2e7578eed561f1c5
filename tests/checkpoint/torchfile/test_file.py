"""Read real torch.save files: their values, and where the bytes of each tensor lie."""

from __future__ import annotations

import collections
import io
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.pickles.values import Opaque, TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extent
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, UnsupportedError
from tests.checkpoint.building import (
    Rec,
    call,
    glob,
    lst,
    number,
    pt_records,
    storage,
    tensor,
    text,
    tup,
    whole,
    write_pt,
    zip_bytes,
)
from tests.fixtures.gloo import DATA


def saved(folder: Path, value: Any, **options: Any) -> TorchFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized and other deprecated kinds of tensor
        torch.save(value, folder / "file.pt", **options)
    return TorchFile(folder / "file.pt")


def read(file: TorchFile, ref: Any) -> Any:
    """Read a tensor through the pieces that the copy loop would use."""
    assert isinstance(ref, TensorRef)
    dtype = getattr(torch, ref.dtype.name)
    pieces = file.pieces(ref)
    if not pieces:
        return torch.empty(ref.shape, dtype=dtype)
    (piece,) = pieces
    assert (piece.start, piece.numel) == (0, ref.numel)
    flat = torch.frombuffer(bytearray(read_extent(piece.extent)), dtype=dtype)
    return flat.reshape(ref.shape) if piece.strides is None else flat.as_strided(piece.shape, piece.strides)


def same(file: TorchFile, ref: Any, tensor: Any) -> bool:
    found = read(file, ref)
    assert found.shape == tensor.shape
    assert found.dtype == tensor.dtype
    return bool(
        torch.equal(found.reshape(-1).contiguous().view(torch.uint8), tensor.reshape(-1).contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_dtype(name: str, protocol: int, tmp_path: Path) -> None:
    numbers = torch.arange(24, dtype=torch.uint8).repeat(8)
    value = numbers.view(getattr(torch, name)) if name != "bool" else numbers % 2 == 0
    file = saved(tmp_path, {"x": value, "dtype": getattr(torch, name)}, pickle_protocol=protocol)
    assert file.root["dtype"] == BY_NAME[name]
    assert same(file, file.root["x"], value)


@pytest.mark.parametrize("name", ["complex128", "complex32"])
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.zeros(2, dtype=getattr(torch, name))
    with pytest.raises(UnsupportedError, match=r"file\.pt: .*[cC]omplex.*does not read"):
        saved(tmp_path, {"x": value})


BASE = torch.arange(60, dtype=torch.float32)
VIEWS = {
    "a slice": BASE[7:31],
    "rows": BASE.view(6, 10)[2:4],
    "columns": BASE.view(6, 10)[:, 3:5],
    "transposed": BASE.view(6, 10).t(),
    "every third": BASE[::3],
    "permuted": BASE.view(3, 4, 5).permute(2, 0, 1),
    "expanded": BASE[:3].view(3, 1).expand(3, 4),
    "overlapping": BASE.as_strided((5, 4), (2, 1), 3),
    "one element": BASE[59:],
    "no dimension": BASE[5],
    "empty": BASE[60:],
    "empty in the middle": torch.empty(3, 0, 2),
    "empty and strided": BASE.view(6, 10)[:, 5:5],
    "size-1 dimensions": BASE.view(6, 10)[:, 3:4][2:3],
    "channels last": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("title", VIEWS)
def test_views_of_every_kind(title: str, tmp_path: Path) -> None:
    file = saved(tmp_path, [BASE, VIEWS[title]])
    assert same(file, file.root[1], VIEWS[title])
    assert same(file, file.root[0], BASE)


def test_a_small_storage_repeated_into_a_huge_tensor_is_refused(tmp_path: Path) -> None:
    """A file of 2 kB would become 32 GB in memory and on disk."""
    file = saved(tmp_path, {"bomb": torch.zeros(1).expand(1 << 33), "fine": torch.zeros(2, 1).expand(2, 1 << 23)})
    with pytest.raises(
        UnsupportedError, match=r"file\.pt: .* repeats a storage of 1 elements to make 34359738368 bytes; the limit is"
    ):
        file.pieces(file.root["bomb"])
    assert file.pieces(file.root["fine"])[0].numel == 1 << 24


def test_tensors_that_share_a_storage_share_its_record(tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    file = saved(tmp_path, {"embed": weight, "head": weight, "row": weight[1], "other": torch.ones(4, 4)})
    embed, head, row, other = (file.root[key] for key in ("embed", "head", "row", "other"))
    assert embed == head
    assert row.storage == embed.storage != other.storage
    assert file.pieces(row)[0].extent.offset_bytes == file.pieces(embed)[0].extent.offset_bytes + 16


class Special(torch.Tensor):  # type: ignore[misc]
    pass


def test_parameters_buffers_and_subclasses_are_their_tensors(tmp_path: Path) -> None:
    data = torch.arange(6.0).view(2, 3)
    marked = data.clone()
    marked.note = "kept"
    value = {
        "parameter": torch.nn.Parameter(data),
        "frozen": torch.nn.Parameter(data, requires_grad=False),
        "buffer": torch.nn.Buffer(data),
        "subclass": data.as_subclass(Special),
        "with attributes": marked,
        "needs grad": data.clone().requires_grad_(),
    }
    file = saved(tmp_path, value)
    for key in value:
        assert same(file, file.root[key], data), key


def test_the_objects_around_tensors(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    value = {
        "module": layer.state_dict(),
        "shapes": [collections.OrderedDict(weight=layer.weight.shape)],
        "device": torch.device("cpu"),
        "rates": collections.defaultdict(list, a=[1]),
        "path": Path("runs/1"),
        "step": 7,
    }
    file = saved(tmp_path, value)
    assert list(file.root["module"]) == ["weight", "bias"]
    assert same(file, file.root["module"]["weight"], layer.weight.detach())
    assert file.root["shapes"] == [{"weight": (2, 3)}]
    assert file.root["rates"] == {"a": [1]}
    assert isinstance(file.root["device"], Opaque)
    assert isinstance(file.root["path"], Opaque)
    assert file.root["step"] == 7


def test_an_optimizer_and_a_scheduler(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    file = saved(tmp_path, optimizer.state_dict())
    assert file.value(file.root["state"][0]["step"]) == struct.pack("<f", 1.0)
    assert same(file, file.root["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_whole_module_is_refused_or_inert(tmp_path: Path) -> None:
    file = saved(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert isinstance(file.root, Opaque)
    assert file.root.cls == "torch.nn.modules.container.Sequential"


def test_a_name_of_any_letters_and_a_root_of_any_name(tmp_path: Path) -> None:
    torch.save({"größe.重み": torch.ones(2)}, tmp_path / "modell größe.pt")
    file = TorchFile(tmp_path / "modell größe.pt")
    assert same(file, file.root["größe.重み"], torch.ones(2))


def test_a_stream_has_another_root(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    (tmp_path / "a.pt").write_bytes(stream.getvalue())
    assert TorchFile(tmp_path / "a.pt").archive.root == "archive"


@pytest.mark.parametrize("mark", ["conj", "neg"])
def test_lazily_conjugated_and_negated_tensors_are_refused_not_misread(mark: str, tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j]).conj() if mark == "conj" else torch.tensor([1 + 2j]).conj().imag
    assert value.is_conj() if mark == "conj" else value.is_neg()
    with pytest.raises(UnsupportedError, match=rf"file\.pt: .*'{mark}': True.*resolve_{mark}"):
        saved(tmp_path, {"x": value})


@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_kinds_of_tensor_that_need_code_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = (
            torch.ones(2, 2).to_sparse()
            if kind == "sparse"
            else torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        )
    with pytest.raises(UnsupportedError, match=r"file\.pt: .*(_rebuild_sparse_tensor|QInt8Storage)"):
        saved(tmp_path, value)


def test_a_torchscript_program_is_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with pytest.raises(UnsupportedError, match=r"program\.pt: a TorchScript program"):
        TorchFile(tmp_path / "program.pt")


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nothing\.pt: no such file"):
        TorchFile(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointNotFoundError, match="not a regular file"):
        TorchFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointNotFoundError, match="pipe: not a regular file"):
        TorchFile(tmp_path / "pipe")
    with pytest.raises(DsconvError, match=r"cannot be read|no such file"):
        TorchFile(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointNotFoundError):
        TorchFile(tmp_path / "a\0b")


def _read_root(path: Path) -> None:
    file = TorchFile(path)
    file.pieces(file.root)


def _refused(folder: Path, data: bytes, error: type[DsconvError], says: str) -> None:
    path = folder / "bad.pt"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        _read_root(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert caught.value.exit_code == 3


FLOATS = bytes(16)
REPLACED = [r for r in pt_records(whole(tensor()), _0=FLOATS) if r.name != "archive/byteorder"]
BAD = {
    "an empty file": (b"", MalformedError, "the file is empty"),
    "a text file": (b"not a checkpoint\n" * 9, MalformedError, "not a torch.save file"),
    "a zip of nothing": (zip_bytes([]), MalformedError, "no record 'data.pkl'"),
    "a zip without data.pkl": (zip_bytes([Rec("a/x", b"")]), MalformedError, "no record 'data.pkl'"),
    "big-endian": (zip_bytes([*REPLACED, Rec("archive/byteorder", b"big")]), UnsupportedError, "big-endian"),
    "of unknown byte order": (
        zip_bytes([*REPLACED, Rec("archive/byteorder", b"middle")]),
        MalformedError,
        "the byte order is b'middle'",
    ),
    "damaged in its pickle": (
        zip_bytes([Rec("archive/data.pkl", whole(tensor()), crc32=1), *REPLACED[1:]]),
        MalformedError,
        "data.pkl fails its CRC-32",
    ),
    "damaged in its byte order": (
        zip_bytes([*REPLACED, Rec("archive/byteorder", b"little", crc32=1)]),
        MalformedError,
        "byteorder fails its CRC-32",
    ),
    "without the storage's record": (
        zip_bytes(pt_records(whole(tensor()))),
        MalformedError,
        "storage '0' is named and has no record",
    ),
    "with a storage too short": (
        zip_bytes(pt_records(whole(tensor()), _0=bytes(15))),
        MalformedError,
        "should have 16 bytes, its record has 15",
    ),
    "with a storage too long": (
        zip_bytes(pt_records(whole(tensor()), _0=bytes(20))),
        MalformedError,
        "should have 16 bytes, its record has 20",
    ),
}


@pytest.mark.parametrize("title", BAD)
def test_a_bad_file_says_what_is_wrong(title: str, tmp_path: Path) -> None:
    _refused(tmp_path, *BAD[title])


OUT_OF_BOUNDS = {
    "an offset past the end": tensor(offset=1),
    "a huge offset": tensor(offset=(1 << 63) - 1),
    "more elements than stored": tensor(shape=(5,)),
    "far more elements than stored": tensor(shape=(1 << 40,)),
    "a huge stride": tensor(shape=(2,), strides=((1 << 63) - 1,)),
    "strides past the end": tensor(shape=(2, 2), strides=(3, 1)),
}
BAD_TENSORS = {
    "a negative offset": (tensor(offset=-1), "storage offset -1"),
    "an offset past int64": (tensor(offset=1 << 63), "storage offset 9223372036854775808"),
    "a negative size": (tensor(shape=(-4,)), "a tensor's size"),
    "a negative stride": (tensor(strides=(-1,)), "a tensor's stride"),
    "a size and no stride": (tensor(strides=()), "differ in length"),
    "too many elements": (tensor(shape=(1 << 32, 1 << 32), strides=(0, 0)), "more elements than torch can count"),
    "too many dimensions": (tensor(shape=(1,) * 65, strides=(1,) * 65), "65 dimensions; the limit is 64"),
    "a boolean size": (
        call(glob("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), tup(b"\x88"), tup(number(1))),
        "size",
    ),
    "a float size": (
        call(glob("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), tup(b"F4.0\n"), tup(number(1))),
        "size",
    ),
    "metadata of text": (tensor(metadata=text("x" * 1000)), "the lazy marks 'xxx"),
}


@pytest.mark.parametrize("title", OUT_OF_BOUNDS)
def test_a_view_that_leaves_its_storage_is_refused(title: str, tmp_path: Path) -> None:
    _refused(
        tmp_path,
        zip_bytes(pt_records(whole(OUT_OF_BOUNDS[title]), _0=FLOATS)),
        MalformedError,
        "of storage '0', which has 16",
    )


@pytest.mark.parametrize("title", BAD_TENSORS)
def test_a_tensor_that_torch_would_not_make_is_refused(title: str, tmp_path: Path) -> None:
    program, says = BAD_TENSORS[title]
    with pytest.raises((MalformedError, UnsupportedError)) as caught:
        TorchFile(write_pt(tmp_path / "a.pt", whole(program), _0=FLOATS))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: data.pkl holds ")


def test_an_empty_tensor_may_lie_anywhere(tmp_path: Path) -> None:
    file = TorchFile(write_pt(tmp_path / "a.pt", whole(tensor(offset=99, shape=(0, 3), strides=(3, 1))), _0=FLOATS))
    assert file.pieces(file.root) == ()


PERSISTENT = {
    "text": b"Pstorage 0\n",
    "a number": number(1) + b"Q",
    "a short tuple": tup(text("storage"), glob("torch", "FloatStorage")) + b"Q",
    "another type": tup(text("module"), glob("torch", "FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
    "a list": lst(text("storage"), glob("torch", "FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
    "a number as the name": tup(text("storage"), glob("torch", "FloatStorage"), number(0), text("cpu"), number(4))
    + b"Q",
    "a negative length": storage(numel=-4),
    "a boolean length": tup(text("storage"), glob("torch", "FloatStorage"), text("0"), text("cpu"), b"\x88") + b"Q",
    "a name that climbs": storage(key="../data.pkl"),
    "a long name": storage(key="0" * 10_000),
    "a dtype as the class": tup(text("storage"), glob("torch", "float32"), text("0"), text("cpu"), number(4)) + b"Q",
}


@pytest.mark.parametrize("title", PERSISTENT)
def test_a_persistent_id_that_torch_does_not_write_is_malformed(title: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError) as caught:
        TorchFile(write_pt(tmp_path / "a.pt", whole(PERSISTENT[title]), _0=FLOATS))
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: ")
    assert len(str(caught.value)) < 400


def test_a_storage_of_a_foreign_class_is_named(tmp_path: Path) -> None:
    program = whole(tup(text("storage"), glob("my.code", "Storage"), text("0"), text("cpu"), number(4)), b"Q")
    with pytest.raises(UnsupportedError, match=r"a\.pt: storage '0' is a my\.code\.Storage"):
        TorchFile(write_pt(tmp_path / "a.pt", program, _0=FLOATS))


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    file = saved(tmp_path, torch.arange(4.0))
    os.truncate(file.path, file.pieces(file.root)[0].extent.offset_bytes + 3)
    with pytest.raises(MalformedError, match=r"file\.pt: truncated: expected 16 bytes"):
        file.value(file.root)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = saved(tmp_path, torch.ones(2))
    kept.value(kept.root)
    for data in (b"", b"text", zip_bytes(pt_records(b"R")), zip_bytes([])):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(MalformedError):
            TorchFile(tmp_path / "bad.pt")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (1, 1), (2, 3, 4)])
def test_contiguity_is_what_torch_says(shape: tuple[int, ...]) -> None:
    for tensor_ in (
        torch.zeros(shape),
        torch.zeros(shape).t() if len(shape) == 2 else torch.zeros(shape),
        torch.zeros([n * 2 for n in shape]),
    ):
        view = (
            tensor_[tuple(slice(0, n) for n in shape)] if tensor_.shape != torch.Size(shape) and len(shape) else tensor_
        )
        assert is_contiguous(tuple(view.shape), view.stride()) == view.is_contiguous()


def test_real_files_of_older_releases_are_accepted() -> None:
    data = DATA / "old_releases"
    files = sorted(data.rglob("*.pt"))
    assert len(files) > 50
    for path in files:
        assert isinstance(TorchFile(path).root, dict)
