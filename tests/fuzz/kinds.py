"""All targets of the fuzzer."""

from __future__ import annotations

from tests.fuzz.adapters import Adapters
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
from tests.fuzz.zip_readers import ZipReaders

TARGETS: tuple[type[Target], ...] = (
    Pickles,
    ZipDamage,
    ZipForgery,
    ZipReaders,
    Legacy,
    SafetensorsHeader,
    Index,
    Metadata,
    Checkpoints,
    Fields,
    Adapters,
)
