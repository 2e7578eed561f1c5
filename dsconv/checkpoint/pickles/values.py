"""What the pickle machine builds beside plain Python data, and how a message shows it.

No object here is of a class that a file names: each is a record of what the file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.pickles.errors import BadArguments

MAX_DIMENSIONS = 64  # of a tensor, as in numpy; the product of a longer shape takes quadratic time
MAX_NUMEL = 1 << 63  # torch counts elements in an int64
MAX_NAME_CHARS = 1000  # of a class and its module
MAX_SHOWN_NAME = 255  # characters of a class's name in a message


class OpaqueClass:
    """A class or function that the file names and dsconv does not know. It labels data and is never called.

    Attributes:
        module: The module, as the file spells it.
        name: The name in the module.
        label: Both as a message shows them: printable and at most ``MAX_SHOWN_NAME`` characters long.
    """

    __slots__ = ("label", "module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        text = f"{module}.{name}"
        text = text if text.isprintable() else repr(text[:MAX_SHOWN_NAME])
        self.label = text if len(text) <= MAX_SHOWN_NAME else text[: MAX_SHOWN_NAME - 1] + "…"

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """An object of a class that dsconv does not need.

    Attributes:
        cls: The name of the class.
        args: The arguments that the object was made of. Its state is dropped unread.
    """

    cls: str
    args: tuple[Any, ...] = ()


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class in ``kept_classes.KEPT``, whose attributes a format reads.

    Attributes:
        cls: The name of the class.
        args: The arguments that the object was made of, not interpreted.
        state: Its attributes, usually a dictionary, not interpreted.
    """

    cls: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """Return the attribute ``name``, or ``default`` where the object has no such attribute."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class UnreadTensor(Instance):
    """A tensor that is not a view of one storage: sparse, quantized, or of a class that wraps other tensors.

    A client state may hold one. A format refuses it where it expects a weight, as it does any other Instance.
    """

    __slots__ = ()


@dataclass(frozen=True)
class StorageKind:
    """A storage class of torch. ``dtype`` is None for the untyped one, whose elements are bytes."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of ``numel`` elements. ``key`` names its record under ``data/``."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a view of a storage. ``offset`` and ``strides`` are counted in elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def view_key(self) -> str:
        """Return text that is equal for equal views of one storage, to key a dictionary with.

        A file can choose numbers, and so tuples of them, that hash alike. The hashes of text are secret.
        """
        return f"{self.dtype.name}{self.shape}{self.strides}{self.offset} {self.storage.key}"


@dataclass(slots=True)
class FragmentAddress:
    """Where a ZeRO-1/2 partition holds its share of a parameter (deepspeed ``utils/tensor_fragment.py``).

    The class is pickled as an empty object and then its state, so ``set_state`` fills it.
    """

    numel: int = 0
    start: int = 0

    def set_state(self, state: Any) -> None:
        """Take both numbers from the pickled attributes; raise BadArguments unless they are integers."""
        if not (isinstance(state, dict) and type(state.get("numel")) is int and type(state.get("start")) is int):
            raise BadArguments("a fragment_address without integers")
        self.numel, self.start = state["numel"], state["start"]


KEY_KINDS = (OpaqueClass, Opaque, Instance, StorageKind, TensorRef, DType)  # what may be a dictionary key beside data


def safe_repr(value: object, limit: int = 80) -> str:
    """Return ``repr`` of a value out of a file for a message.

    Args:
        value: Anything, of any depth and size.
        limit: The most characters to return.

    Returns:
        Text without control characters. It takes time in proportion to ``limit``, not to the value.
    """
    text = _shown(value, limit, 3)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(value: object, limit: int, depth: int) -> str:
    if isinstance(value, (str, bytes)):
        return repr(value[:limit]) if len(value) <= limit else repr(value[:limit]) + "…"
    if isinstance(value, int) and value.bit_length() > 512:
        return f"<an integer of {value.bit_length()} bits>"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (OpaqueClass, DType)):
        return str(value)
    if isinstance(value, (Opaque, Instance)):
        return f"<{value.cls}>"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        opening, closing = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        if depth == 0:
            return f"{opening}…{closing}"
        parts = []
        for item in islice(value, 9):
            parts.append(_shown(item, limit, depth - 1))
            if isinstance(value, dict):
                parts[-1] += f": {_shown(value[item], limit, depth - 1)}"
        if len(value) > 9:
            parts.append("…")
        return opening + ", ".join(parts) + ("," if opening == "(" and len(parts) == 1 else "") + closing
    return f"<{type(value).__name__}>"
