"""The name of the file in which dsconv says what it wrote."""

from __future__ import annotations

MANIFEST = "dsconv.manifest.json"
