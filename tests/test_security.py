"""Check that the links in SECURITY.md work, and that every test that it names exists and is collected."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_promise_names_a_test_that_is_there() -> None:
    there = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there.add(path.name)
        there |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"\b(test_\w+(?:\.py)?)\b", row.split("|")[2])
        assert named, row
        assert set(named) <= there, row
