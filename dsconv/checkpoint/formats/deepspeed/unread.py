"""Values in a module's state dict that are no plain tensors: what would be lost with them is refused, others are named.

A module may add anything to its state dict (torch ``nn/modules/module.py`` ``get_extra_state``), and a parameter may be
a DTensor or another subclass, which DeepSpeed pickles as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsconv.checkpoint.pickles.values import Instance, Opaque, TensorRef
from dsconv.errors import UnsupportedError
from dsconv.text import count, quote

EXTRA_STATE = "_extra_state"  # torch/nn/modules/module.py _EXTRA_STATE_KEY_SUFFIX
MAX_DEPTH = 32


def refuse_unread(path: Path, name: str, value: Any) -> None:
    """Raise UnsupportedError where a value is a tensor that dsconv does not read, or holds tensors.

    What a module keeps beside its parameters (``_extra_state``: fp8 scales and the like) may hold any.

    Args:
        path: The file, for messages.
        name: The name in the state dict.
        value: What lies there.
    """
    if isinstance(value, TensorRef) or name.endswith(EXTRA_STATE):
        return
    if isinstance(value, Instance) or (isinstance(value, Opaque) and value.cls.startswith("torch._utils._rebuild")):
        raise UnsupportedError(
            f"{path}: {quote(name)} is a {value.cls}, which dsconv does not read in DeepSpeed's files"
        )
    if _holds_tensors(value, 0):
        kind = value.cls if isinstance(value, Opaque) else type(value).__name__
        raise UnsupportedError(
            f"{path}: {quote(name)} is a {kind} that holds tensors, which would be lost: dsconv reads plain tensors"
            " there. Save them under names of their own"
        )


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, (TensorRef, Instance)):
        return True
    if depth > MAX_DEPTH:
        return True
    if isinstance(value, Opaque):
        value = value.args
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_holds_tensors(part, depth + 1) for part in inside)


def warn_of_unread(path: Path, held: Mapping[str, Any]) -> list[str]:
    """Return a warning that names what is no tensor in a state dict; none where all are."""
    names = [name for name, value in held.items() if value is not None and not isinstance(value, TensorRef)]
    if not names:
        return []
    return [f"{path.name}: left out {count(len(names), 'entry')} without a tensor: {', '.join(map(quote, names[:3]))}"]
