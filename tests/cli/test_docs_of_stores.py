"""Every command of docs/hub.md and docs/stores.md runs as it is written, against servers on this machine."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv.cli.commands import run
from tests.cli.test_docs import DOCS
from tests.servers.hubwriting import WritableHub, contents
from tests.servers.serving import put, serve
from tests.trained import Trained

CASE = "llama_tied-z3-bf16-w2-trainer"
# Each command, and where it writes a model.
HUB = {
    "dsconv push merged/ org/model --private": "org/model",
    "dsconv push merged/ org/model --dry-run": "",
    "dsconv zero-to-fp32 checkpoints/ merged/ --push-to-hub org/model": "org/model",
    "dsconv watch checkpoints/ --push-to-hub org/model --dtype bf16": "org/model",
}
STORES = {
    "dsconv merge org/model small/ --dtype bf16": "small",
    "dsconv inspect hf://org/model --revision v1.0": "",
    "dsconv zero-to-fp32 s3://bucket/run/checkpoint-500 out/": "out",
    "dsconv zero-to-fp32 s3://bucket/run s3://bucket/model": "s3://bucket/model",
    "dsconv verify https://host/run/ out/": "",
    "dsconv to-dcp s3://bucket/run s3://bucket/dcp": "s3://bucket/dcp",
    "dsconv merge checkpoints/ out/ --config-from org/model": "out",
}


@pytest.fixture(scope="module")
def merged(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    dsconv.merge(trained(CASE).checkpoint, folder, fsync=False)
    return folder


def test_the_pages_show_these_commands() -> None:
    for page, expected in (("hub.md", HUB), ("stores.md", STORES)):
        block = (DOCS / page).read_text().split("```")[1]
        lines = re.findall(r"^dsconv .*$", block, re.MULTILINE)
        assert [line.partition("#")[0].strip() for line in lines] == list(expected)


def play(command: str, place: str, source: Path) -> None:
    """Run a command, and compare the model that it wrote with the checkpoint."""
    assert run(shlex.split(command)[1:]) == 0, command
    if place:
        assert dsconv.verify(source, place, allow_cast=True).equal


@pytest.mark.parametrize("command", HUB)
def test_commands_of_the_hub(
    command: str,
    hub: WritableHub,
    merged: Path,
    trained: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(trained(CASE).checkpoint, "checkpoints/checkpoint-500"))
    if "push merged" in command:
        shutil.copytree(merged, "merged")
    play(command + " --once" * ("watch" in command), HUB[command], source)
    assert hub.is_private("org/model") == ("--private" in command)
    assert bool(hub.repos) == (HUB[command] == "org/model")


@pytest.mark.parametrize("command", STORES)
def test_commands_of_stores(
    command: str,
    hub: WritableHub,
    s3: Any,
    merged: Path,
    trained: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(trained(CASE).checkpoint, "checkpoints/checkpoint-500"))
    hub.make("org/model", contents(merged))
    hub.repos["org/model"]["v1.0"] = hub.head("org/model")
    if s3.exists("bucket"):
        s3.rm("bucket", recursive=True)
    s3.mkdir("bucket")
    if "s3://" in command:
        put(s3, source, "bucket/run/checkpoint-500")
    if "verify" in command:
        shutil.copytree(merged, "out")
    Path("host").mkdir()
    Path("host/run").symlink_to(Path("checkpoints").resolve())
    with serve(tmp_path / "host") as server:
        play(command.replace("https://host", server.url), STORES[command], source)
