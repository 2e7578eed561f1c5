"""Text from files reaches a terminal without control characters and without credentials."""

from __future__ import annotations

import sys
import time
import traceback
import unicodedata
from pathlib import Path

import pytest

from dsconv import errors
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.loaders.report import LoadReport
from dsconv.text import MAX_LINE, MAX_MESSAGE, MAX_QUOTED, clean, count, quote, redact


def test_no_character_that_a_terminal_obeys_is_left() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    for start in range(0, len(everything), 256):
        shown = clean(everything[start : start + 256])
        assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert clean("a\x1b]0;t\x07\r\nb\u2028\u202e\x9b2J") == "a\\x1b]0;t\\x07\\r\\nb\\u2028\\u202e\\x9b2J"
    assert clean("模型.layers.0 → ×") == "模型.layers.0 → ×"
    assert clean("\udcff/x\ud800") == "\\xff/x\\ud800"


def test_long_text_is_cut_in_the_middle() -> None:
    assert len(clean("x" * 10_000_000)) <= MAX_LINE
    shown = clean("head" + "\x1b" * 5000 + "tail", 100)
    assert len(shown) <= 100
    assert shown.startswith("head")
    assert shown.endswith("tail")
    assert " … " in shown
    assert clean("x" * 100, 100) == "x" * 100


def test_counts_agree_with_their_nouns_and_verbs() -> None:
    assert [count(n, "tensor") for n in (0, 1, 1234)] == ["0 tensors", "1 tensor", "1,234 tensors"]
    assert [count(2, noun) for noun in ("copy", "key", "mismatch", "process")] == [
        "2 copies", "2 keys", "2 mismatches", "2 processes",
    ]  # fmt: skip
    verbs = ("is", "has", "does", "differs")
    assert [count(1, "file", verb) for verb in verbs] == ["1 file is", "1 file has", "1 file does", "1 file differs"]
    assert [count(2, "file", verb) for verb in verbs] == ["2 files are", "2 files have", "2 files do", "2 files differ"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:secret@host/a.bin: no", "https://…@host/a.bin: no"),
        ("s3://bucket/m?X-Amz-Signature=abc&X-Amz-Expires=1 is", "s3://bucket/m?… is"),
        ("https:/host/m?sig=abc", "https:/host/m?…"),
        ("token hf_abcdefghijklmnop given", "token hf_… given"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer …"),
        ("https://host/a: what? no@b:c", "https://host/a: what? no@b:c"),
        ("layers.0.weight: is it?", "layers.0.weight: is it?"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == clean(text) == shown


def test_a_load_report_shows_names_as_text() -> None:
    evil = "w\x1b[2J\nloaded 5 tensors"
    report = LoadReport(f"https://u:p@h/{evil}", "safetensors", missing=[evil], unexpected=[evil], warnings=[evil])
    report.mismatched = {evil: ((1,), (2,))}
    shown = report.summary().splitlines()
    assert len(shown) == 5
    assert all(line.isprintable() for line in shown)
    assert "u:p" not in shown[0]


def test_a_name_is_quoted_and_cut_in_the_middle() -> None:
    assert quote("layers.0.weight") == "'layers.0.weight'"
    assert quote("it's") == '"it\'s"'
    shown = quote("head." + "\u202e" * 100_000 + ".weight")
    assert shown.isprintable()
    assert len(shown) <= MAX_QUOTED
    assert shown.startswith("'head.")
    assert shown.endswith(".weight'")


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_the_text_of_an_error_can_be_logged(kind: type) -> None:
    """A program that logs an error shows no more of a hostile name than the command line does."""
    if not issubclass(kind, errors.DsconvError):
        return
    evil = "\x1b]0;t\x07\n" + "\u202e" * 10_000
    error = kind("a.bin", {evil: 1}) if kind is errors.SeveralModelsError else kind(f"a.bin: {evil} https://u:p@h/x")
    for text in (str(error), repr(error), "".join(traceback.format_exception(error)).strip(), f"{error}"):
        assert text.isprintable()
        assert len(text) < MAX_MESSAGE + 200
        assert "u:p" not in text


def test_the_warnings_of_a_checkpoint_can_be_logged(tmp_path: Path) -> None:
    evil = "\x1b[2J" + "w" * 10_000
    (text,) = Checkpoint(tmp_path, "safetensors", {}, warnings=(evil,)).warnings
    assert text.isprintable()
    assert len(text) <= MAX_MESSAGE


@pytest.mark.parametrize("part", ["a://", "a.", "a:", "a://b:", "?a://", "@:/", "hf_", "a:/?"])
def test_text_is_cleaned_in_time_in_proportion(part: str) -> None:
    began = time.process_time()
    clean("://" + part * (16_000 // len(part)) + "://")
    assert time.process_time() - began < 0.3
