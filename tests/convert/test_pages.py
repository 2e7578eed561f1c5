"""The pages for the browser: what they say, and that headless Chromium shows them without an error or a request."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.convert.pages import split_name
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
