"""Compare the geometry of joins with the libraries that define it: DeepSpeed's affine maps and Python's ``re``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsconv
from dsconv.checkpoint.formats import copies
from dsconv.checkpoint.formats.deepspeed.name_patterns import Patterns
from dsconv.checkpoint.formats.deepspeed.shards import Join, along, in_parts
from dsconv.checkpoint.formats.deepspeed.universal_rules import UniversalInfo, from_affine_map
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import InconsistentCheckpointError, MalformedError, UnsupportedError

PATH = Path("mp_rank_00_model_states.pt")


def applied(join: Join, shards: list[np.ndarray]) -> np.ndarray:
    """Return the full tensor, joined by numpy's indexing. Each element must be filled once, and copies must agree."""
    full = np.full(join.shape, -1.0)
    for block in join.blocks:
        index = np.ix_(*[[i for a, b in dim for i in range(a, b)] for dim in block.region])
        values = shards[block.rank].ravel()[block.start : block.start + block.numel]
        assert (full[index] == -1).all()
        full[index] = values.reshape(full[index].shape)
    for one, other in join.copies:
        left, right = (shards[b.rank].ravel()[b.start : b.start + one.numel] for b in (one, other))
        assert (left == right).all()
    assert (full >= 0).all()
    return full


def affine_maps() -> dict[str, Any]:
    from deepspeed.checkpoint import affine

    return {
        "rows": affine.contiguous_split_map((7, 5), [3, 4, 0], 0),
        "columns": affine.contiguous_split_map((3, 7), [3, 0, 4], 1),
        "replicated": affine.replicated_map((3, 2), 3),
        "scalar": affine.replicated_map((), 2),
        "empty": affine.replicated_map((0, 2), 2),
        "qkv": affine.sub_param_map((14, 3), [6, 4, 4], [[2, 4], [4, 0], [1, 3]], 0),
        "fused columns": affine.sub_param_map((2, 14), [6, 4, 4], [[2, 4], [4, 0], [1, 3]], 1),
        "view": affine.sub_param_map((3, 5, 2), [3, 2], [[2, 1], [1, 1]], 1),
        "bigcode": affine.segmented_map((11, 2), [(7, False), (4, True)], 0, 2, [[3, 4]]),
        "codegen": affine.block_gather_map((12, 2), {0: [0, 4, 1], 1: [5, 2, 3]}, 2, 0),
        "yuan": affine.block_gather_map((3, 8), {0: [0, 2], 1: [1, 3]}, 2, 1),
    }


@pytest.mark.parametrize(
    "name",
    ["rows", "columns", "replicated", "scalar", "empty", "qkv", "fused columns", "view", "bigcode", "codegen", "yuan"],
)
def test_affine_maps(name: str) -> None:
    made = affine_maps()[name]
    logical = tuple(made.logical_shape)
    full = torch.arange(math.prod(logical), dtype=torch.float64).reshape(logical)
    shards = [made.extract(full, rank).numpy() for rank in range(len(made.shard_shapes))]
    if name == "view":  # the parameter has two dimensions, and the view that was cut has three
        shards = [shard.reshape(-1, shard.shape[-1]) for shard in shards]
    join = from_affine_map(made.to_dict(), [shard.shape for shard in shards], "x")
    assert (applied(join, shards).ravel() == full.numpy().ravel()).all()


def test_permuted_columns_are_refused() -> None:
    from deepspeed.checkpoint import affine

    made = affine.block_gather_map((3, 8), {0: [2, 0], 1: [1, 3]}, 2, 1)
    with pytest.raises(UnsupportedError, match="another order"):
        from_affine_map(made.to_dict(), [(3, 4), (3, 4)], "x")


def test_shapes_that_are_not_those_of_the_map() -> None:
    from deepspeed.checkpoint import affine

    made = affine.contiguous_split_map((7, 5), [3, 4], 0).to_dict()
    with pytest.raises(InconsistentCheckpointError, match="ranks were swapped"):
        from_affine_map(made, [(4, 5), (3, 5)], "x")
    with pytest.raises(MalformedError):
        from_affine_map(made, [(3, 5), (4, 5), (0, 5)], "x")


def test_padding_of_a_vocabulary_is_left_out() -> None:
    full = np.arange(22.0).reshape(11, 2)
    padded = np.concatenate([full, np.full((4, 2), 99.0)])
    info = UniversalInfo({"vocabulary_parameter_patterns": [r"word.*weight"], "original_vocab_size": 11}, PATH)
    for widths in ([5, 5, 5], [11, 4, 0], [12, 3, 0], [1, 13, 1]):
        shards = np.split(padded, np.cumsum(widths)[:-1])
        assert (applied(info.join("word.weight", [s.shape for s in shards]), shards) == full).all()
    info = UniversalInfo(
        {"vocabulary_parameter_patterns": ["w"], "tp_replicated_parameter_patterns": ["w"], "original_vocab_size": 11},
        PATH,
    )
    assert (applied(info.join("w", [(15, 2), (15, 2)]), [padded, padded]) == full).all()


def test_halves_and_equal_parts() -> None:
    full = np.arange(24.0).reshape(12, 2)
    info = UniversalInfo({
        "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.half"],
        "parameter_with_sub_params": [{"patterns": [r"\d+\.qkv"], "shape": (3, -1), "partition_dim": 0}],
    }, PATH)  # fmt: skip
    for name, parts in (("3.half", 2), ("3.qkv", 3)):
        shards = [
            np.concatenate(
                [
                    part[rank::1][: len(part) // 2] if rank == 0 else part[len(part) // 2 :]
                    for part in np.split(full, parts)
                ]
            )
            for rank in (0, 1)
        ]
        assert (applied(info.join(name, [s.shape for s in shards]), shards) == full).all()
    with pytest.raises(UnsupportedError, match="do not divide"):
        info.join("3.qkv", [(5, 2), (4, 2)])


def test_default_is_rows_and_scalars_cannot_be_joined() -> None:
    info = UniversalInfo({}, PATH)
    assert info.join("a", [(2, 3), (4, 3)]).shape == (6, 3)
    with pytest.raises(InconsistentCheckpointError, match="cannot be joined"):
        info.join("a", [(), ()])
    with pytest.raises(InconsistentCheckpointError, match="cannot be joined"):
        info.join("a", [(2, 3), (4, 4)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_parts_of_any_dimension(data: st.DataObject) -> None:
    rank_count = data.draw(st.integers(1, 4))
    widths = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=rank_count, max_size=rank_count), min_size=1, max_size=3)
    )
    before, after = (
        data.draw(st.lists(st.integers(1, 3), max_size=2)),
        data.draw(st.lists(st.integers(1, 3), max_size=2)),
    )
    dim, size = len(before), sum(map(sum, widths))
    full = np.arange(float(math.prod(before) * size * math.prod(after))).reshape(*before, size, *after)
    edges = np.cumsum([width for row in widths for width in row])[:-1]
    cuts = np.split(full, edges, axis=dim)
    shards = [np.concatenate(cuts[rank::rank_count], axis=dim) for rank in range(rank_count)]
    join = in_parts([shard.shape for shard in shards], dim, widths, "x")
    assert (applied(join, shards) == full).all()


def test_runs_that_several_ranks_hold_are_copies() -> None:
    join = along((6,), 0, [[(0, 2), (4, 6)], [(2, 4), (4, 6)]], "x")
    assert [(a.rank, b.rank, b.start) for a, b in join.copies] == [(0, 1, 2)]


PARTS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[0-9]", "1"])


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(PARTS, st.sampled_from(["", "*", "+", "?"])), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
    st.text("ab.1_", max_size=8),
)
def test_patterns_match_as_re_does(parts: list[tuple[str, str]], start: bool, end: bool, name: str) -> None:
    pattern = "^" * start + "".join(part + quantifier for part, quantifier in parts) + "$" * end
    assert (Patterns([(pattern, 1)], "x").find(name) is not None) == (re.match(pattern, name) is not None)


def test_patterns_of_autotp_are_names_and_evil_ones_take_no_time() -> None:
    name = "model.layers.0.self-attn.q_proj (x).weight"
    assert Patterns([(f"^{re.escape(name)}$", 7)], "x").find(name) == 7
    assert Patterns([("a*" * 40 + "b", 1)], "x").find("a" * 3000) is None
    for evil in ("(a+)+$", "a{3}", r"\1", "a|b", "[a", "a" * 2000, "*a"):
        with pytest.raises(UnsupportedError):
            Patterns([(evil, 1)], "x")


def test_large_copies_are_compared_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compared places include the first and the last block, whatever the size."""
    from safetensors.torch import save_file

    monkeypatch.setattr(copies, "BLOCK_BYTES", 64)
    monkeypatch.setattr(copies, "WHOLE_BYTES", 1024)
    tensor = torch.arange(16 * 200 + 5, dtype=torch.float32)
    for place, found in ((None, True), (0, False), (len(tensor) - 1, False)):
        other = tensor.clone()
        if place is not None:
            other[place] += 1
        save_file({"a": tensor, "b": other}, tmp_path / "model.safetensors")
        checkpoint = dsconv.open_checkpoint(tmp_path / "model.safetensors")
        with Sources() as sources:
            assert copies.same(checkpoint["a"], 0, checkpoint["b"], 0, len(tensor), sources) is found
