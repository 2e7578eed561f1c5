"""JSON of strangers: as Python reads it, but no deeper than what reads the value afterwards can go."""

from __future__ import annotations

import json

import pytest

from dsconv.checkpoint.storage.plain_json import MAX_DEPTH, load_json


@pytest.mark.parametrize("value", [3, None, [], {}, {"a": [1, {"b": [[]]}]}, [[[["x"]]]] * 1000, "[" * 500])
def test_what_people_write_is_read_as_python_does(value: object) -> None:
    assert load_json(json.dumps(value)) == load_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("opening", "inner", "closing"), [("[", "", "]"), ('{"a":', "1", "}"), ('[1,{"a":', "[]", "}]")]
)
def test_json_is_read_to_a_depth(opening: str, inner: str, closing: str) -> None:
    levels = opening.count("[") + opening.count("{")
    for depth in (1, 10, MAX_DEPTH // levels - 1):
        text = opening * depth + inner + closing * depth
        assert load_json(text) == json.loads(text)
    for depth in (MAX_DEPTH + 1, 300, 900, 1100, 100_000):
        with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}"):
            load_json(opening * depth + inner + closing * depth)
