"""``python -m tests.fuzz.guided TARGET``: fuzz the same targets with atheris, which tracks the code that an input
reaches.

atheris is not a dependency: ``pip install atheris`` where it builds (Linux, and the CPython versions that it supports).
It runs until it is stopped or reaches ``-runs=N``, and needs minutes to find what the mutations do not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any


class Bytes(Random):
    """Random choices that are read from atheris's bytes, and are zero when the bytes run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        nbytes = (k + 7) // 8
        chunk = self._data[self._at : self._at + nbytes].ljust(nbytes, b"\0")
        self._at += nbytes
        return int.from_bytes(chunk, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["dsconv"]):
        from tests.fuzz.judging import judged, limits
        from tests.fuzz.kinds import TARGETS
        from tests.fuzz.targets import seeds

    names = {kind.name: kind for kind in TARGETS}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m tests.fuzz.guided TARGET [-runs=N …], TARGET one of: {', '.join(names)}")
    kind = names[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(prefix="dsconv-fuzz-") as folder, limits():
        target = kind(seeds(Path(folder)))

        def one(data: bytes) -> Any:
            judged(lambda: target.judge(target.broken(Bytes(data))))

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
