"""Tensors spread over meshes of up to four ranks, drawn by hypothesis: the same on every rank, and in the tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Spread:
    """``placements`` are (dimension, split factor), the dimension None for a replica; ``ranks`` are the mesh's,
    row-major.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[tuple[int | None, int], ...]


MESHES = ((4,), (2, 2), (1, 4), (4, 1), (2, 1, 2), (1, 2, 2))


@st.composite
def spreads(draw: st.DrawFn, meshes: tuple[tuple[int, ...], ...] = MESHES) -> Spread:
    shape = tuple(draw(st.lists(st.integers(0, 11), min_size=1, max_size=3)))
    mesh = draw(st.sampled_from(meshes))
    numel = 1
    for size in mesh:
        numel *= size
    ranks = draw(st.sampled_from([tuple(range(numel)), tuple(reversed(range(numel)))]))
    placements: list[tuple[int | None, int]] = []
    for _ in mesh:
        dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
        placements.append((dim, 1 if dim is None else draw(st.sampled_from([1, 1, 2, 3, 4]))))
    return Spread(shape, mesh, ranks, tuple(placements))
