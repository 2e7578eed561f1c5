"""Every way in which a pickle can call a function: by each opcode, in each protocol, and through the memo."""

from __future__ import annotations

import os

from attacks.payload import (
    SYSTEM,
    Hostile,
    argv,
    line,
    pickled,
    touch,
)
from tests.checkpoint.building import call, glob, stack_glob, text, tup, whole

OPCODES = [
    Hostile("GLOBAL and REDUCE, protocol 0", lambda c: b"cos\nsystem\n(" + line(c) + b"tR.", "os.system"),
    Hostile("GLOBAL and REDUCE, protocol 2", lambda c: whole(call(SYSTEM, touch(c))), "os.system"),
    Hostile(
        "STACK_GLOBAL and REDUCE", lambda c: whole(call(stack_glob("os", "system"), touch(c)), protocol=4), "os.system"
    ),
    Hostile("INST", lambda c: b"(" + line(c) + b"ios\nsystem\n.", "os.system"),
    Hostile("OBJ", lambda c: b"(" + SYSTEM + line(c) + b"o.", "os.system"),
    Hostile(
        "NEWOBJ", lambda c: whole(glob("subprocess", "Popen"), tup(argv(c)), b"\x81"), "subprocess.Popen", real=False
    ),
    Hostile(
        "NEWOBJ_EX",
        lambda c: whole(glob("subprocess", "Popen"), tup(argv(c)), b"}\x92", protocol=4),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "BUILD with a poisoned __setstate__",
        lambda c: whole(glob("argparse", "Namespace"), b")\x81}", text("__setstate__"), SYSTEM, b"sb", touch(c), b"b"),
        "os.system",
    ),
    Hostile(
        "BUILD with slot state",
        lambda c: whole(
            glob("argparse", "Namespace"), b")\x81N}", text("__setstate__"), SYSTEM, b"s\x86b", touch(c), b"b"
        ),
        "os.system",
    ),
    Hostile("EXT1", lambda c: whole(b"\x82\x01", tup(touch(c)), b"R"), "extension registry", real=False),
    Hostile("EXT2", lambda c: whole(b"\x83\x01\x01", tup(touch(c)), b"R"), "extension registry", real=False),
    Hostile("EXT4", lambda c: whole(b"\x84\x01\x01\x00\x00", tup(touch(c)), b"R"), "extension registry", real=False),
    *[Hostile(f"__reduce__ pickled in protocol {p}", pickled(p), f"{os.system.__module__}.system") for p in range(6)],
]
MEMO_TRICKS = [
    Hostile(
        "the function hides in the memo",
        lambda c: whole(SYSTEM, b"q\x00", b"0h\x00", tup(touch(c)), b"R"),
        "os.system",
    ),
    Hostile(
        "a memo number is overwritten",
        lambda c: whole(glob("collections", "OrderedDict"), b"q\x000", SYSTEM, b"q\x000h\x00", tup(touch(c)), b"R"),
        "os.system",
    ),
    Hostile(
        "module and name come from the memo",
        lambda c: whole(text("system"), b"\x94", text("os"), b"\x9400h\x01h\x00\x93", tup(touch(c)), b"R", protocol=4),
        "os.system",
    ),
    Hostile("the result is thrown away", lambda c: whole(call(SYSTEM, touch(c)), b"0N"), "os.system"),
    Hostile(
        "the call stands between marks and is dropped",
        lambda c: whole(b"(", call(SYSTEM, touch(c)), b"1N"),
        "os.system",
    ),
    Hostile("DUP copies the function", lambda c: whole(SYSTEM, b"2", tup(touch(c)), b"R\x86"), "os.system"),
    Hostile("the call makes a dictionary's key", lambda c: whole(b"}", call(SYSTEM, touch(c)), b"Ns"), "os.system"),
    Hostile("the call makes a persistent id", lambda c: whole(call(SYSTEM, touch(c)), b"Q"), "os.system"),
    Hostile(
        "long memo numbers",
        lambda c: whole(SYSTEM, b"r\x10\x00\x00\x000j\x10\x00\x00\x00", tup(touch(c)), b"R"),
        "os.system",
    ),
]
