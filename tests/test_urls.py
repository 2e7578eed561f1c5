"""One rule for what a user names, wherever he names it: a URL is never a folder called ``s3:``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import dsconv
from dsconv.cli.commands import HOMES, command_of, run
from dsconv.compat import get_fp32_state_dict_from_zero_checkpoint
from dsconv.convert.push import push
from dsconv.errors import DsconvError, OutputError, UnsupportedError
from dsconv.urls import local_path, where, writable
from tests.trained import Trained

CASE = "llama_tied-z3-bf16-w2"


def test_what_is_a_url_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert where("S3://Bucket/Run") == "s3://Bucket/Run"
    assert where("GS://b/x//y") == "gs://b/x//y"
    for plain in ("a/b", "/a/b", "a:b", "step:10", "./s3:/b", "a/s3://b", "checkpoints", "~/x", "", "a:"):
        assert where(plain) == Path(plain)
    assert where(tmp_path / "s3:" / "b") == tmp_path / "s3:" / "b"
    for text in ("file:///a%20b/c", "FILE://localhost/a%20b/c", "file:/a%20b/c", "local:///a b/c"):
        assert where(text) == Path("/a b/c")
    (tmp_path / "x:").mkdir()
    assert where("x:/inside") == Path("x:/inside")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:/bucket/run", "neither a URL nor a path: write s3://bucket/run, or ./s3:/bucket/run for a folder here"),
        (Path("s3://bucket/run"), "neither a URL nor a path: write s3://bucket/run"),
        ("file://host/run", "names the machine 'host', and only files of this one are read: write file:///PATH"),
        ("file://run", "names the machine 'run'"),
        ("simplecache::s3://bucket/run", "simplecache::s3:// is not read: give the URL of the store itself"),
        ("my_store://bucket", "my_store:// is not read: a scheme has letters"),
    ],
)
def test_what_is_neither(text: str | Path, words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        where(text)
    assert words in str(caught.value)


def test_what_is_only_read() -> None:
    for text in ("HTTPS://host/x", "http://host/x/", "hf://org/model"):
        with pytest.raises(OutputError, match="is read only here"):
            writable(text)
    with pytest.raises(UnsupportedError, match="s3://b/x: the report must lie on this disk"):
        local_path("S3://b/x", "the report")


def named_paths() -> Iterator[tuple[str, list[str], bool]]:
    """(what is tried, arguments, whether it is an output) for each place of a command line that takes a path."""
    given = {
        "merge": ["CKPT", "out"], "zero-to-fp32": ["CKPT", "out"], "to-dcp": ["CKPT", "out"],
        "to-universal": ["CKPT", "out"], "inspect": ["CKPT"], "verify": ["CKPT", "CKPT"], "diff": ["CKPT", "CKPT"],
        "push": ["CKPT", "org/model"], "watch": ["CKPT", "--push-to-hub", "org/model"], "config": ["ds.json"],
        "estimate": ["config.json"], "train": ["CKPT", "--output-dir", "out", "--steps", "1"], "resume": ["CKPT"],
        "validate": ["CKPT", "--report", "out"], "doctor": ["CKPT"],
    }  # fmt: skip
    places = {"CKPT", "out", "ds.json", "config.json"}
    for name, arguments in given.items():
        for at, argument in enumerate(arguments):
            if argument in places:
                yield f"{name} {argument} {at}", [name, *arguments], argument == "out"
    for name, option in (
        ("merge", "--config-from"), ("watch", "--config-from"), ("estimate", "--plot"), ("config", "--model"),
        ("train", "--data"), ("train", "--ds-config"), ("train", "--nvme-path"),
        ("inspect", "--html"), ("diff", "--html"),
    ):  # fmt: skip
        yield f"{name} {option}", [name, *given[name], option, "PLACE"], False
    yield "merge --base", ["merge", *given["merge"], "--fold-lora", "--base", "PLACE"], False


REFUSALS = (
    "is read only here", "must lie on this disk", "cannot be reached", "neither a URL nor a path",
    "nothing that is installed reads",
)  # fmt: skip
CASES = {what: (arguments, is_output) for what, arguments, is_output in named_paths()}


def test_every_command_is_tried() -> None:
    assert set(HOMES) == {what.split()[0] for what in CASES}
    for command in map(command_of, HOMES):
        for parameter in command.params:
            if isinstance(parameter, click.Option) and isinstance(parameter.type, click.Path):
                option = parameter.opts[0]
                assert any(option in arguments for arguments, _ in CASES.values()), f"{command.name} {option}"


@pytest.mark.parametrize(
    ("what", "url"),
    [
        (what, url)
        for what in CASES
        for url in ("nothing://bucket/run", "s3:/bucket/run", "https://127.0.0.1:9/run/")
        if (what, url[:5]) != ("watch --config-from", "https")  # asked for at each look: it may be there later
    ],
)
def test_no_command_takes_a_url_for_a_folder(
    what: str,
    url: str,
    trained: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither made nor looked for: the URL is refused, by the same words everywhere, or read as one."""
    arguments, is_output = CASES[what]
    here = {"CKPT": str(trained(CASE).checkpoint), "config.json": str(trained(CASE).checkpoint / "config.json")}
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsconv.checkpoint.storage.http.HttpStore.tries", 1)
    at = arguments.index("PLACE") if "PLACE" in arguments else 1 + int(what.rpartition(" ")[2])
    filled = [url if place == at else here.get(argument, argument) for place, argument in enumerate(arguments)]
    with pytest.raises(DsconvError) as caught:
        run(filled)
    said = str(caught.value)
    assert url in said, said
    assert any(words in said for words in REFUSALS), said
    if is_output and url.startswith("https"):
        assert "is read only here" in said or "must lie on this disk" in said
    assert sorted(os.listdir(tmp_path)) == ["ds.json"]


def test_functions_follow_the_rule_too(trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    source = trained(CASE).checkpoint
    calls: list[Callable[[], object]] = [
        lambda: dsconv.merge(source, "s3:/b/x"),
        lambda: dsconv.to_dcp(source, Path("s3://b/x")),
        lambda: dsconv.to_universal(source, "S3:/b/x"),
        lambda: dsconv.open_checkpoint("s3:/b/x"),
        lambda: push("s3:/b/x", "org/model"),
        lambda: get_fp32_state_dict_from_zero_checkpoint("s3:/b/x"),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match="neither a URL nor a path"):
            call()
    assert os.listdir(tmp_path) == []
    dsconv.to_dcp(source, f"FILE://{tmp_path}/a%20b")
    assert os.listdir(tmp_path) == ["a b"]
