"""Memory and time stay in proportion to the size of a pickle, whatever it contains. These are the worst pickles that we
know.
"""

from __future__ import annotations

import itertools
import struct
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dsconv import open_checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.pickles.budget import (
    BASE_BYTES,
    BASE_STEPS,
    COUNTED_BYTES_PER_BYTE,
    TOTAL_BYTES_PER_BYTE,
    WorkBudget,
)
from dsconv.checkpoint.pickles.errors import BadArguments
from dsconv.checkpoint.pickles.machine import Machine
from dsconv.checkpoint.pickles.values import StorageRef, TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import DsconvError, MalformedError
from tests.checkpoint.building import (
    glob,
    load_raw,
    lst,
    number,
    stack_glob,
    storage,
    tensor,
    text,
    whole,
    write_pt,
)

SECONDS_PER_BYTE = 10e-6  # SECURITY.md promises 10 s per megabyte; an idle machine takes about 1 s
NBYTES = 100_000


def repeated(part: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a pickle of about ``NBYTES`` bytes that repeats ``part`` in one list."""
    return whole(before, b"(", part * (NBYTES // len(part)), b"l", after, protocol=4)


def memorised(value: bytes) -> bytes:
    return value + b"\x940"


def numbered(part: Callable[[int], bytes], before: bytes = b"(", after: bytes = b"l") -> bytes:
    parts, nbytes = [], 0
    for i in itertools.count():
        if nbytes > NBYTES:
            break
        parts.append(part(i))
        nbytes += len(parts[-1])
    return whole(before, *parts, after, protocol=4)


SIXTY = b"(" + b"K\x01" * 60 + b"t"
VIEW = (
    memorised(glob("torch._utils", "_rebuild_tensor_v2"))
    + memorised(b"(" + storage() + b"K\x00" + SIXTY + SIXTY + b"\x89}t")
)  # fmt: skip
COSTLY: dict[str, Callable[[], bytes]] = {
    "empty sets": lambda: repeated(b"\x8f"),
    "empty dictionaries": lambda: repeated(b"}"),
    "empty lists": lambda: repeated(b"]"),
    "empty lists of a mark": lambda: repeated(b"(l"),
    "empty frozensets": lambda: repeated(b"(\x91"),
    "tuples in tuples": lambda: whole(b"N" + b"\x85" * NBYTES),
    "tuples of three": lambda: repeated(b"NNN\x87"),
    "one-item lists": lambda: repeated(b"]Na"),
    "one-item dictionaries": lambda: repeated(b"}NNs"),
    "one-item sets": lambda: repeated(b"\x8f(N\x90"),
    "nine-item sets": lambda: repeated(b"\x8f(" + bytes(b for i in range(9) for b in (0x4B, i)) + b"\x90"),
    "six-item dictionaries": lambda: repeated(b"}(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(6)) + b"u"),
    "a set of numbers": lambda: numbered(lambda i: b"J" + struct.pack("<i", i), b"\x8f(", b"\x90"),
    "marks": lambda: repeated(b"(1"),
    "memo": lambda: whole(b"N", b"\x94" * NBYTES),
    "memo with gaps": lambda: whole(b"N", *[b"r" + struct.pack("<L", 2 * i + 1) for i in range(NBYTES // 5)]),
    "copies of the top": lambda: whole(b"(N", b"2" * NBYTES, b"t"),
    "integers": lambda: repeated(b"M\xff\xff"),
    "small long integers": lambda: repeated(b"\x8a\x02\xff\x7f"),
    "floats of one digit": lambda: repeated(b"F1\n"),
    "texts of two letters": lambda: repeated(b"\x8c\x02ab"),
    "wide texts": lambda: repeated(b"\x8c\x04\xf0\x9f\x98\x80"),
    "one wide text": lambda: whole(text("a" * NBYTES + "\U0001f600")),
    "bytes": lambda: repeated(b"C\x02ab"),
    "text of two letters in quotes": lambda: repeated(b"S'ab'\n"),
    "distinct names": lambda: numbered(lambda i: stack_glob("m", f"{i:x}")),
    "one name": lambda: repeated(b"h\x00h\x01\x93", memorised(text("my.code")) + memorised(text("Layer"))),
    "objects": lambda: repeated(b"h\x00)\x81", memorised(glob("my.code", "Layer"))),
    "objects that are kept": lambda: repeated(
        b"h\x00)\x81", memorised(glob("torch.distributed.checkpoint.metadata", "Metadata"))
    ),
    "empty OrderedDicts": lambda: repeated(b"h\x00)R", memorised(glob("collections", "OrderedDict"))),
    "sets of a list of nine": lambda: repeated(
        b"h\x00h\x01R", memorised(glob("builtins", "set")) + memorised(lst(*map(number, range(9))) + b"\x85")
    ),
    "dictionaries of a list of pairs": lambda: repeated(
        b"h\x00h\x01R",
        memorised(glob("collections", "OrderedDict"))
        + memorised(lst(*(number(i) + b"N\x86" for i in range(100))) + b"\x85"),
    ),
    "bytes of a text": lambda: repeated(
        b"h\x00h\x01R", memorised(glob("_codecs", "encode")) + memorised(text("ä" * 4000) + b"\x85")
    ),
    "dates": lambda: repeated(b"h\x00)R", memorised(glob("datetime", "date"))),
    "storages": lambda: repeated(b"h\x00Q", memorised(storage()[:-1])),
    "tensors of 60 dimensions": lambda: repeated(b"h\x00h\x01R", VIEW),
}


def storage_of(pid: Any) -> StorageRef:
    return StorageRef("0", BY_NAME["float32"], 4)


def attempt(data: bytes) -> None:
    """Read ``data``, which is sound or refused for its cost."""
    try:
        load_raw(data, persistent_load=storage_of)
    except MalformedError as error:
        if "than a file of its size has use for" not in str(error):
            raise


@pytest.mark.parametrize("title", COSTLY)
def test_memory_and_time_are_in_proportion_to_the_pickle(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base_bytes = 1 << 20  # a large base would hide the part that grows with the length
    monkeypatch.setattr("dsconv.checkpoint.pickles.budget.BASE_BYTES", base_bytes)
    data = COSTLY[title]()
    assert 0.9 * NBYTES < len(data) < 1.2 * NBYTES
    tracemalloc.start()
    start = time.process_time()
    try:
        attempt(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1 + SECONDS_PER_BYTE * len(data)
    assert peak_bytes <= base_bytes + TOTAL_BYTES_PER_BYTE * len(data), f"{peak_bytes / len(data):.0f} bytes a byte"


def test_a_megabyte_of_empty_sets_is_refused() -> None:
    with pytest.raises(MalformedError, match="more memory than a file of its size has use for"):
        load_raw(whole(b"(" + b"\x8f" * (1 << 20) + b"l", protocol=4))


MODULUS = sys.hash_info.modulus
VIEW_PAIR = (TensorRef(storage_of(None), BY_NAME["float32"], 0, (1,), (5,)), 0)
COLLIDING: dict[str, Callable[[int], Any]] = {
    "integers": lambda i: MODULUS * (i + 1),
    "floats": lambda i: float(i) + 0.5,
    "nested integers": lambda i: (i, (i, i)),
    "None and booleans": lambda i: tuple((None, True, False)[i // 3**k % 3] for k in range(12)),
    "frozensets of booleans": lambda i: (frozenset((bool(i % 2), None)), i),
    "tensors": lambda i: VIEW_PAIR[0],
    "tensors in tuples": lambda i: VIEW_PAIR,
}


@pytest.mark.parametrize("title", COLLIDING)
def test_every_key_whose_hash_a_file_can_choose_pays_for_collisions(title: str) -> None:
    """A hundred thousand colliding keys in a small file are too many, however they are made."""
    few = WorkBudget(1000)
    for i in range(300):
        few.key(COLLIDING[title](i))
    many = WorkBudget(1000)
    keys = (COLLIDING[title](i) for i in range(100_000))
    with pytest.raises(BadArguments, match="more work to build"):
        deque(map(many.key, keys), maxlen=0)


def test_names_and_plain_indices_cost_nothing() -> None:
    budget = WorkBudget(0)
    before = budget.steps_left
    for i in range(10_000):
        budget.key(i)
        budget.key(f"model.layers.{i}.weight")
        budget.key(f"{i}".encode())
    assert budget.steps_left == before


def test_views_that_hash_alike_have_different_keys() -> None:
    found = {}
    for strides in itertools.product((5, 5 + MODULUS), repeat=3):
        tensor = TensorRef(storage_of(None), BY_NAME["float32"], 0, (1, 1, 1), strides)
        found[tensor.view_key] = hash(strides)
    assert len(found) == 8
    assert len(set(found.values())) == 1


def test_real_files_are_far_from_the_limits(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(20_000)]
    module = b"".join(text(name) + tensor(shape=(2, 2), strides=(2, 1)) for name in names)
    history = b"".join(b"}(" + text("loss") + b"G" + bytes(8) + text("step") + number(i) + b"u" for i in range(5000))
    data = whole(b"}(", text("module"), b"}(", module, b"u", text("history"), b"(", history, b"l", b"u")
    machine = Machine(data, Path("x"), storage_of, "data.pkl")
    machine.run()
    assert BASE_BYTES + COUNTED_BYTES_PER_BYTE * len(data) - machine.budget.bytes_left < 10 * len(data)
    assert BASE_STEPS + len(data) - machine.budget.steps_left < 0.1 * len(data)
    assert len(TorchFile(write_pt(tmp_path / "a.pt", data, _0=bytes(16))).root["module"]) == 20_000


OPENED: dict[str, bytes] = {
    "one view under many names": VIEW + b"}(" + b"".join(text(f"{i:x}") + b"h\x00h\x01R" for i in range(6000)) + b"u",
    "views whose strides hash alike": memorised(glob("torch._utils", "_rebuild_tensor_v2"))
    + memorised(storage())
    + b"}("
    + b"".join(
        text(f"{i:x}") + b"h\x00(h\x01K\x00(" + b"K\x01" * 12 + b"t("
        + b"".join(number(5 + MODULUS * (i >> k & 1)) for k in range(12)) + b"t\x89}tR"
        for i in range(600)
    )
    + b"u",
    "dictionaries that share one": memorised(b"}(" + text("w") + tensor(of=storage()) + b"u")
    + b"}("
    + b"".join(text(f"{i:x}") + b"h\x00" for i in range(10_000))
    + b"u",
}  # fmt: skip


@pytest.mark.parametrize("title", OPENED)
def test_opening_takes_time_in_proportion_to_the_file(title: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "pytorch_model.bin", whole(OPENED[title], protocol=4), _0=bytes(16))
    start = time.process_time()
    with suppress(DsconvError):
        open_checkpoint(path)
    assert time.process_time() - start < 1 + SECONDS_PER_BYTE * path.stat().st_size
