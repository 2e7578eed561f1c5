"""The typed reader of pickles returns values of the right type, and raises an error with the file and the field for
others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.pickles import schema
from dsconv.checkpoint.pickles.values import Instance, Opaque, OpaqueClass, StorageRef, TensorRef
from dsconv.errors import MalformedError, UnsupportedError

PATH = Path("a/file.pt")
TENSOR = TensorRef(StorageRef("0", BY_NAME["float32"], 4), BY_NAME["float32"], 0, (4,), (1,))
CHUNK = Instance("torch.distributed.checkpoint.metadata.ChunkStorageMetadata", state={})
expect_chunk = partial(schema.expect_instance, cls="ChunkStorageMetadata")

FITTING: list[tuple[Callable[..., Any], Any, Any]] = [
    (schema.expect_dict, {1: 2}, {1: 2}),
    (schema.expect_list, (1, 2), (1, 2)),
    (schema.expect_list, [], []),
    (schema.expect_text, "größe", "größe"),
    (schema.expect_bool, False, False),
    (schema.expect_int, 0, 0),
    (schema.expect_int, (1 << 63) - 1, (1 << 63) - 1),
    (schema.expect_number, -1.5, -1.5),
    (schema.expect_number, -7, -7),
    (schema.expect_name, "model.layers.0.weight", "model.layers.0.weight"),
    (schema.expect_names, ("a", "b"), ["a", "b"]),
    (schema.expect_named, {"a": None}, {"a": None}),
    (schema.expect_sizes, (0, 5), (0, 5)),
    (schema.expect_sizes, [1] * 64, (1,) * 64),
    (schema.expect_shape, (1 << 31, 1 << 31), (1 << 31, 1 << 31)),
    (schema.expect_shapes, {"a": [2, 3], "b": ()}, {"a": (2, 3), "b": ()}),
    (schema.expect_ties, {"a": "b", "b": "c", "d": "c"}, {"a": "c", "b": "c", "d": "c"}),
    (schema.expect_tensor, TENSOR, TENSOR),
    (expect_chunk, CHUNK, CHUNK),
]


@pytest.mark.parametrize(("expect", "value", "result"), FITTING)
def test_values_that_fit_are_returned(expect: Callable[..., Any], value: Any, result: Any) -> None:
    assert expect(value, PATH, "a field") == result


MISFITS: list[tuple[Callable[..., Any], Any]] = [
    (schema.expect_dict, [("a", 1)]),
    (schema.expect_list, "abc"),
    (schema.expect_list, {1}),
    (schema.expect_text, b"abc"),
    (schema.expect_text, "\ud800"),
    (schema.expect_text, "x" * ((1 << 20) + 1)),
    (schema.expect_bool, 1),
    (schema.expect_int, True),
    (schema.expect_int, -1),
    (schema.expect_int, 1.0),
    (schema.expect_int, 1 << 63),
    (schema.expect_number, "1"),
    (schema.expect_number, False),
    (schema.expect_number, 1 << 64),
    (schema.expect_name, 5),
    (schema.expect_name, "a\udfff"),
    (schema.expect_name, "x" * 5000),
    (schema.expect_name, "__metadata__"),
    (schema.expect_names, 5),
    (schema.expect_names, ["a", 5]),
    (schema.expect_names, ["a", "__metadata__"]),
    (schema.expect_named, {"a": 1, 2: 3}),
    (schema.expect_named, {"__metadata__": 1}),
    (schema.expect_sizes, 5),
    (schema.expect_sizes, (1,) * 65),
    (schema.expect_sizes, (1, -1)),
    (schema.expect_sizes, (1.0,)),
    (schema.expect_sizes, (True,)),
    (schema.expect_shape, (1 << 32, 1 << 31)),
    (schema.expect_shape, (0, 1 << 62, 8)),
    (schema.expect_shapes, [("a", (1,))]),
    (schema.expect_shapes, {"a": 5}),
    (schema.expect_shapes, {3: (5,)}),
    (schema.expect_ties, [1, 2]),
    (schema.expect_ties, {"a": 5}),
    (schema.expect_ties, {"a": "a"}),
    (schema.expect_ties, {"a": "b", "b": "c", "c": "a"}),
    (schema.expect_ties, {"x": "a", "a": "b", "b": "a"}),
    (schema.expect_tensor, {"a": 1}),
    (expect_chunk, {"sizes": ()}),
]


@pytest.mark.parametrize(("expect", "value"), MISFITS)
def test_values_that_do_not_fit_are_refused_by_file_and_field(expect: Callable[..., Any], value: Any) -> None:
    with pytest.raises(MalformedError) as caught:
        expect(value, PATH, "the field\u2019s name")
    assert str(caught.value).startswith("a/file.pt: ")
    assert "the field\u2019s name" in str(caught.value)
    assert "expected" in str(caught.value) or "__metadata__" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value", [Opaque("my.code.Shapes"), OpaqueClass("my.code", "Shapes"), Instance("my.code.Shapes")]
)
def test_an_object_that_is_not_read_is_named(value: Any) -> None:
    for expect in (schema.expect_dict, schema.expect_shapes, schema.expect_int, schema.expect_name, expect_chunk):
        with pytest.raises(UnsupportedError, match=r"a/file.pt: x is a my.code.Shapes, which dsconv does not read"):
            expect(value, PATH, "x")


def test_a_field_of_a_dictionary() -> None:
    root = {"step": 3, "none": None}
    assert schema.field(root, "step", schema.expect_int, PATH) == 3
    assert schema.field(root, "none", schema.expect_int, PATH, default=None) is None
    assert schema.field(root, "absent", schema.expect_int, PATH, default=7) == 7
    for key in ("none", "absent"):
        with pytest.raises(MalformedError, match=f"a/file.pt: not what its name says: it has nothing under '{key}'"):
            schema.field(root, key, schema.expect_int, PATH)
    with pytest.raises(MalformedError, match=r"a/file.pt: step is 3; expected text"):
        schema.field(root, "step", schema.expect_text, PATH, default="")
    with pytest.raises(MalformedError, match=r"a/file.pt: the file is 5; expected a dictionary with 'step'"):
        schema.field(5, "step", schema.expect_int, PATH)


def test_long_chains_of_ties_take_linear_time() -> None:
    chain = {f"a{i}": f"a{i + 1}" for i in range(100_000)}
    start = time.process_time()
    assert set(schema.expect_ties(dict(reversed(chain.items())), PATH, "ties").values()) == {"a100000"}
    assert set(schema.expect_ties(chain, PATH, "ties").values()) == {"a100000"}
    with pytest.raises(MalformedError, match="in a circle"):
        schema.expect_ties(chain | {"a100000": "a50000"}, PATH, "ties")
    assert time.process_time() - start < 3
