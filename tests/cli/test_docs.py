"""The documentation is true: commands print what docs/commands.md shows, messages are those that users get."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dsconv
from dsconv.cli.commands import HOMES, command_of, run
from tests.trained import Trained

DOCS = Path(dsconv.__file__).parent.parent / "docs"
PAGE = DOCS / "commands.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def samples() -> Iterator[tuple[str, str]]:
    """Yield each command of docs/commands.md and what the page says that it prints."""
    for block in BLOCK.findall(PAGE.read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def plain(text: str) -> str:
    """Without what differs from run to run and where it was trained: decimals, versions, the order of rows, columns."""
    text = re.sub(r"(version\s+)\S+", r"\1N", text)
    text = re.sub(r"\d+\.\d+(e-?\d+)?", "N", text)
    return "\n".join(sorted(" ".join(line.split()) for line in text.splitlines() if line.strip()))


def play(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    run(shlex.split(command)[1:])
    printed = capsys.readouterr()
    return printed.err + printed.out


def test_commands_print_what_the_page_shows(
    trained: Callable[[str], Trained],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained("llama_tied-z3-bf16-w2-trainer").checkpoint, tmp_path / "run" / "checkpoint-2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = list(samples())
    assert len(shown) >= 9
    for command, output in shown:
        assert plain(play(command, capsys)) == plain(output), command


def test_every_command_of_the_docs_exists() -> None:
    """Names and options of every ``$ dsconv …`` line of the docs and the README are those of the command line."""
    for path in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for line in re.findall(r"^\$? ?(?:[A-Z_]+=\S+ )*dsconv ([a-z][^\n#|>]*)", path.read_text(), re.MULTILINE):
            name, *rest = line.split()
            if name not in HOMES:
                continue  # prose, such as "dsconv reads …"
            known = {option for p in command_of(name).params for option in (*p.opts, *p.secondary_opts)}
            given = {word.partition("=")[0] for word in rest if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}
            assert given <= known | {"--help"}, (path.name, line, given - known)


def test_every_command_is_documented() -> None:
    pages = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    assert not [name for name in HOMES if f"dsconv {name}" not in pages]


def test_troubleshooting_quotes_real_messages() -> None:
    source = "".join(path.read_text() for path in (DOCS.parent / "dsconv").rglob("*.py"))
    source = re.sub(r'"\n\s+f?"', "", source)  # strings over several lines
    quoted = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    assert not [words for words in quoted if words not in source]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"_DSCONV_COMPLETE={shell}_source dsconv" in (DOCS / "completion.md").read_text()
    monkeypatch.setenv("_DSCONV_COMPLETE", f"{shell}_source")
    assert run([]) == 0
    assert "_dsconv_completion" in capsys.readouterr().out
