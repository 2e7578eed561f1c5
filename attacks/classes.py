"""The classes of hostile downloads and servers."""

from __future__ import annotations

from attacks.displays import DISPLAYS
from attacks.downloads import COSTS, LINKS, SPECIAL, TERMINAL, TYPES, Download
from attacks.servers import SERVERS

CLASSES: dict[str, list[Download]] = {
    "links": LINKS,
    "special files": SPECIAL,
    "types of metadata": TYPES,
    "the terminal": TERMINAL,
    "pages, cards and JSON": DISPLAYS,
    "time and memory": COSTS,
    "servers": SERVERS,
}
