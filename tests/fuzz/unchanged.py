"""Read a torch.save file that no input changes only once: most of a checkpoint's files are as they were.

What a file holds depends on its bytes alone, so the object that was read from it before is the same as what another
reading would give. All that dsconv does with it is done for every input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dsconv.checkpoint.torchfile.file import TorchFile

_read: dict[Any, dict[str, Any]] = {}


@contextlib.contextmanager
def except_for(changed: Collection[Path], folder: Path) -> Iterator[None]:
    """Read again what was ``changed``; of the other files in ``folder``, take what was read before."""
    real = TorchFile.__init__
    names, inside = set(map(str, changed)), f"{folder}/"

    def init(
        self: TorchFile, path: Path, span: Any = None, known: Any = None, *, may_hold_unread: bool = False
    ) -> None:
        name = str(path)
        if name in names or known is not None or not name.startswith(inside):
            real(self, path, span, known, may_hold_unread=may_hold_unread)
            return
        key = name, may_hold_unread, span and (span.offset_bytes, span.nbytes)
        if key not in _read:
            real(self, path, span, known, may_hold_unread=may_hold_unread)
            _read[key] = dict(vars(self))
        vars(self).update(_read[key])

    TorchFile.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        TorchFile.__init__ = real  # type: ignore[method-assign]
