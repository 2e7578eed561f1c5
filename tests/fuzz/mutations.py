"""Ways to break a file: bytes, the opcodes of a pickle, the fields of a zip, the values of a JSON document.

Each takes a ``random.Random`` for its choices, so that the same code serves a seeded loop, hypothesis, which shrinks
its findings, and atheris.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

from tests.checkpoint.building import Rec, blob, call, glob, number, stack_glob, storage, tensor, text, tup, zip_bytes

EDGES = (
    0,
    1,
    2,
    3,
    7,
    8,
    63,
    64,
    255,
    256,
    0x7FFF,
    0xFFFF,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
)
WORDS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\0",
    "0",
    "-1",
    "storage",
    "module",
    "state",
    "\ud800",
    "\u202e",
    "é" * 40,
    "x" * 2000,
)
GLOBALS = (
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("copyreg", "_reconstructor"),
    ("copyreg", "__newobj__"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "FloatStorage"),
    ("torch", "float32"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("_codecs", "encode"),
    ("builtins", "set"),
    ("builtins", "bytearray"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("my.own", "Class"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
)
PLAIN = b"N\x88\x89)]}\x8f012(tlde.abus\x85\x86\x87\x90\x91Ro\x81\x92\x93\x94Q"  # opcodes without an argument
TEXT_CODES, INT_CODES = b"XUT\x8c\x8d", b"KMJI\x8a"


# Bytes


def damaged(data: bytes, rng: Random) -> bytes:
    """Return ``data`` after one to three accidents of the kinds that disks, networks and unfinished writes cause."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(ACCIDENTS)(data, rng)
    return data


def _flip(data: bytes, rng: Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 30, 64, 512, 4096)))


def _integer(data: bytes, rng: Random) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, len(data) - width))
    value = rng.choice((*EDGES, len(data), len(data) - at, rng.getrandbits(64)))
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _cut(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _zero(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _noise(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _repeat(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[start:end] + data[at:]


def _move(data: bytes, rng: Random) -> bytes:
    """Write a block to the wrong place."""
    start, end = _span(data, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[start:end] + data[at + end - start :]


ACCIDENTS: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip,
    _flip,
    _integer,
    _truncate,
    _cut,
    _zero,
    _noise,
    _repeat,
    _move,
)


# Pickles


@cache
def opcodes(data: bytes) -> tuple[bytes, ...]:
    """Return the bytes of each opcode of a sound pickle, with its argument."""
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    return tuple(data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def forged_pickle(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Return a plausible pickle: opcodes of ``data`` are dropped, doubled, moved, changed, or taken from ``others``."""
    ops = list(opcodes(data))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        at = rng.randrange(len(ops))
        kind = rng.randrange(8)
        if kind == 0:
            del ops[at]
        elif kind == 1:
            ops.insert(at, rng.choice(ops))
        elif kind == 2:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        elif kind == 3:
            ops.insert(at, _fragment(rng))
        elif kind == 4 and others:
            source = opcodes(rng.choice(others))
            start = rng.randrange(len(source))
            ops[at:at] = source[start : start + rng.randrange(1, 12)]
        elif kind == 5:
            ops[at] = damaged(ops[at], rng)
        else:
            ops[at] = _changed(ops, at, rng)
        if not ops:
            return b"."
    return b"".join(ops)


def _changed(ops: list[bytes], at: int, rng: Random) -> bytes:
    """Change the argument of the next opcode at or after ``at`` that has one, to another of the same kind."""
    code = ops[at][:1]
    if code in TEXT_CODES and code:
        pool = [op for op in ops if op[:1] in TEXT_CODES]
        return rng.choice(pool) if rng.randrange(2) else text(rng.choice(WORDS))
    if code in INT_CODES and code:
        return number(rng.choice((*EDGES, rng.randrange(64))) * rng.choice((1, 1, 1, -1)))
    if code == b"c":
        return glob(*rng.choice(GLOBALS))
    return bytes([rng.choice(PLAIN)])


def _fragment(rng: Random) -> bytes:
    name = rng.choice(GLOBALS)
    return rng.choice(
        (
            lambda: call(glob(*name), text(rng.choice(WORDS))),
            lambda: call(stack_glob(*name), number(rng.choice(EDGES))),
            lambda: glob(*name),
            lambda: glob(*name) + b")\x81",
            lambda: glob(*name) + tup(text("x")) + b"R",
            lambda: tensor(
                of=storage(), shape=[rng.choice(EDGES[:16]), rng.choice(EDGES[:8])], strides=[rng.choice(EDGES[:12]), 1]
            ),
            lambda: tensor(rng.choice(EDGES[:18]), of=storage(str(rng.randrange(4)))),
            lambda: blob(rng.randbytes(rng.randrange(40))),
            lambda: b"(" * rng.choice((1, 5, 250)),
            lambda: b"]" + b"\x85" * rng.choice((1, 30, 3000)),
            lambda: b"2" * rng.randrange(1, 60) + b"\x87" * 20,
            lambda: b"q" + bytes([rng.randrange(256)]),
            lambda: b"h" + bytes([rng.randrange(256)]),
            lambda: bytes([rng.choice(PLAIN)]),
            lambda: b"\x80" + bytes([rng.randrange(8)]),
            lambda: b"F" + rng.choice((b"nan", b"inf", b"1e999", b"-0.0", b"x")) + b"\n",
        )
    )()


# Zips


@cache
def records(data: bytes) -> tuple[tuple[str, bytes], ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return tuple((info.filename, archive.read(info)) for info in archive.infolist())


def forged_zip(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Return a new zip of the records of ``data``, with sound CRC-32s unless it lies about them."""
    found = [Rec(name, content) for name, content in records(data)]
    original = next(content for name, content in records(data) if name.endswith("/data.pkl"))
    top: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not found:
            break
        rec = rng.choice(found)
        kind = rng.randrange(10)
        if kind <= 2:
            rec = next((r for r in found if str(r.name).endswith("/data.pkl")), rec)
            rec.data = forged_pickle(original, rng, others)
        elif kind == 3:
            rec.data = damaged(rec.data, rng)
        elif kind == 4:
            found.remove(rec)
        elif kind == 5:
            found.insert(rng.randrange(len(found)), Rec(rng.choice(found).name, rng.choice(found).data))
        elif kind == 6:
            rng.shuffle(found)
        elif kind == 7:
            name = rng.choice(
                (
                    rng.choice(found).name,
                    "../x",
                    "archive/../x",
                    "/abs",
                    "archive",
                    "b/data.pkl",
                    "archive/data/99",
                    b"\xff/x",
                )
            )
            setattr(rec, rng.choice(("name", "local_name")), name)
        elif kind == 8:
            _lie(rec, rng)
        else:
            top[rng.choice(("count", "shift", "count_here", "narrow_count", "disk"))] = rng.choice(EDGES[:12])
            if rng.randrange(4) == 0:
                top[rng.choice(("comment", "prefix"))] = rng.randbytes(rng.randrange(1, 60))
            top["zip64"] = rng.randrange(3) == 0
    return zip_bytes(found, **top)


def _lie(rec: Rec, rng: Random) -> None:
    field = rng.choice(
        (
            "method",
            "flags",
            "crc32",
            "nbytes",
            "packed",
            "disk",
            "header_offset",
            "local_method",
            "local_flags",
            "local_nbytes",
        )
    )
    limit = 1 << 16 if field in ("method", "flags", "disk", "local_method", "local_flags") else 1 << 32
    setattr(rec, field, rng.choice((*EDGES[:-4], len(rec.data), len(rec.data) + 1, len(rec.data) // 2, 8)) % limit)
    if rng.randrange(3) == 0:
        rec.extra = rng.choice(
            (b"\x01\x00\x08\x00" + rng.randbytes(8), b"\x01\x00\xff\xff", rng.randbytes(rng.randrange(20)))
        )


# JSON


def forged_json(value: Any, rng: Random) -> bytes:
    """Return a JSON document like ``value`` with some other values, names and nesting. Occasionally it is not JSON at
    all.
    """
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        _walk(value, places)
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            other_parent, other_key = rng.choice(places)
            parent[key] = (
                json.loads(json.dumps(other_parent[other_key]))
                if other_parent is not parent
                else other_parent[other_key]
            )
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice(WORDS)] = parent.pop(key)
        elif kind == 3 and isinstance(parent, list):
            parent.insert(key, rng.choice(EDGES))
        else:
            parent[key] = _json_value(parent[key], rng)
    raw = json.dumps(value, ensure_ascii=rng.randrange(2) == 0).encode("utf-8", "surrogatepass")
    if rng.randrange(8) == 0:
        raw = damaged(raw, rng)
    if rng.randrange(20) == 0:  # a name given twice
        middle = raw.find(b",")
        raw = raw[:1] + raw[1:middle] + b"," + raw[1:] if middle > 0 else raw
    return raw


def _json_value(old: Any, rng: Random) -> Any:
    if type(old) is int and rng.randrange(3):
        return rng.choice((old + 1, old - 1, -old, old * 2, old + (1 << 64), 0, float(old)))
    return rng.choice(
        (
            None,
            True,
            -1,
            1.5,
            float("nan"),
            10**30,
            *EDGES[-4:],
            *WORDS,
            [],
            {},
            [[[]]],
            {"a": {}},
            "BF16",
            "F4",
            "I64",
            [0] * 100,
        )
    )


def _walk(value: Any, places: list[tuple[Any, Any]]) -> None:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        places.append((value, key))
        _walk(inner, places)
