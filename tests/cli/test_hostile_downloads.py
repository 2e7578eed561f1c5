"""Hostile downloads: one command on each download that ``make attacks`` makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attacks.classes import CLASSES
from attacks.downloads import Download
from attacks.judging import faults

ALL = [(name, download) for name, downloads in CLASSES.items() for download in downloads]


@pytest.mark.parametrize(("name", "download"), ALL, ids=[f"{name}: {download.title}" for name, download in ALL])
def test_a_download_harms_nobody(name: str, download: Download, tmp_path: Path) -> None:
    """The test runs the last command, which writes if any command does. ``make attacks`` runs the others."""
    commands = download.commands if name in ("the terminal", "pages, cards and JSON") else download.commands[-1:]
    assert faults(replace(download, commands=commands), tmp_path / "box") == []
