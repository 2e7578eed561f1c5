"""What each opcode of a pickle does to a ``MachineState``. The table at the end maps opcodes to functions.

An opcode that takes more than ``budget.UNCOUNTED_BYTES_PER_BYTE`` of memory for each of its own bytes takes it from the
machine's budget first.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from dsconv.checkpoint.pickles.budget import (
    DICT_BYTES,
    LIST_BYTES,
    LIST_ITEM_BYTES,
    MEMO_BYTES,
    OBJECT_BYTES,
    SET_BYTES,
    SET_ITEM_BYTES,
    TUPLE_BYTES,
    TUPLE_ITEM_BYTES,
)
from dsconv.checkpoint.pickles.errors import BadPickle
from dsconv.checkpoint.pickles.state import MachineState
from dsconv.checkpoint.pickles.values import FragmentAddress, Instance, Opaque, OpaqueClass

MAX_MARKS = 200  # nesting of open containers; real files stay under 10
MAX_INTEGER_BYTES = 64  # torch's generator seeds and Python's random state stay under 16
MAX_INDEX_DIGITS = 12

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_F64 = struct.Struct(">d")


def _mark(m: MachineState) -> None:
    if len(m.marks) >= MAX_MARKS:
        raise BadPickle(f"nests containers over {MAX_MARKS} deep")
    m.budget.allocate(LIST_BYTES)
    m.marks.append(m.stack)
    m.stack = []


def _proto(m: MachineState) -> None:
    version = m.take(1)[0]
    if version > 5:
        raise BadPickle(f"is of protocol {version}; 5 is the last known")


def _frame(m: MachineState) -> None:
    size = m.number(_U64)
    if size > len(m.data) - m.position:
        raise BadPickle(f"is truncated: a frame of {size} bytes where {len(m.data) - m.position} are left")


def _push(value: Any) -> Callable[[MachineState], None]:
    def push(m: MachineState) -> None:
        m.stack.append(value)

    return push


def _new(kind: type, nbytes: int) -> Callable[[MachineState], None]:
    def new(m: MachineState) -> None:
        m.budget.allocate(nbytes)
        m.stack.append(kind())

    return new


def _binint(m: MachineState) -> None:
    m.stack.append(m.number(_I32))


def _binint1(m: MachineState) -> None:
    m.stack.append(m.data[m.position])
    m.position += 1


def _binint2(m: MachineState) -> None:
    m.stack.append(m.number(_U16))


def _long(m: MachineState, nbytes: int) -> None:
    if nbytes > MAX_INTEGER_BYTES:
        raise BadPickle(f"holds an integer of {nbytes} bytes; the limit is {MAX_INTEGER_BYTES}")
    m.stack.append(int.from_bytes(m.take(nbytes), "little", signed=True))


def _long1(m: MachineState) -> None:
    _long(m, m.take(1)[0])


def _long4(m: MachineState) -> None:
    _long(m, m.number(_U32))


def _text_int(m: MachineState) -> None:
    line = m.line()
    if line in (b"00", b"01"):  # protocol 0 writes bools so
        m.stack.append(line == b"01")
        return
    if len(line) > 3 * MAX_INTEGER_BYTES:
        raise BadPickle("holds an integer of too many digits")
    m.stack.append(int(line.removesuffix(b"L")))


def _binfloat(m: MachineState) -> None:
    m.stack.append(_F64.unpack(m.take(8))[0])


def _text_float(m: MachineState) -> None:
    m.stack.append(float(m.line()))


def _string(m: MachineState) -> None:
    line = m.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
        raise BadPickle("holds an unquoted string")
    m.stack.append(codecs.escape_decode(line[1:-1])[0].decode("latin1"))


def _unicode(m: MachineState) -> None:
    m.stack.append(m.line().decode("raw-unicode-escape"))


def _text(size: struct.Struct, codec: str) -> Callable[[MachineState], None]:
    errors = "surrogatepass" if codec == "utf-8" else "strict"

    def text(m: MachineState) -> None:
        m.stack.append(str(m.take(m.number(size)), codec, errors))

    return text


def _blob(size: struct.Struct) -> Callable[[MachineState], None]:
    def blob(m: MachineState) -> None:
        m.stack.append(m.take(m.number(size)))

    return blob


def _tuple(count: int) -> Callable[[MachineState], None]:
    nbytes = TUPLE_BYTES + TUPLE_ITEM_BYTES * count

    def build(m: MachineState) -> None:
        m.budget.allocate(nbytes)
        if len(m.stack) < count:
            raise BadPickle("makes a tuple of more than it has")
        items = tuple(m.stack[-count:])
        m.stack[-count:] = [items]

    return build


def _marked_tuple(m: MachineState) -> None:
    items = m.pop_mark()
    m.budget.allocate(TUPLE_BYTES + TUPLE_ITEM_BYTES * len(items))
    m.stack.append(tuple(items))


def _marked_list(m: MachineState) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _marked_dict(m: MachineState) -> None:
    items = m.pop_mark()
    m.budget.allocate(DICT_BYTES)
    m.stack.append({})
    _fill(m, items)


def _marked_set(m: MachineState) -> None:
    items = m.pop_mark()
    m.budget.allocate(SET_BYTES + SET_ITEM_BYTES * len(items))
    m.stack.append(frozenset(m.budget.key(item) for item in items))


def _fill(m: MachineState, items: list[Any]) -> None:
    target = m.stack[-1]
    if len(items) % 2:
        raise BadPickle("sets a dictionary key without a value")
    if isinstance(target, dict):
        m.budget.allocate_items(target, len(items) // 2)
        key = m.budget.key
        for i in range(0, len(items), 2):
            target[key(items[i])] = items[i + 1]
    elif not isinstance(target, Opaque):  # the items of an unknown mapping are dropped unread
        raise BadPickle(f"sets a key of a {type(target).__name__}")


def _setitem(m: MachineState) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _fill(m, [key, value])


def _setitems(m: MachineState) -> None:
    _fill(m, m.pop_mark())


def _extend(m: MachineState, items: list[Any]) -> None:
    target = m.stack[-1]
    if isinstance(target, list):
        m.budget.allocate(LIST_ITEM_BYTES * (len(items) + 2))
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise BadPickle(f"appends to a {type(target).__name__}")


def _append(m: MachineState) -> None:
    _extend(m, [m.stack.pop()])


def _appends(m: MachineState) -> None:
    _extend(m, m.pop_mark())


def _additems(m: MachineState) -> None:
    items = [m.budget.key(item) for item in m.pop_mark()]
    target = m.stack[-1]
    if isinstance(target, set):
        m.budget.allocate(SET_ITEM_BYTES * len(items))
        target.update(items)
    elif not isinstance(target, Opaque):
        raise BadPickle(f"adds to a {type(target).__name__}")


def _put(m: MachineState, index: int) -> None:
    memo = m.memo
    if index == len(memo) and not m.scattered:  # the numbers of real files follow each other
        memo.append(m.stack[-1])
    elif 0 <= index < len(memo):
        memo[index] = m.stack[-1]
    elif index < 0 or index > len(m.data):
        raise BadPickle(f"memorises under number {index}, more than the file has bytes")
    else:
        m.budget.allocate(MEMO_BYTES)
        m.scattered[index] = m.stack[-1]


def _get(m: MachineState, index: int) -> None:
    if 0 <= index < len(m.memo):
        m.stack.append(m.memo[index])
    elif index in m.scattered:
        m.stack.append(m.scattered[index])
    else:
        raise BadPickle(f"recalls number {index}, which it never memorised")


def _text_index(m: MachineState) -> int:
    line = m.line()
    if len(line) > MAX_INDEX_DIGITS:
        raise BadPickle("holds a memo number of too many digits")
    return int(line)


def _binput(m: MachineState) -> None:
    _put(m, m.data[m.position])
    m.position += 1


def _binget(m: MachineState) -> None:
    _get(m, m.data[m.position])
    m.position += 1


def _memoize(m: MachineState) -> None:
    _put(m, len(m.memo) + len(m.scattered))


def _pop(m: MachineState) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _global(m: MachineState) -> None:
    module, name = m.line().decode("utf-8"), m.line().decode("utf-8")
    m.stack.append(m.find(module, name))


def _stack_global(m: MachineState) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise BadPickle("names a global by something else than text")
    m.stack.append(m.find(module, name))


def _reduce(m: MachineState) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(function, args, may_be_member=True))


def _newobj(m: MachineState) -> None:
    args, cls = m.stack.pop(), m.stack.pop()
    m.stack.append(m.make(cls, args) if isinstance(cls, OpaqueClass) else m.call(cls, args))


def _newobj_ex(m: MachineState) -> None:
    keywords, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if not isinstance(keywords, dict):
        raise BadPickle("makes an object with keywords that are no dictionary")
    if keywords and not isinstance(cls, OpaqueClass):
        raise BadPickle("makes a plain value with keywords")
    m.stack.append(m.make(cls, args) if isinstance(cls, OpaqueClass) else m.call(cls, args))


def _inst(m: MachineState) -> None:
    module, name = m.line().decode("utf-8"), m.line().decode("utf-8")
    args = tuple(m.pop_mark())
    m.stack.append(m.call(m.find(module, name), args))


def _obj(m: MachineState) -> None:
    items = m.pop_mark()
    if not items:
        raise BadPickle("makes an object of nothing")
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _build(m: MachineState) -> None:
    state = m.stack.pop()
    if not m.stack:
        raise BadPickle("sets the state of nothing")
    if isinstance(m.stack[-1], FragmentAddress):
        m.stack[-1].set_state(state)
    elif isinstance(m.stack[-1], Instance):
        m.stack[-1].state = state
    # Any other state is dropped: __setstate__ and attributes are code's, and dsconv needs none of them.


def _persistent(m: MachineState) -> None:
    m.budget.allocate(OBJECT_BYTES)
    m.stack.append(m.persistent_load(m.stack.pop()))


def _text_persistent(m: MachineState) -> None:
    m.budget.allocate(OBJECT_BYTES)
    m.stack.append(m.persistent_load(m.line().decode("ascii")))


def _extension(m: MachineState) -> None:
    raise m.refuse("uses copyreg's extension registry")


def _out_of_band(m: MachineState) -> None:
    raise BadPickle("wants buffers from outside the file")


OPERATIONS: list[Callable[[MachineState], None] | None] = [None] * 256
for _code, _operation in {
    b"(": _mark, b"0": _pop, b"1": lambda m: (m.pop_mark(), None)[1], b"2": lambda m: m.stack.append(m.stack[-1]),
    b"F": _text_float, b"I": _text_int, b"J": _binint, b"K": _binint1, b"L": _text_int, b"M": _binint2,
    b"N": _push(None), b"Q": _persistent, b"P": _text_persistent,
    b"R": _reduce, b"S": _string, b"T": _text(_U32, "latin1"), b"U": _text(_U8, "latin1"),
    b"V": _unicode, b"X": _text(_U32, "utf-8"), b"a": _append, b"b": _build, b"c": _global, b"d": _marked_dict,
    b"}": _new(dict, DICT_BYTES), b"e": _appends, b"g": lambda m: _get(m, _text_index(m)), b"h": _binget, b"i": _inst,
    b"j": lambda m: _get(m, m.number(_U32)), b"l": _marked_list, b"]": _new(list, LIST_BYTES), b"o": _obj,
    b"p": lambda m: _put(m, _text_index(m)), b"q": _binput, b"r": lambda m: _put(m, m.number(_U32)),
    b"s": _setitem, b"t": _marked_tuple, b")": _push(()), b"u": _setitems, b"G": _binfloat,
    b"\x80": _proto, b"\x81": _newobj, b"\x82": _extension, b"\x83": _extension, b"\x84": _extension,
    b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3), b"\x88": _push(True), b"\x89": _push(False),
    b"\x8a": _long1, b"\x8b": _long4, b"B": _blob(_U32), b"C": _blob(_U8),
    b"\x8c": _text(_U8, "utf-8"), b"\x8d": _text(_U64, "utf-8"), b"\x8e": _blob(_U64),
    b"\x8f": _new(set, SET_BYTES), b"\x90": _additems, b"\x91": _marked_set, b"\x92": _newobj_ex,
    b"\x93": _stack_global, b"\x94": _memoize, b"\x95": _frame, b"\x96": _blob(_U64),
    b"\x97": _out_of_band, b"\x98": _out_of_band,
}.items():  # fmt: skip
    OPERATIONS[_code[0]] = _operation
