"""The pages of ``inspect --html`` and ``diff --html``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.convert.diff import DiffReport, Distance
from dsconv.convert.values import ValuesReport
from dsconv.page import Page, shown
from dsconv.text import count as counted
from dsconv.text import natural, size

AFTER_NUMBER = re.compile(r"(?<=\d)\.(?=.)", re.DOTALL)  # the dot between a layer's number and the rest of the name
MAX_FILES, MAX_ROWS = 256, 2000  # what a figure and a table show at most
MAX_CELLS = 1 << 16  # of a figure, which has columns × rows
MAX_DEPTH = 16  # of the boxes in boxes; the names of real models have some 12 parts
BLUES = [[0.0, "#c6dcf0"], [0.5, "#3787c0"], [1.0, "#08306b"]]  # white means: nothing there
MAX_LABEL = 20


def split_name(name: str) -> tuple[str, str]:
    """Return (layer, kind): ``model.layers.3`` and ``mlp.up_proj.weight``; the layer of a name without number is ""."""
    dot = AFTER_NUMBER.search(name)
    return (name[: dot.start()], name[dot.end() :]) if dot else ("", name)


def write_inspect_page(
    path: Path,
    found: Checkpoint,
    entries: Sequence[TensorEntry],
    facts: Sequence[tuple[str, str]],
    values: ValuesReport | None = None,
) -> None:
    """Write the page of a checkpoint: its model by module, where each file's bytes lie, its tensors.

    Args:
        path: The file to write.
        found: The checkpoint.
        entries: The tensors to show.
        facts: (label, value) of what is known of it.
        values: What its values are, if they were read.

    Raises:
        OutputError: The page cannot be written there.
        MissingPackageError: plotly is not installed.
    """
    page = Page(shown("/".join(found.path.parts[-2:])), "inspect --html")
    page.table([("", "left"), ("", "left")], facts)
    page.problems(found.warnings)
    if values is not None:
        page.problems(values.problems)
    page.heading("Modules", "The area is a module's bytes. A click goes into a module, the bar above leads back.")
    page.figure(_treemap(entries), 560)
    files, grid, layers = _bytes_by_file(entries)
    pattern, shorter = _without_common_ends(files)
    widest = _columns(len(files))
    page.heading(
        "Where the bytes lie",
        f"Bytes of each layer, or tensor without one, in the files {shown(pattern)}."
        f"{_first(MAX_FILES, files, 'files')}{_first(widest, layers, 'layers')}",
    )
    page.figure(_file_map(files[:MAX_FILES], shorter, grid, layers[:widest]), 280 + 18 * min(len(files), MAX_FILES))
    if values is not None:
        page.heading("Values", "Read in full. Norm and largest are of the finite values.")
        rows: list[tuple[object, ...]] = [
            (v.name, v.nan, v.infinite, f"{v.zeros / max(1, v.numel):.1%}", f"{v.norm:.4g}", f"{v.largest:.4g}")
            for v in sorted(values.tensors, key=lambda v: not v.nonfinite)[:MAX_ROWS]
        ]
        titles = [(title, "right") for title in ("NaN", "Inf", "zeros", "norm", "largest")]
        page.table([("tensor", "left"), *titles], rows, f"{counted(len(values.tensors), 'tensor')} and states")
    page.heading("Tensors")
    columns = [
        *((title, "left") for title in ("tensor", "dtype", "shape", "role")),
        ("pieces", "right"),
        ("size", "right"),
    ]
    listed = [
        (e.name, e.dtype, " × ".join(map(str, e.shape)) or "scalar", e.role, f"{e.piece_count:,}", size(e.nbytes))
        for e in entries[:MAX_ROWS]
    ]
    page.table(
        columns,
        listed,
        counted(len(entries), "tensor") + (f", the first {MAX_ROWS:,}" if len(entries) > MAX_ROWS else ""),
    )
    page.write(path)


def _columns(rows: int) -> int:
    """Return the most columns of a figure with so many rows, of which it shows ``MAX_FILES`` at most."""
    return MAX_CELLS // max(1, min(rows, MAX_FILES))


def _first(most: int, items: Sequence[str], what: str) -> str:
    return f" The first {most:,} of {len(items):,} {what} are shown." if len(items) > most else ""


@dataclass
class _Module:
    """A box of the figure of modules: a module, or a tensor. ``parent`` is the number of the box that it lies in."""

    label: str
    name: str
    parent: str
    nbytes: int = 0
    note: str = ""


def _modules(entries: Sequence[TensorEntry]) -> list[_Module]:
    """Return the boxes, the whole model first. What lies deeper than ``MAX_DEPTH`` is in one box."""
    boxes = [_Module("model", "model", "")]
    inside: list[dict[str, int]] = [{}]  # of each box, by the part of a name: the number of the box
    for entry in entries:
        parts = entry.name.split(".", MAX_DEPTH - 1)
        at = 0
        boxes[0].nbytes += entry.nbytes
        for depth, part in enumerate(parts, 1):
            if part not in inside[at]:
                inside[at][part] = len(boxes)
                boxes.append(_Module(shown(part), shown(".".join(parts[:depth])), str(at)))
                inside.append({})
            at = inside[at][part]
            boxes[at].nbytes += entry.nbytes
        boxes[at].note = f"<br>{entry.dtype}, {' × '.join(map(str, entry.shape)) or 'scalar'}"
    return boxes


def _treemap(entries: Sequence[TensorEntry]) -> Any:
    import plotly.graph_objects as go

    boxes = _modules(entries)
    return go.Figure(
        go.Treemap(
            ids=[str(at) for at in range(len(boxes))],
            labels=[box.label for box in boxes],
            parents=[box.parent for box in boxes],
            values=[box.nbytes for box in boxes],
            branchvalues="total",
            maxdepth=4,
            text=[size(box.nbytes) for box in boxes],
            textinfo="label+text+percent root",
            hovertext=[f"{box.name}<br>{size(box.nbytes)}{box.note}" for box in boxes],
            hoverinfo="text",
            marker={
                "colors": [math.log10(box.nbytes + 1) for box in boxes],
                "colorscale": BLUES,
                "showscale": False,
            },
            pathbar={"visible": True, "thickness": 26},
            tiling={"pad": 2},
        )
    )


def _bytes_by_file(entries: Sequence[TensorEntry]) -> tuple[list[str], dict[tuple[str, str], int], list[str]]:
    """Return the files' names, the bytes by (file, layer), and the layers in their order."""
    grid: dict[tuple[str, str], int] = {}
    files: dict[str, None] = {}
    layers: dict[str, None] = {}
    for entry in entries:
        layer = split_name(entry.name)[0] or entry.name
        layers[layer] = None
        for piece in entry.pieces:
            name = piece.extent.record.path.name
            files[name] = None
            grid[name, layer] = grid.get((name, layer), 0) + piece.extent.nbytes
    return sorted(files), grid, list(layers)


def _without_common_ends(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return ``rank_*.pt``, and what stands for the ``*`` in each of the names."""
    if len(names) < 2:
        return ", ".join(names), list(names)
    head = _common_start(names)
    tail = _common_start([name[len(head) :][::-1] for name in names])[::-1]
    return f"{head}*{tail}", [name[len(head) : len(name) - len(tail)] or "–" for name in names]


def _common_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _file_map(
    files: Sequence[str], shorter: Sequence[str], grid: dict[tuple[str, str], int], layers: Sequence[str]
) -> Any:
    return _heat_map(
        [[grid.get((file, layer)) for layer in layers] for file in files],
        [[size(grid.get((file, layer), 0)) for layer in layers] for file in files],
        layers,
        shorter[: len(files)],
        "bytes",
    )


def _heat_map(
    values: list[list[Any]], texts: list[list[str]], across: Sequence[str], down: Sequence[str], title: str
) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[shown(label) for label in across],
            y=[shown(label) for label in down],
            text=texts,
            hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>",
            colorscale=BLUES,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": title, "side": "top"},
                "orientation": "h",
                "y": -0.02,
                "yanchor": "top",
                "x": 0.5,
                "thickness": 12,
            },
        )
    )
    labels = [label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}" for label in across]
    ticks = {"tickvals": list(range(len(labels))), "ticktext": list(map(shown, labels))} if len(labels) <= 60 else {}
    figure.update_xaxes(type="category", side="top", tickangle=-60, showgrid=False, **ticks)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def write_diff_page(path: Path, report: DiffReport) -> None:
    """Write the page of a diff: what changed by layer and kind, and the tensors that changed most.

    Args:
        path: The file to write.
        report: What ``diff`` found.

    Raises:
        OutputError: The page cannot be written there.
        MissingPackageError: plotly is not installed.
    """
    changed = [distance for distance in report.tensors if distance.changed]
    page = Page(f"{shown(Path(report.a).name)} and {shown(Path(report.b).name)}", "diff --html")
    page.table(
        [("", "left"), ("", "left")],
        [
            ("A", report.a),
            ("B", report.b),
            ("changed", f"{len(changed):,} of {counted(len(report.tensors), 'tensor')}"),
            ("only in A", ", ".join(report.only_in_a) or "none"),
            ("only in B", ", ".join(report.only_in_b) or "none"),
            ("read", size(report.nbytes)),
        ],
    )
    page.problems(f"not compared: {name}: {why}" for name, why in report.not_compared.items())
    rows, kinds = _layers_and_kinds(report.tensors)
    if rows:
        page.heading(
            "What changed, layer by kind",
            "The norm of the change relative to the norm of A, in powers of ten. Empty: equal, or no such tensor."
            f"{_first(MAX_FILES, rows, 'layers')}{_first(_columns(len(rows)), kinds, 'kinds')}",
        )
        rows, kinds = rows[:MAX_FILES], kinds[: _columns(len(rows))]
        by_place = {split_name(distance.name): distance for distance in report.tensors}
        values = [[_log(by_place.get((row, kind))) for kind in kinds] for row in rows]
        texts = [[_words(by_place.get((row, kind))) for kind in kinds] for row in rows]
        page.figure(_heat_map(values, texts, kinds, rows, "relative change, log10"), 260 + 22 * len(rows))
    page.heading("Tensors, the largest change first")
    columns = [("tensor", "left"), *((t, "right") for t in ("changed", "max", "max rel", "rel L2", "cosine"))]
    cells = [
        (d.name, f"{d.changed_fraction:.2%}", f"{d.max_abs:.3g}", f"{d.max_relative:.3g}",
         "–" if d.relative_l2 is None else f"{d.relative_l2:.3g}", "–" if d.cosine is None else f"{d.cosine:.6f}")
        for d in changed[:MAX_ROWS]
    ]  # fmt: skip
    page.table(columns, cells)
    page.write(path)


def _layers_and_kinds(distances: Sequence[Distance]) -> tuple[list[str], list[str]]:
    places = [split_name(distance.name) for distance in distances]
    rows = {layer for layer, _ in places if layer}
    kinds = dict.fromkeys(sorted(kind for layer, kind in places if layer))
    return sorted(rows, key=natural), list(kinds)


def _log(distance: Distance | None) -> float | None:
    if distance is None or not distance.changed or not distance.relative_l2:
        return None
    return math.log10(distance.relative_l2) if math.isfinite(distance.relative_l2) else None


def _words(distance: Distance | None) -> str:
    if distance is None:
        return "no such tensor"
    if not distance.changed:
        return "equal"
    relative = "A is all zeros" if distance.relative_l2 is None else f"relative L2 {distance.relative_l2:.3g}"
    return f"{relative}, {distance.changed_fraction:.2%} of the elements, max {distance.max_abs:.3g}"
