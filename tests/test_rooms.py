"""Check the structure that docs/architecture.md draws, which file may import which, and the limits of style."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import dsconv

ROOT = Path(dsconv.__file__).parent
# A room imports from itself and from the floors below. Rooms of one floor do not import each other.
FLOORS = {
    "text": -2,
    "errors": -1,
    "urls": 0,
    "_version": 0,
    "page": 1,
    "zero_utils": 1,
    "checkpoint": 2,
    "names": 3,
    "convert": 4,
    "loaders": 4,
    "compat": 5,
    "doctor": 5,
    "engine": 5,
    "cli": 6,
}
# The floors inside checkpoint/, where a room is a folder or a file. In formats/ each family is a room.
FLOORS_OF_CHECKPOINT = {
    "map": 0,
    "storage": 0,
    "config_files": 1,
    "pickles": 1,
    "torchfile": 2,
    "transfer": 2,
    "formats.copies": 3,
    "formats.checks": 3,
    "formats.items": 3,
    "formats.huggingface": 4,
    "formats.dcp": 5,
    "formats.deepspeed": 5,
    "formats.rank_files": 5,
    "formats.table": 6,
    "opening": 7,
    "hidden_size": 7,
    "summary": 7,
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
    "plotly",
    "zstandard",
    "fsspec",
    "s3fs",
}
MAX_LINES = 440
MAX_PARAMETERS = 8
# Functions that users call with keywords, each of which makes an options object at once.
PUBLIC_KEYWORDS = {
    "dsconv.convert.watch.watch",
    "dsconv.checkpoint.map.checkpoint.Checkpoint.__init__",
    "dsconv.cli.config.config",
    "dsconv.convert.dcp_writer.to_dcp",
    "dsconv.convert.merge.merge",
    "dsconv.convert.push.push",
    "dsconv.convert.universal_writer.to_universal",
    "dsconv.engine.validation.validate",
    "dsconv.loaders.tensor_parallel.load_tp",
    "dsconv.loaders.zero3.load_zero3",
    "dsconv.convert.verify.verify",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Return the parsed source of every file of dsconv by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def path_of(module: str) -> Path:
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def room_of_checkpoint(module: str) -> str:
    """Return the room of a module in checkpoint/, or "" for packages that only hold rooms."""
    parts = module.split(".")[2:]
    if parts[:1] == ["formats"]:
        return ".".join(parts[:2]) if len(parts) > 1 else ""
    return parts[0] if parts else ""


def imported(tree: ast.AST, types: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each import as (name, whether it is at the top of the file), including those inside functions.

    Blocks under ``if TYPE_CHECKING`` never run, so they count only with ``types``.
    """

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not types:
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "absolute imports only"
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            yield from visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(tree, True)


def named(tree: ast.AST) -> Iterator[str]:
    """Return the modules that a file names as text, as the table of formats does for ``import_module``."""
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return (text for text in texts if "." in text and text in modules())


def uses(module: str, tree: ast.Module) -> set[str]:
    """Return the modules of dsconv that a module imports, including those for types and those by name."""
    found = set(named(tree))
    for name, _ in imported(tree, types=True):
        home = name if name in modules() else name.rpartition(".")[0]
        if home in modules():
            found.add(home)
    return found - {module}


@cache
def graph() -> dict[str, set[str]]:
    return {module: uses(module, tree) for module, tree in modules().items()}


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import circle, or an empty list."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        pending = [(start, iter(sorted(edges[start])))]
        while pending:
            module, rest = pending[-1]
            if module not in path:
                path.append(module)
            following = next((other for other in rest if other not in done), None)
            if following is None:
                done.add(path.pop())
                pending.pop()
            elif following in path:
                return path[path.index(following) :]
            else:
                pending.append((following, iter(sorted(edges[following]))))
    return []


def test_no_file_imports_one_that_imports_it_back() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c"]  # tests the search itself
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert "dsconv.checkpoint.formats.dcp.reader" in graph()["dsconv.checkpoint.formats.table"]
    # An import inside a function.
    assert "dsconv.checkpoint.storage.remote" in graph()["dsconv.checkpoint.storage.roots"]
    assert circle_in(graph()) == []


def test_imports_run_down_only() -> None:
    seen = set()
    for module, others in graph().items():
        room = room_of(module)
        if room in ("", "__main__"):
            continue
        assert room in FLOORS, f"{module}: a room that no floor is given for"
        for other in map(room_of, others):
            assert other, f"{module} imports dsconv itself, which stands above all rooms"
            seen.add((room, other))
            assert other == room or FLOORS[other] < FLOORS[room], f"{module} imports {other}, which is not below {room}"
    assert {("cli", "convert"), ("convert", "checkpoint"), ("checkpoint", "zero_utils")} <= seen


def test_imports_inside_checkpoint_run_down_only() -> None:
    seen = set()
    for module, others in graph().items():
        room = room_of_checkpoint(module)
        if room_of(module) != "checkpoint" or not room:
            continue
        assert room in FLOORS_OF_CHECKPOINT, f"{module}: a room that no floor is given for"
        for other in (room_of_checkpoint(other) for other in others if room_of(other) == "checkpoint"):
            seen.add((room, other))
            below = other in FLOORS_OF_CHECKPOINT and FLOORS_OF_CHECKPOINT[other] < FLOORS_OF_CHECKPOINT[room]
            assert other == room or below, f"{module} imports {other}, which is not below {room}"
    assert {("opening", "storage"), ("formats.table", "formats.dcp"), ("torchfile", "pickles")} <= seen


def test_formats_know_no_destination_and_destinations_no_format() -> None:
    shared = (
        "dsconv.checkpoint.formats.huggingface.safetensors",  # it has the names of files, which are written too
        "dsconv.checkpoint.formats.huggingface.transformers_source",  # it reads about architectures
        "dsconv.checkpoint.formats.huggingface.skeleton",
        "dsconv.checkpoint.formats.huggingface.auto_classes",
        "dsconv.checkpoint.formats.huggingface.config_files",
    )
    for module, others in graph().items():
        if module.startswith("dsconv.checkpoint.formats."):
            assert "dsconv.checkpoint.transfer.copy" not in others, module
        elif room_of(module) in ("convert", "loaders", "cli", "engine"):
            formats = {other for other in others if other.startswith("dsconv.checkpoint.formats")}
            assert formats <= set(shared), f"{module} imports {formats - set(shared)}"


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for module, tree in modules().items():
        # The rooms that hold live models may import torch.
        heavy = HEAVY - {"torch"} if room_of(module) in ("loaders", "engine") else HEAVY
        for name, top in imported(tree):
            assert not (top and name.split(".")[0] in heavy), f"{module} imports {name} at its top"


def test_private_names_stay_in_their_module() -> None:
    for module, tree in modules().items():
        homes = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dsconv":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    fine = not is_private(alias.name) or name in modules()
                    assert fine, f"{module} imports {name}"
                    homes[alias.asname or alias.name] = name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
                assert homes.get(node.value.id) not in modules(), f"{module} uses {node.value.id}.{node.attr}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_check_is_an_assert() -> None:
    """``python -O`` removes asserts. The allowed ones only tell mypy that something is not None."""
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                narrows = isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.IsNot)
                assert narrows, f"{module}:{node.lineno}: raise an error instead of `assert {ast.unparse(node.test)}`"


def functions(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield every function as (dotted name, definition, whether it is a method)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{inside}.{child.name}", child, isinstance(node, ast.ClassDef)
        name = f"{inside}.{child.name}" if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else inside
        yield from functions(child, name)


def test_functions_take_few_parameters() -> None:
    many = set()
    for module, tree in modules().items():
        for name, function, is_method in functions(tree, module):
            given = function.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
            if count - (is_method and not static) > MAX_PARAMETERS:
                many.add(name)
    assert many == PUBLIC_KEYWORDS, "group them into an options object, or take the name off the list"


def test_files_read_from_top_to_bottom() -> None:
    """A file is short enough to be read in one go. (Ruff checks the width of lines.)"""
    for module in modules():
        lines = path_of(module).read_text().splitlines()
        assert len(lines) <= MAX_LINES, f"{module} has {len(lines)} lines"


def test_everything_exported_is_there() -> None:
    for name in dsconv.__all__:
        assert getattr(dsconv, name) is not None
