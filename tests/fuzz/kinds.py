"""All targets of the fuzzer."""

from __future__ import annotations

from tests.fuzz.fields import Fields
from tests.fuzz.targets import (
    Checkpoints,
    Index,
    Legacy,
    Metadata,
    Pickles,
    SafetensorsHeader,
    Target,
    ZipDamage,
    ZipForgery,
)

TARGETS: tuple[type[Target], ...] = (
    Pickles,
    ZipDamage,
    ZipForgery,
    Legacy,
    SafetensorsHeader,
    Index,
    Metadata,
    Checkpoints,
    Fields,
)
