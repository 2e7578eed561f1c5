"""The pages for the browser: what they say, and that headless Chromium shows them without an error or a request."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.convert.pages import MAX_DEPTH, _modules, split_name
from dsconv.engine.validation_page import write_validation_page
from dsconv.engine.validation_report import Cell, ValidationReport
from dsconv.errors import OutputError
from dsconv.page import GENERATOR, Page
from tests.cli.running import dsconv as command
from tests.trained import Trained

EVIL = "</script><img src=x onerror=alert(1)>.0.weight"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def pages(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a ZeRO-3 run, that of the run and its cast, and that of a validation."""
    folder = tmp_path_factory.mktemp("pages")
    made = trained("llama_tied-z3-bf16-w2-trainer").checkpoint
    dsconv.merge(made, folder / "merged", dtype="bf16", fsync=False)
    inspected = command("inspect", made, "--values", "--html", folder / "inspect.html")
    assert inspected.code == 0, inspected.err
    assert command("diff", made, folder / "merged", "--html", folder / "diff.html").code == 0
    losses = {"uninterrupted": [3.0, 2.0, 1.5, 1.2], "resumed in place": [3.0, 2.0, 1.5, 1.25]}
    references = {"resumed in place": losses["uninterrupted"]}
    cell = Cell("zero3: in place", "zero3", "in place", "zero3", "bf16", False, "bitwise", {"differ": 1})
    report = ValidationReport(
        "m", 2, 4, 2, None, False, [cell], {"zero3": losses}, {"torch": "2"}, 3.0, references={"zero3": references}
    )
    write_validation_page(folder / "validate.html", report)
    return {name: folder / f"{name}.html" for name in ("inspect", "diff", "validate")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium, which continuous integration installs (.ci/run)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, path: Path, width: int) -> tuple[Any, list[str]]:
    """Return the page of a browser, and its errors and requests."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: found.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".main-svg")
    return page, found


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_pages(browser: Any, pages: dict[str, Path], width: int) -> None:
    for name, words in (
        ("inspect", ("ZeRO-3", "Modules", "Where the bytes lie", "60 tensors and states", "embed_tokens")),
        ("diff", ("20 of 20 tensors", "layer by kind", "self_attn.q_proj.weight", "model.layers.1")),
        ("validate", ("Validation: FAILED", "Losses: zero3", "resumed in place", "difference")),
    ):
        page, found = opened(browser, pages[name], width)
        text = page.inner_text("body")
        assert all(word in text for word in words), (name, text)
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        if name == "inspect":
            assert "self_attn" not in text
            page.locator("#figure-1 g.slice", has_text="layers").last.click(position={"x": 30, "y": 6})
            page.locator("#figure-1 g.slice", has_text="self_attn").first.wait_for()
            assert page.locator("#figure-1 g.pathbar", has_text="model").count()
        assert found == [pages[name].as_uri()]
        page.close()


def test_names_of_a_checkpoint_cannot_act(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({EVIL: torch.ones(300), "b": torch.ones(3)}, tmp_path / "a" / "model.safetensors")
    assert command("inspect", tmp_path / "a", "--html", tmp_path / "page.html").code == 0
    page, found = opened(browser, tmp_path / "page.html", 800)
    assert page.locator("img").count() == 0
    assert EVIL in page.locator("td").all_inner_texts()[-6:] or EVIL in page.locator("body").text_content()
    assert found == [(tmp_path / "page.html").as_uri()]
    page.close()


def test_pages_load_nothing_and_say_what_the_commands_say(pages: dict[str, Path]) -> None:
    for path in pages.values():
        text = path.read_text()
        assert GENERATOR in text[:300]
        assert "default-src 'none'" in text
        assert "<script src" not in text
        assert "<link" not in text.replace("<link>", "")
    assert "exp_avg_sq" in pages["inspect"].read_text()


def test_a_page_replaces_only_pages(pages: dict[str, Path], tmp_path: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("my notes")
    (tmp_path / "link.html").symlink_to(pages["diff"])
    for path, why in (
        (mine, "no page of dsconv"),
        (tmp_path / "no" / "p.html", "no folder"),
        (tmp_path / "link.html", "no regular"),
    ):
        ran = command("inspect", tmp_path, "--html", path)
        assert (ran.code, mine.read_text()) == (3, "my notes")
        assert why in ran.err
    page = Page("A", "a test")
    page.write(tmp_path / "new.html")
    page.write(tmp_path / "new.html")
    with pytest.raises(OutputError):
        page.write(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "new.html", "notes.html"]


def test_names_are_split_at_their_first_number() -> None:
    assert split_name("model.layers.3.mlp.experts.7.w1") == ("model.layers.3", "mlp.experts.7.w1")
    assert split_name("lm_head.weight") == ("", "lm_head.weight")
    assert split_name("0.weight") == ("0", "weight")


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up", "h.0", "0.w", "a.12", "x", "a.1.", "1.2.3", "a.b1.c", "a.٣.w", "a..0.b", "².3.w"]
)
def test_a_name_is_split_after_its_first_number(name: str) -> None:
    expected = re.fullmatch(r"(.*?\.?\d+)\.(.+)", name)
    assert split_name(name) == (expected.groups() if expected else ("", name))


def test_modules_that_are_tensors_too_and_names_of_any_depth(tmp_path: Path) -> None:
    names = ("a", "a.b", "a.b.c", ".", "..x", "x.", "d" + ".e" * 2000, "d" + ".e" * 1999 + ".f")
    save_file({name: torch.ones(at + 1) for at, name in enumerate(names)}, tmp_path / "model.safetensors")
    boxes = _modules(list(dsconv.open_checkpoint(tmp_path).values()))
    assert boxes[0].nbytes == 4 * sum(range(1, len(names) + 1))
    inside = [0] * len(boxes)
    for box in boxes[1:]:
        assert int(box.parent) < boxes.index(box)  # no circle
        inside[int(box.parent)] += box.nbytes
    assert all(inside[at] <= box.nbytes for at, box in enumerate(boxes))
    assert len(boxes) < len(names) + 4 * MAX_DEPTH


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    page = Page("t", "a test")
    page.problems("x" * 1000 for _ in range(100))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OutputError, match="the page cannot be written: File too large"):
            page.write(tmp_path / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
