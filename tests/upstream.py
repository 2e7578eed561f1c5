"""Compare ``upstream.toml``, the sources that dsconv's rules were read from, with the installed packages.

``upstream.toml`` has a table for each package, with the release that the rules were read from. In it, each file has a
table with the digest of each symbol's source (``*`` is the whole file). A rule's docstring cites only the file and the
symbol, so that the release stands in one place.

    python -m tests.upstream             # what changed in the installed packages, and which files of dsconv cite it
    python -m tests.upstream --accept    # after a review: write the installed releases and their digests
    python -m tests.upstream --add peft/tuners/lora/layer.py Linear.merge    # a new rule was read from this symbol
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "upstream.toml"
HEADER = """\
# The upstream sources that dsconv's rules were read from: for each symbol, the digest of its source ("*": of its file).
# After a review of what changed: make upstream ARGS=--accept
"""


@dataclass(frozen=True)
class Fact:
    """A piece of upstream source that a rule was read from."""

    package: str
    file: str
    symbol: str
    digest: str

    def __str__(self) -> str:
        return f"{self.package}/{self.file} {self.symbol}"


def versions() -> dict[str, str]:
    """Return the release of each package that the rules were read from."""
    return {package: str(rows["version"]) for package, rows in tomllib.loads(TABLE.read_text()).items()}


def facts() -> list[Fact]:
    """Return all facts of ``upstream.toml``."""
    return [
        Fact(package, file, symbol, digest)
        for package, rows in tomllib.loads(TABLE.read_text()).items()
        for file, symbols in rows.items()
        if file != "version"
        for symbol, digest in symbols.items()
    ]


@cache
def folder_of(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent


@cache
def sources(path: Path) -> dict[str, str]:
    """Return the source of each function, class, method and constant of a file, with decorators. ``*`` is the whole
    file.
    """
    text = path.read_text()
    lines = text.splitlines()
    found = {"*": text}

    def add(name: str, node: ast.stmt) -> None:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                add(prefix + node.name, node)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try)):
                walk(node.body + node.orelse, prefix)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        add(prefix + target.id, node)

    walk(ast.parse(text).body, "")
    return found


def digest_of(package: str, file: str, symbol: str) -> str:
    """Return the digest of a symbol's source in the installed package, or why there is none."""
    path = folder_of(package) / file
    if not path.is_file():
        return "no such file"
    source = sources(path).get(symbol)
    return "no such symbol" if source is None else hashlib.sha256(source.encode()).hexdigest()[:16]


@cache
def rules() -> dict[str, str]:
    """Return the text of each file of dsconv."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "dsconv").rglob("*.py"))}


def citing(fact: Fact) -> list[str]:
    """Return the files of dsconv that cite a fact's file and symbol, or if there are none, those that cite its file."""
    path = Path(fact.file)
    symbol = fact.symbol.rpartition(".")[2]
    names = (path.name, f"{path.parent.name}/*.py")
    by_file = [file for file, text in rules().items() if any(name in text for name in names)]
    both = [file for file in by_file if re.search(rf"\b{re.escape(symbol)}\b", rules()[file])]
    return both or by_file


def changes() -> Iterator[str]:
    """Yield a line for each fact that no longer holds in the installed packages."""
    recorded = versions()
    for fact in facts():
        found = digest_of(fact.package, fact.file, fact.symbol)
        if found != fact.digest:
            now = metadata.version(fact.package)
            what = found if found.startswith("no ") else "its source changed"
            yield (
                f"{fact}: {what} between {fact.package} {recorded[fact.package]} and {now}; the rule is in "
                f"{', '.join(citing(fact))}"
            )


def accept(added: Sequence[Fact] = ()) -> None:
    """Write the installed releases and digests into ``upstream.toml``. Symbols that no longer exist stay unchanged."""
    lines = [HEADER.rstrip()]
    rows = [*facts(), *(fact for fact in added if fact not in facts())]
    for package in sorted(versions()):
        lines += ["", f"[{package}]", f'version = "{metadata.version(package).partition("+")[0]}"']
        for file in sorted({fact.file for fact in rows if fact.package == package}):
            lines += ["", f'[{package}."{file}"]']
            mine = {fact.symbol: fact for fact in rows if (fact.package, fact.file) == (package, file)}
            for _, fact in sorted(mine.items()):
                found = digest_of(package, file, fact.symbol)
                lines.append(f'"{fact.symbol}" = "{fact.digest if found.startswith("no ") else found}"')
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Print what changed, accept it, or add a symbol."""
    parser = argparse.ArgumentParser(description="What changed in the sources that dsconv's rules were read from.")
    parser.add_argument("--accept", action="store_true", help="write the installed releases and digests")
    parser.add_argument("--add", nargs=2, metavar=("PACKAGE/FILE", "SYMBOL"), help="list a symbol, or * for a file")
    options = parser.parse_args()
    found = list(changes())
    print("\n".join(found) or "nothing changed")
    if options.add:
        (package, _, file), symbol = options.add[0].partition("/"), options.add[1]
        digest = digest_of(package, file, symbol)
        if digest.startswith("no "):
            parser.error(f"{options.add[0]} {symbol}: {digest}")
        accept([Fact(package, file, symbol, digest)])
    elif options.accept:
        accept()
    return 0 if options.accept or options.add else bool(found)


if __name__ == "__main__":
    sys.exit(main())
