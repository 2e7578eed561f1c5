"""The structure that docs/architecture.md draws: imports run down only, and heavy libraries are imported where they
are used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dsconv

ROOT = Path(dsconv.__file__).parent
# A room may import from its own floor's own room and from the floors below.
FLOORS = {
    "zero_utils": 1,
    "errors": 0,
    "_version": 0,
    "checkpoint": 2,
    "convert": 3,
    "loaders": 3,
    "engine": 4,
    "compat": 4,
    "doctor": 4,
    "cli": 5,
}
HEAVY = {
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "rich",
    "matplotlib",
    "zstandard",
    "fsspec",
    "s3fs",
}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            yield room, path, ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top of the file) of each import that is not for type checkers only."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "absolute imports only"
                module = child.module or ""
                yield from ((f"{module}.{alias.name}", top) for alias in child.names)
            yield from visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(tree, True)


def test_imports_run_down_only() -> None:
    seen = set()
    for room, path, tree in sources():
        assert room in FLOORS, f"{path}: a room that no floor is given for"
        for module, _ in imported(tree):
            parts = module.split(".")
            if parts[0] != "dsconv":
                continue
            other = parts[1]
            seen.add((room, other))
            assert other == room or FLOORS[other] < FLOORS[room], (
                f"{path} imports {module}: {other} is not below {room}"
            )
    assert ("cli", "convert") in seen
    assert ("convert", "checkpoint") in seen


def test_formats_know_no_destination_and_destinations_no_format() -> None:
    for room, path, tree in sources():
        for module, _ in imported(tree):
            if "formats" in path.parts:
                assert not module.startswith(("dsconv.convert", "dsconv.loaders", "dsconv.checkpoint.transfer.copy")), (
                    f"{path} imports {module}"
                )
            elif room in ("convert", "loaders", "cli", "engine"):
                shared = (
                    "dsconv.checkpoint.formats.huggingface.safetensors",  # names of files that are written too
                    "dsconv.checkpoint.formats.huggingface.transformers_source",
                )
                assert not module.startswith("dsconv.checkpoint.formats") or module.startswith(shared), (
                    f"{path} imports {module}"
                )


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for room, path, tree in sources():
        heavy = (
            HEAVY - {"torch"} if room in ("loaders", "engine") else HEAVY
        )  # rooms that hold live models have imported it
        for module, top in imported(tree):
            assert not (top and module.split(".")[0] in heavy), f"{path} imports {module} at its top"


def test_files_are_of_a_length_that_reads_from_top_to_bottom() -> None:
    for _, path, _tree in sources():
        assert len(path.read_text().splitlines()) <= 470, path


def test_everything_exported_is_there() -> None:
    for name in dsconv.__all__:
        assert getattr(dsconv, name) is not None
