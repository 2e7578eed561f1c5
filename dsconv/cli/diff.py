"""``dsconv diff``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import command

if TYPE_CHECKING:
    from dsconv.convert.diff import Distance

SHOWN = 20


@command(epilog="""\b
Example:
  dsconv diff base/ finetuned/              what did training change?
  dsconv diff merged/ merged-bf16/ --all    what did a cast cost?
  dsconv diff ckpt/ ckpt/ --item model --item-b ema""")  # fmt: skip
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--all", "show_all", is_flag=True, help=f"Show every tensor, not the {SHOWN} that changed most.")
@console.HTML
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the models on the Hub (default: main).")
@console.ITEMS
@console.ITEM_B
@console.FOLLOW_LINKS
@console.JSON
@console.QUIET
@console.DEBUG
def diff(
    a: str, b: str, show_all: bool, page: Path | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Measure by how much two checkpoints differ.

    They may have any formats, and are compared tensor by tensor and layer by layer.

    Values are compared as float64. A row shows the fraction of elements that changed, the largest change, the largest
    change relative to a value, the norm of the change relative to the norm of A, and the cosine between the two. The
    exit code is 0 whether they differ or not; `dsconv verify` proves that two checkpoints are equal.
    """
    from dsconv.convert.diff import diff as measure

    if page is not None:
        console.check_page(page, "diff --html")
    console.quiet_downloads(quiet or as_json)
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = measure(a, b, progress=progress, **options)
    seconds = time.monotonic() - began
    if page is not None:
        from dsconv.convert.pages import write_diff_page

        write_diff_page(page, report)
    if as_json:
        console.show_json({**report.to_dict(), "seconds": round(seconds, 3)})
        return
    if quiet:
        return
    changed = [distance for distance in report.tensors if distance.changed]
    console.say(
        f"{len(changed)} of {console.count(len(report.tensors), 'tensor')} changed, {console.size(report.nbytes)} read,"
        f" {seconds:.2f} s"
    )
    for title, distances in (("layer", [d for d in report.layers if d.changed]), ("tensor", changed)):
        if distances:
            _show(title, distances, show_all)
    for name in report.only_in_a:
        console.say(f"only in {report.a}: {name}")
    for name in report.only_in_b:
        console.say(f"only in {report.b}: {name}")
    for name, why in report.not_compared.items():
        console.say(f"not compared: {name}: {why}")


def _show(title: str, distances: list[Distance], show_all: bool) -> None:
    rows = [
        [
            distance.name,
            f"{distance.changed_fraction:.2%}",
            f"{distance.max_abs:.3g}",
            f"{distance.max_relative:.3g}",
            "–" if distance.relative_l2 is None else f"{distance.relative_l2:.3g}",
            "–" if distance.cosine is None else f"{distance.cosine:.6f}",
        ]
        for distance in (distances if show_all else distances[:SHOWN])
    ]
    columns = [(title, "left"), *((word, "right") for word in ("changed", "max", "max rel", "rel L2", "cosine"))]
    console.table(columns, rows)
    if len(rows) < len(distances):
        console.say(f"… and {len(distances) - len(rows)} more; --all shows them")
