"""Harmless objects that people keep beside their weights are read as labels. Nothing is run or refused."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import http
import io
import ipaddress
import logging
import math
import pathlib
import pickle
import re
import signal
import types
import typing
import uuid
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.payload import CANARY_MODULE
from attacks.places import places
from dsconv import open_checkpoint
from dsconv.checkpoint.pickles.values import Opaque, OpaqueClass, TensorRef, UnreadTensor
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, UnsafeError, UnsupportedError
from tests.checkpoint.building import call, glob, load_raw, lst, number, text, tup, whole


class Stage(enum.Enum):
    WARM_UP = 1
    DECAY = "decay"
    PAIR = (1, "a")


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


class Odd(enum.Enum):
    TABLE = {"x": 1}
    LIST = [1, 2]
    DTYPE = torch.float16
    NOTHING = None
    TYPE = int
    CLASS = Stage
    BYTES = b"x"


class Config:
    def run(self, step: int) -> None: ...

    class Mode(str, enum.Enum):
        fast = "fast"

    @dataclasses.dataclass
    class Inner:
        rate: float = 0.1


Point = collections.namedtuple("Point", ["x", "y"])


class TooLong(Exception):
    pass


def schedule(step: int, *, warm_up: int) -> float:
    return min(1.0, step / warm_up)


CLIENT_OBJECTS: dict[str, Callable[[], Any]] = {
    "an enumeration by a number": lambda: Stage.WARM_UP,
    "an enumeration by text": lambda: Stage.DECAY,
    "an enumeration by a tuple": lambda: Stage.PAIR,
    "flags": lambda: Level.LOW | Level.HIGH,
    "an enumeration in a class": lambda: Config.Mode.fast,
    "an enumeration's class": lambda: Stage,
    "a dataclass in a class": Config.Inner,
    "enumerations by other values": lambda: list(Odd),
    "a generator": torch.Generator,
    "a partial of a method": lambda: functools.partial(Config().run, 1),
    "partials of functions": lambda: [functools.partial(torch.relu), functools.partial(print, "x")],
    "the standard library's enumerations": lambda: [http.HTTPStatus.OK, signal.SIGTERM],
    "type hints": lambda: [typing.Optional[int], typing.Callable[[int], int]],  # noqa: UP045
    "streams": lambda: [io.BytesIO(b"x"), io.StringIO("x")],
    "a named tuple": lambda: Point(1, 2),
    "an error of the user's own": lambda: TooLong("no"),
    "an error": lambda: ValueError("no", 1),
    "a partial": lambda: functools.partial(schedule, warm_up=5),
    "a partial of a class": lambda: functools.partial(torch.optim.AdamW, lr=1e-3),
    "a partial of a partial": lambda: functools.partial(functools.partial(schedule, 3), warm_up=5),
    "a partial of math": lambda: functools.partial(math.pow, 2),
    "arguments": lambda: argparse.Namespace(lr=0.1, path=Path("a")),
    "a namespace": lambda: types.SimpleNamespace(a=1),
    "paths": lambda: [pathlib.PurePosixPath("/a/b"), Path("c")],
    "dates": lambda: [
        datetime.datetime.now(datetime.timezone.utc),
        datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
        datetime.timedelta(1),
    ],
    "numbers": lambda: [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1j],
    "a UUID": lambda: uuid.UUID(int=5),
    "patterns": lambda: [re.compile("a.*b", re.IGNORECASE), re.compile(b"x")],
    "slices": lambda: [slice(1, 2), range(3), Ellipsis],
    "containers": lambda: [
        collections.deque([1], maxlen=3),
        collections.ChainMap({"a": 1}),
        collections.UserDict(a=1),
        collections.defaultdict(list, a=[1]),
        frozenset([1]),
        bytearray(b"x"),
    ],
    "addresses": lambda: ipaddress.ip_address("10.0.0.1"),
    "a logger": lambda: logging.getLogger("dsconv.tests"),
    "types": lambda: [int, type(None), list[int], typing.Any, torch.nn.Linear],
    "torch's own": lambda: [
        torch.device("cpu"),
        torch.float16,
        torch.Size([1, 2]),
        torch.strided,
        torch.Generator().manual_seed(5).get_state(),
    ],
    "numpy's": lambda: _numpy(),
    "a module": lambda: torch.nn.Linear(2, 2),
    "an optimizer": lambda: torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1),
}


def _numpy() -> list[Any]:
    import numpy

    return [
        numpy.arange(3),
        numpy.float32(1.5),
        numpy.dtype("int8"),
        numpy.random.default_rng(1),
        numpy.random.RandomState(1),
        numpy.ma.masked_array([1, 2], mask=[False, True]),
        numpy.datetime64("2024-01-01"),
        numpy.float64,
    ]


@pytest.mark.parametrize("title", CLIENT_OBJECTS)
def test_what_a_client_state_may_hold_is_read_as_labels(title: str, tmp_path: Path) -> None:
    value = CLIENT_OBJECTS[title]()
    path = tmp_path / "a.pt"
    weight = torch.arange(4.0)
    for protocol in (2, 4, 5):
        torch.save({"client": value, "w": weight}, path, pickle_protocol=protocol)
        file = TorchFile(path)
        assert isinstance(file.root["w"], TensorRef)
        assert file.value(file.root["w"]) == weight.numpy().tobytes()
    if title not in ("a module", "an optimizer", "torch's own", "a generator"):  # tensors need torch.save
        for protocol in range(2 if title == "streams" else 0, 6):
            load_raw(pickle.dumps(value, protocol=protocol))


def test_members_of_enumerations_are_labels_with_their_value(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([Stage.DECAY, Config.Mode.fast, Stage.DECAY, Settings()], path)
    file = TorchFile(path)
    stage = f"{__name__}.Stage"
    assert isinstance(file.root[0], Opaque)
    assert (file.root[0].cls, file.root[0].args) == (stage, ("decay",))
    assert (file.root[1].cls, file.root[1].args) == (f"{__name__}.Config.Mode", ("fast",))
    assert file.opaque == {stage: 1, f"{__name__}.Config.Mode": 1, f"{__name__}.Settings": 1}


class Settings:
    pass


def test_what_transformers_and_peft_save_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType
    from transformers import LlamaConfig, TrainingArguments

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[])
    path = tmp_path / "a.pt"
    torch.save({"peft": {"default": lora}, "args": arguments, "config": LlamaConfig()}, path)
    file = TorchFile(path)
    assert {value.cls.rpartition(".")[2] for value in (file.root["args"], file.root["peft"]["default"])} == {
        "TrainingArguments",
        "LoraConfig",
    }


SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SPARSE)
def test_tensors_that_are_not_views_of_a_storage_are_marked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"mask": SPARSE[kind]()}, path)
    found = TorchFile(path, may_hold_unread=True).root["mask"]
    assert isinstance(found, UnreadTensor)
    assert found.cls.startswith("torch._utils._rebuild_")
    with pytest.raises(UnsupportedError, match=rf"a\.pt: it holds a {found.cls}, a kind of tensor"):
        TorchFile(path)
    torch.save({"mask": SPARSE[kind](), "w": torch.ones(2)}, path)
    with pytest.raises(UnsupportedError, match=rf"a\.pt: 'mask' is a {found.cls}"):
        open_checkpoint(path)


def test_a_client_state_does_not_keep_the_weights_from_being_read(tmp_path: Path) -> None:
    """An object that is harmless in DeepSpeed's client state is refused in the place of a weight."""
    place = next(place for place in places(tmp_path) if place.title == "model states, ZeRO-2")
    before = {name: entry.read() for name, entry in open_checkpoint(place.checkpoint).items()}
    states = torch.load(place.file, weights_only=False)
    objects = [make() for title, make in CLIENT_OBJECTS.items() if title not in ("a module", "an optimizer")]
    client = {"hyper_parameters": objects, "mask": torch.eye(3).to_sparse()}
    torch.save({**states, **client}, place.file)
    found = open_checkpoint(place.checkpoint)
    assert list(found) == list(before)
    assert found.info["unread_objects"][f"{__name__}.Stage"] == 3
    assert all(torch.equal(found[name].read(), value) for name, value in before.items())
    name = next(iter(states["module"]))
    for object_ in (torch.eye(3).to_sparse(), torch.ones(2, device="meta")):
        torch.save({**states, "module": {**states["module"], name: object_}}, place.file)
        with pytest.raises(UnsupportedError, match=rf"'{name}' is a torch\._utils\._rebuild_"):
            open_checkpoint(place.checkpoint)


REFUSED = {
    "a function by its name": call(glob("my.code", "strike"), text("x")),
    "a class without a value": call(glob("my.code", "Stage")),
    "a class with two values": call(glob("my.code", "Stage"), number(1), number(2)),
    "a class with a function": call(glob("my.code", "Stage"), glob("my.code", "strike")),
    "a class with a list of functions": call(glob("my.code", "Stage"), lst(glob("my.code", "strike"))),
    "a process with a list": call(glob("psutil", "Popen"), lst(text("touch"), text("x"))),
    "a method of an object that is called": call(
        call(glob("builtins", "getattr"), glob("my.code", "Stage") + b")\x81", text("run")), text("x")
    ),
    "a hidden attribute of an object": call(
        glob("builtins", "getattr"), glob("my.code", "Stage") + b")\x81", text("__class__")
    ),
    "a function of torch that is called": call(
        call(glob("builtins", "getattr"), glob("torch._C", "_VariableFunctionsClass"), text("from_file")), text("x")
    ),
    "a class with nested tuples": call(glob("my.code", "Stage"), tup(tup(number(1)))),
    "a process": call(glob("psutil", "Popen"), text("touch x")),
    "a process of another library": call(glob("gevent.subprocess", "Popen"), text("touch x")),
    "a class of a module that stands for os": call(glob("eventlet.green.os", "Stage"), text("touch x")),
    "an importer": call(glob("torch.package.package_importer", "PackageImporter"), text("x")),
    "a file": call(glob("h5py", "File"), text("x")),
    "a method of a class": call(glob("my.code", "Stage.run"), text("x")),
    "a method of a class by getattr": call(glob("builtins", "getattr"), glob("my.code", "Stage"), text("run")),
    "a member that is called": call(call(glob("my.code", "Stage"), number(1)), number(1)),
    "a member by getattr that is called twice": call(
        call(call(glob("builtins", "getattr"), glob("my.code", "Stage"), text("A")), number(1)), number(1)
    ),
    "a class that is kept": call(glob("torch.distributed.tensor", "DTensor"), text("x")),
    "INST of a class": b"(" + number(2) + b"imy.code\nStage\n",
    "OBJ of a class": b"(" + glob("my.code", "Stage") + number(2) + b"o",
    "a partial of nothing": call(glob("functools", "partial")),
    "a partial of text": call(glob("functools", "partial"), text("os.system")),
    "a partial of eval": call(glob("functools", "partial"), glob("builtins", "eval"), text("x")),
    "a partial that is called": call(call(glob("functools", "partial"), glob("my.code", "f"))),
    "type with three arguments": call(glob("builtins", "type"), text("X"), b")", b"}"),
    "type of something": call(glob("builtins", "type"), number(1)),
    "a module of Python by way of typing": glob("typing", "sys"),
    "an attribute of the canary": call(glob("builtins", "getattr"), glob(CANARY_MODULE, "Evil"), text("strike")),
}


@pytest.mark.parametrize("title", REFUSED)
def test_calls_that_could_do_harm_elsewhere_stay_refused(title: str) -> None:
    with pytest.raises(UnsafeError) as caught:
        load_raw(whole(REFUSED[title]))
    assert "refused, and nothing was run" in str(caught.value)


def test_a_partial_and_the_class_of_none_are_labels() -> None:
    made = load_raw(whole(call(glob("functools", "partial"), glob("my.code", "f"))))
    assert isinstance(made, Opaque)
    assert made.cls == "functools.partial"
    assert isinstance(load_raw(whole(call(glob("builtins", "type"), b"N"))), OpaqueClass)


def test_nested_names_do_not_grow_without_a_limit() -> None:
    step = b"q\x000h\x01(h\x00" + text("A" * 200) + b"tR"
    with pytest.raises(MalformedError, match="a class whose name has"):
        load_raw(whole(glob("builtins", "getattr") + b"q\x010", glob("my.code", "Stage"), step * 20))
