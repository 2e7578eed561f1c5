"""The fuzzer of fields: in a real file, one field gets another type, is removed, or moves.

``damaged`` and ``forged_pickle`` break bytes and opcodes. Here the file stays sound, but one of its fields has a type,
a size or a depth that its writer never gives it. All fields of a document are equally likely, however many tensors it
lists.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import dsconv
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.cli.inspect import describe
from dsconv.errors import DsconvError
from tests.checkpoint.building import Rec, tensor, zip_bytes
from tests.fixtures import gloo
from tests.fuzz import trees, unchanged
from tests.fuzz.judging import MAX_MESSAGE_CHARS, OTHER, SAME, Failure, tensors_of
from tests.fuzz.mutations import EDGES, WORDS, records
from tests.fuzz.targets import Seeds, Target

HOSTILE_TEXTS = (
    *WORDS,
    "\x1b]0;title\x07\x1b[2J",
    "[z-a]",
    "(a+)+$",
    "__metadata__",
    "%s{0}",
    "line\nline",
    "\u0000x",
    "\u202e" * 3000,
)
HF_CASES = ("llama_tied-z3-bf16-w3", "llama_lora-z2-bf16-w2")
SHARD_BYTES = 20_000  # small enough that the merged folders have an index


@dataclass(frozen=True)
class Document:
    """A file whose fields are changed. ``tree`` is its content, and ``write`` turns edits into the file's bytes."""

    file: Path
    checkpoint: Path
    fields: dict[str, list[trees.Path]]
    tree: Any
    write: Callable[[dict[trees.Path, Any]], bytes]
    sound: bytes
    value: Callable[[Random], Any]

    @property
    def name(self) -> str:
        return str(self.file.relative_to(self.checkpoint.parent))


def json_bytes(tree: Any, edits: dict[trees.Path, Any]) -> bytes:
    """Return the tree as JSON with the edits. Keys of other types become text, since JSON has no others."""

    def changed(value: Any, path: trees.Path | None) -> Any:
        if path is not None and path in edits:
            return edits[path]
        if isinstance(value, dict):
            found = {}
            for at, (key, child) in enumerate(value.items()):
                key_path, value_path = (None, None) if path is None else ((*path, ("key", at)), (*path, ("value", at)))
                new_key, new_child = changed(key, key_path), changed(child, value_path)
                if trees.DELETED in (new_key, new_child):
                    continue
                found[new_key if isinstance(new_key, str) else json.dumps(new_key)] = new_child
            return found
        if isinstance(value, list):
            items = [changed(child, None if path is None else (*path, ("at", at))) for at, child in enumerate(value)]
            return [item for item in items if item is not trees.DELETED]
        return value

    root = changed(tree, ())
    return json.dumps(None if root is trees.DELETED else root).encode("utf-8", "surrogatepass")


def plain_value(rng: Random) -> Any:
    """Return a value of any JSON type, with a size or a depth that no writer produces."""
    kind = rng.randrange(14)
    if kind < 5:
        return (None, True, False, 1.5, -1)[kind]
    if kind == 5:
        return rng.choice((*EDGES, 1 << 70, -(1 << 63))) * rng.choice((1, -1))
    if kind == 6:
        return rng.choice((float("nan"), float("inf"), 1e308, -0.0))
    if kind < 9:
        return rng.choice(HOSTILE_TEXTS)
    if kind == 9:
        return rng.choice(([], {}, [[]], {"": {}}, [None], {"a": 1}, [1, 2], ["a"], [[1], [2]]))
    if kind == 10:
        return [rng.choice((0, 1, 2, -1))] * rng.choice((1, 3, 65, 2000))
    if kind == 11:
        return dict.fromkeys(map(str, range(rng.choice((1, 70, 2000)))), 1)
    value: Any = 0
    for _ in range(rng.choice((3, 90, 400))):
        value = [value] if kind == 12 else {"a": value}
    return value


def pickled_value(rng: Random) -> Any:
    """Return a value of any type that a pickle can hold."""
    kind = rng.randrange(24)
    if kind < 14:
        return plain_value(rng)
    if kind == 14:
        return rng.choice((b"", b"bytes", bytes(3000)))
    if kind == 15:
        return rng.choice(((), (1,), (1, 2, 3), ("a", None), ((),) * 70, (-1,), (2.5,), (1 << 40, 1 << 40)))
    if kind == 16:
        return rng.choice((set(), {1, 2}, {"a"}))
    if kind == 17:
        return trees.Global(
            *rng.choice((("torch", "float32"), ("torch", "Size"), ("my.own", "Class"), ("torch", "int4")))
        )
    if kind == 18:
        return trees.Call(trees.Global("torch", "Size"), ([rng.choice((3, -1, 1 << 50)), 2],))
    if kind == 19:
        return trees.Call(trees.Global("collections", "OrderedDict"), (), items={"a": 1, 2: None})
    if kind == 20:
        return trees.Raw(tensor(shape=[rng.choice(EDGES[:9])], strides=[rng.choice((0, 1, 2))]))
    if kind == 21:
        return trees.Raw(rng.choice((b"]\x94q\x00h\x00a", b"}q\x00X\x01\x00\x00\x00ah\x00s", b"]q\x00(h\x00h\x00e")))
    if kind == 22:
        return trees.Pid(("storage", trees.Global("torch", "FloatStorage"), rng.choice(("0", "x", 0)), "cpu", 4))
    return {rng.choice((1, None, (), 1.5, b"k", True)): "value"}


class Fields(Target):
    """Change one field of one document of a checkpoint, which is then opened, described, read or planned."""

    name = "fields"
    share = 8

    def __init__(self, seeds: Seeds) -> None:
        super().__init__(seeds)
        self.documents: list[Document] = []
        sources = {path.name: path for path in seeds.checkpoints}
        for name, source in sources.items():
            self.add(Path(shutil.copytree(source, self.folder / name)))
        for case, folder in gloo.ensure("zero", HF_CASES).items():
            copied = Path(shutil.copytree(folder / "ckpt", self.folder / case))
            self.add(copied)
            dsconv.merge(copied, self.folder / f"{case}-merged", max_shard_size=SHARD_BYTES, fsync=False)
            self.add(self.folder / f"{case}-merged")
        self.add(Path(shutil.copytree(gloo.ensure("dcp", ["hf-w3"])["hf-w3"] / "ckpt", self.folder / "dcp-hf")))
        kinds: dict[str, list[Document]] = {}
        for document in self.documents:
            kinds.setdefault(f"{document.checkpoint.name}/{trees.name_of(document.file.name)}", []).append(document)
        self.kinds = list(kinds.values())
        for checkpoint in {document.checkpoint for document in self.documents}:
            for action in range(5):  # so that everything is imported beforehand
                with contextlib.suppress(DsconvError):
                    self.use(checkpoint, action)

    def add(self, checkpoint: Path) -> None:
        """Make a document of each file of a checkpoint that has fields."""
        for path in sorted(checkpoint.rglob("*")):
            if not path.is_file() or path.stat().st_size > 1 << 20 or path.name.startswith("truth"):
                continue
            data = path.read_bytes()
            if path.suffix in (".pt", ".bin") and zipfile.is_zipfile(path):
                self._add_zip(path, checkpoint, data)
            elif path.name == ".metadata":
                tree = trees.decode(data)
                self._append(path, checkpoint, tree, functools.partial(trees.encode, tree), data)
            elif path.suffix == ".json":
                tree = json.loads(data)
                self._append(path, checkpoint, tree, functools.partial(json_bytes, tree), data)
            elif path.suffix == ".safetensors":
                size = struct.unpack("<Q", data[:8])[0]
                tree, rest = json.loads(data[8 : 8 + size]), data[8 + size :]

                def header(edits: dict[trees.Path, Any], tree: Any = tree, rest: bytes = rest) -> bytes:
                    raw = json_bytes(tree, edits)
                    raw += b" " * (-len(raw) % 8)
                    return struct.pack("<Q", len(raw)) + raw + rest

                self._append(path, checkpoint, tree, header, data)

    def _add_zip(self, path: Path, checkpoint: Path, data: bytes) -> None:
        found = records(data)
        place = next((at for at, (name, _) in enumerate(found) if name.endswith("/data.pkl")), None)
        if place is None or len(found[place][1]) > 20_000:
            return
        tree = trees.decode(found[place][1])

        def write(edits: dict[trees.Path, Any]) -> bytes:
            new = [(name, trees.encode(tree, edits) if at == place else part) for at, (name, part) in enumerate(found)]
            return zip_bytes([Rec(name, part) for name, part in new])

        self._append(path, checkpoint, tree, write, data)

    def _append(
        self, path: Path, checkpoint: Path, tree: Any, write: Callable[[dict[trees.Path, Any]], bytes], sound: bytes
    ) -> None:
        is_json = path.suffix in (".json", ".safetensors")
        value = plain_value if is_json else pickled_value
        self.documents.append(Document(path, checkpoint, trees.fields(tree), tree, write, sound, value))

    def broken(self, rng: Random) -> tuple[Document, bytes, int]:
        document = rng.choice(rng.choice(self.kinds))
        edits: dict[trees.Path, Any] = {}
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            path = rng.choice(document.fields[rng.choice(list(document.fields))])
            edits[path] = trees.DELETED if path and rng.randrange(6) == 0 else document.value(rng)
        return document, document.write(edits), rng.randrange(10)

    def judge(self, broken: tuple[Document, bytes, int]) -> str:
        document, data, action = broken
        document.file.write_bytes(data)
        try:
            with unchanged.except_for((document.file,), self.folder):
                self.use(document.checkpoint, action)
        finally:
            document.file.write_bytes(document.sound)
        return OTHER if data != document.sound else SAME

    def use(self, checkpoint: Path, action: int) -> None:
        """Open a checkpoint, describe it as ``inspect --json`` does, and plan or read as ``action`` says."""
        out = self.folder / "out"
        found = open_checkpoint(checkpoint)
        json.dumps(describe(found))
        if long := next((text for text in found.warnings if len(text) > MAX_MESSAGE_CHARS), None):
            raise Failure(f"a warning of {len(long)} characters: {long[:300]!a}")
        if action == 0:
            dsconv.verify(found, checkpoint)  # a merge would run transformers in another process
        elif action == 1:
            dsconv.to_dcp(found, out, dry_run=True)
        elif action == 2:
            dsconv.to_universal(found, out, dry_run=True)
        elif action == 3 and found.training is not None:
            found.training()
        elif action < 6:
            tensors_of(found)
